"""The learned layer embedding of ART (arXiv 2502.18364), in the published layout.

The published weights of the method were an embedding (`layer_pe`) and a LoRA for Flux.1-dev in the layout of diffusers, which ComfyUI's own
LoRA loader reads. They have been withdrawn; nothing here fetches or contains any.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .regions import Regions

KEY = "layer_pe"


def layer_embedding(state: Mapping[str, Tensor], regions: Regions, width: int) -> Tensor:
    """`(layers, width)`: what is added to a layer's tokens after the patch embedding of a transformer of this width.

    state: holds `layer_pe` `(1, at least layers, 1, 1, width)`. Raises ValueError.
    """
    table = state.get(KEY)
    if table is None:
        raise ValueError(f"the layer embedding has no tensor {KEY!r}; its tensors are {', '.join(sorted(state)[:5]) or 'none'}")
    if table.ndim != 5 or tuple(table.shape[::2]) != (1, 1, width) or table.shape[3] != 1 or table.shape[1] < len(regions.boxes):
        raise ValueError(
            f"the layer embedding is {tuple(table.shape)}; model and boxes need (1, {len(regions.boxes)} or more, 1, 1, {width}): "
            "use the embedding of this model, or fewer boxes"
        )
    return table[0, : len(regions.boxes), 0, 0]
