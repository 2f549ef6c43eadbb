"""Super-resolution: the networks, the tiling core that runs anything patch by patch, and small trained weights."""

__all__ = [
    "catanet",
    "colour",
    "convert_essaformer",
    "essaformer",
    "metrics",
    "networks",
    "patch_adapter",
    "pictures",
    "spandrel_catanet",
    "tiling",
    "video",
    "video_reader",
    "video_writer",
    "workers",
]
