"""Sparse and quantized attention in a ComfyUI model."""

from ...models.patchers.settings import AttentionSettings
from .host import last_report, patch_attention
from .nodes import MODES, Accelerate, AttentionReport, SparseAttention, accelerate_settings

__all__ = [
    "MODES",
    "Accelerate",
    "AttentionReport",
    "AttentionSettings",
    "SparseAttention",
    "accelerate_settings",
    "last_report",
    "patch_attention",
]
