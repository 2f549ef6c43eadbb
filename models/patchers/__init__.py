"""What a host puts into a model, told of calls and blocks by its glue."""

__all__ = ["attention", "diffusers", "report", "search", "settings"]
