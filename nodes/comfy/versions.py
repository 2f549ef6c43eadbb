"""What differs between the versions of ComfyUI, 0.18.1 and newer, and of comfy-aimdo (DynamicVRAM)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import comfy.model_management as mm
import torch

__all__ = [
    "bit_depth_of",
    "call_vbar",
    "is_dynamic",
    "load_upscale_model",
    "model_prefetch",
    "pause_malloc_graph",
    "trim_of",
    "unload_upscale_model",
    "vbar_of",
]

try:  # ComfyUI >= 0.34: tensors that outlive a block must be made outside the Comfy Compiler's malloc graph (#16144)
    from comfy.model_prefetch import pause_malloc_graph
except ImportError:
    pause_malloc_graph = nullcontext

try:  # ComfyUI >= 0.21
    from comfy import model_prefetch
except ImportError:
    model_prefetch = None


def is_dynamic(patcher: Any) -> bool:
    """Whether DynamicVRAM moves its weights."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def vbar_of(patcher: Any) -> Any:
    """The virtual address range of a dynamic patcher's weights on its device; None where it has none."""
    return getattr(patcher.model, "dynamic_vbars", {}).get(patcher.load_device)


def call_vbar(vbar: Any, name: str, nbytes: int) -> bool:
    """Call a method that older versions of comfy-aimdo lack; whether it was there."""
    if not hasattr(vbar, name):
        return False
    getattr(vbar, name)(int(nbytes))
    return True


def load_upscale_model(upscale_model: Any, needed: float) -> torch.device:
    """Bring an upscale model to the device through ComfyUI's manager, with `needed` bytes beside its weights."""
    patcher = getattr(upscale_model, "patcher", None)  # 0.18.1 has none
    device: torch.device = mm.get_torch_device() if patcher is None else patcher.load_device
    if patcher is None:
        mm.free_memory(mm.module_size(upscale_model.model) + needed, device)
        upscale_model.to(device)
    else:
        mm.load_models_gpu([patcher], memory_required=needed, force_full_load=True)
    return device


def unload_upscale_model(upscale_model: Any) -> None:
    """Where the manager does not do so itself."""
    if getattr(upscale_model, "patcher", None) is None:
        upscale_model.to("cpu")


def bit_depth_of(video: Any) -> int:
    """Bits of a channel of a VIDEO that is made of components."""
    return int(video.get_bit_depth()) if hasattr(video, "get_bit_depth") else 8


def trim_of(video: Any) -> tuple[float, float]:
    """(start, length) in seconds of the part of its file that a VIDEO is."""
    if hasattr(video, "get_active_trim_window"):
        trim = video.get_active_trim_window()
    else:  # 0.18.1 tells nobody
        trim = getattr(video, "_VideoFromFile__start_time", 0.0), getattr(video, "_VideoFromFile__duration", 0.0)
    return float(trim[0]), float(trim[1])
