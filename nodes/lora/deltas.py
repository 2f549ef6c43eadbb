"""What a stock LoRA loader has added to a model, layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.lora
from comfy.weight_adapter import LoRAAdapter

from ...models.patchers.lora_composer.concepts import Delta


def deltas_of(index: int, concept: Any, base: Any) -> dict[str, list[Delta]]:
    """What the LoRAs of patcher `concept` add to those of `base`, by the name of the linear layer. Raises ValueError where that is nothing."""
    if concept.model is not base.model:
        raise ValueError(f"concept {index}'s model is another one than model; connect its LoRA loader to the model that goes into LoRA Composer")
    if any(a is not b for key, known in base.patches.items() for a, b in itertools.zip_longest(known, concept.patches.get(key, [])[: len(known)])):
        raise ValueError(f"model has LoRAs that concept {index}'s model has not; connect its LoRA loader behind them, or remove them from model")
    out: dict[str, list[Delta]] = {}
    for key, patches in concept.patches.items():
        known = base.patches.get(key, [])
        added = patches[len(known) :]
        if not added or not key.endswith(".weight"):
            continue
        plain = [_plain(entry) for entry in added]
        found = [delta for delta in plain if delta is not None]
        if len(found) < len(plain):
            found = _whole(concept, base, key, patches)
        out[key.removeprefix("diffusion_model.").removesuffix(".weight")] = found
    if not out:
        raise ValueError(
            f"concept {index}'s LoRA adds nothing to the model: it belongs to another base, its strength is 0, or its loader is not a stock one"
        )
    return out


def _plain(entry: tuple[Any, ...]) -> Delta | None:
    """The delta of an ordinary LoRA at one layer, as two small matrices; None for every other kind of patch."""
    strength, adapter, strength_model, offset, function = entry
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None or (offset is not None and offset[0] != 0):
        return None
    up, down, alpha, middle, dora, reshape = adapter.weights
    if any(part is not None for part in (middle, dora, reshape)):
        return None
    scale = strength * (1.0 if alpha is None else alpha / max(down.shape[0], 1))
    return Delta(up.flatten(1).float() * scale, down.flatten(1), 0 if offset is None else offset[1])


def _whole(concept: Any, base: Any, key: str, patches: list[Any]) -> list[Delta]:
    """The same as one matrix, by ComfyUI's own arithmetic on the unpatched weight; empty for what is no matrix."""
    weight = base.get_key_patches(key)[key][0][0]
    if weight.ndim != 2:
        return []
    weight = weight.float()
    before = comfy.lora.calculate_weight(base.patches.get(key, []), weight.clone(), key)
    return [Delta(comfy.lora.calculate_weight(patches, weight.clone(), key) - before)]
