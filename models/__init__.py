"""Networks and what is put into them. Nothing here knows ComfyUI."""

__all__ = ["errors", "weight_files"]
