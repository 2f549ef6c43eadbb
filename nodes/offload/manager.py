"""ComfyUI's memory manager: what it holds, and what it can be asked for. Sizes are in bytes."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm

from ..comfy import is_dynamic


class Demand:
    """Stands among the conditions as a control net without weights that needs `nbytes`: ComfyUI adds them to what the sampling demands."""

    def __init__(self, nbytes: float):
        self.nbytes = nbytes

    def get_models(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: Any) -> float:
        return self.nbytes


def no_effect(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why ComfyUI would not place weights by a limit; None where it does."""
    if mm.is_device_cpu(model.load_device):
        return "this model runs on the CPU, where everything lives in RAM"
    if model.get_additional_models_with_key("multigpu"):
        return "this model runs on several GPUs"
    if kwargs.get("force_full_load") or kwargs.get("force_offload"):
        return "this sampling says itself how its weights are loaded"
    if not is_dynamic(model) and (not mm.lowvram_available or mm.vram_state not in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.LOW_VRAM)):
        return f"ComfyUI runs in its {mm.vram_state.name} mode, which does not load a model by what fits"
    return None


def is_clone(entry: Any, model: Any) -> bool:
    """Whether the manager's entry holds the weights of this model."""
    return entry.model is not None and entry.model.is_clone(model)


def held(model: Any) -> tuple[int, int]:
    """Bytes of weights that the manager holds on the model's device: of this model, under whichever clone, and of all others."""
    mine = others = 0
    for entry in mm.current_loaded_models:
        if entry.model is not None and entry.device == model.load_device:
            if is_clone(entry, model):
                mine += int(entry.model.loaded_size())
            else:
                others += int(entry.model.loaded_size())
    return mine, others


def evict_others(model: Any, budget: int) -> None:
    """Dynamic models are not unloaded for one another: ask the manager to, as far as the limit of the whole process demands it."""
    others = held(model)[1]
    excess = min(others + min(model.model_size(), budget) - budget, others)
    if excess > 0:
        mine = [entry for entry in mm.current_loaded_models if is_clone(entry, model)]
        mm.free_memory(mm.get_free_memory(model.load_device) + excess, model.load_device, keep_loaded=mine)
