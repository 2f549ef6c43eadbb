"""A memory limit in a ComfyUI model."""

from .host import MemorySettings, last_report, patch_memory
from .nodes import LayerOffload, OffloadReport

__all__ = ["LayerOffload", "MemorySettings", "OffloadReport", "last_report", "patch_memory"]
