"""Sparse and quantized attention in a ComfyUI model."""

from .host import BOXES, KEY, OVERRIDE, last_report, patch_attention, pause_malloc_graph
from .nodes import MODES, Accelerate, AttentionReport, AttentionSettings, SparseAttention, accelerate_settings

__all__ = [
    "BOXES",
    "KEY",
    "MODES",
    "OVERRIDE",
    "Accelerate",
    "AttentionReport",
    "AttentionSettings",
    "SparseAttention",
    "accelerate_settings",
    "last_report",
    "patch_attention",
    "pause_malloc_graph",
]
