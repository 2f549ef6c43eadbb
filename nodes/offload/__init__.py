"""A memory limit in a ComfyUI model."""

from .host import last_report, patch_memory
from .nodes import LayerOffload, OffloadReport
from .settings import MemorySettings

__all__ = ["LayerOffload", "MemorySettings", "OffloadReport", "last_report", "patch_memory"]
