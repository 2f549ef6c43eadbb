"""Whether the layers of a file give the merged picture that its program has put beside them: what catches all that nobody has thought of."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, isqrt

from torch import Tensor

from .compose import composite
from .document import Document, Group, Layer, Node

PIXELS = 2**20
"""Compared at most: of a larger canvas, every so-many-th pixel each way. That bounds the work to a composite of 1024 x 1024."""
TOLERANCE = 4.5
"""Of 255, between two levels. Programs round to 8 bits after every layer, and Photoshop's own arithmetic is coarser yet."""


def stride(width: int, height: int) -> int:
    """Every how-many-th pixel of a canvas is compared, each way."""
    return isqrt(max(ceil(width * height / PIXELS) - 1, 0)) + 1


def difference(document: Document, merged: Tensor) -> str | None:
    """A line with the figures where the composite is not the file's merged picture; None where it is.

    document: without transforms. merged: float32 `(height, width, 3 or 4)` of 0..1, every `stride`-th pixel, colours over white; alpha if 4.
    """
    step = stride(document.width, document.height)
    thin = replace(document, width=ceil(document.width / step), height=ceil(document.height / step), layers=_thinned(document.layers, step))
    ours = composite(thin)
    ours[..., :3] = ours[..., :3] * ours[..., 3:] + 1 - ours[..., 3:]
    apart = (ours[..., : merged.shape[2]] - merged).abs().amax(-1) * 255
    if apart.max() <= TOLERANCE:
        return None
    share, mean = 100 * (apart > TOLERANCE).double().mean().item(), apart.double().mean().item()
    return (
        f"its layers together differ from its own merged picture in {_rounded(share)} % of the pixels: by {_rounded(mean)} of 255 on average, "
        f"{apart.max().item():.0f} at most"
    )


def _rounded(value: float) -> str:
    """Two digits, and never 0 where there is something."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else "under 0.01"


def _thinned(nodes: tuple[Node, ...], step: int) -> tuple[Node, ...]:
    """Every `step`-th pixel of the canvas, of each layer: blending works pixel by pixel, so that what is left is as it was."""
    thin: list[Node] = []
    for node in nodes:
        if isinstance(node, Group):
            thin.append(replace(node, layers=_thinned(node.layers, step)))
            continue
        x, y = -(-node.x // step), -(-node.y // step)  # the first one at or after its corner
        rows, columns = (slice(start, None, step) for start in (y * step - node.y, x * step - node.x))
        if _any(node, rows, columns):
            mask = None if node.mask is None else node.mask[rows, columns]
            thin.append(replace(node, image=node.image[rows, columns], mask=mask, x=x, y=y))
    return tuple(thin)


def _any(layer: Layer, rows: slice, columns: slice) -> bool:
    return bool(rows.start < layer.image.shape[0] and columns.start < layer.image.shape[1])
