"""What is composed: concepts, their boxes on the canvas, and what their LoRAs add to layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Pixels left..right-1, top..bottom-1 of the canvas."""

    left: int
    top: int
    right: int
    bottom: int

    def cells(self, height: int, width: int, canvas: tuple[int, int]) -> tuple[slice, slice]:
        """(rows, columns) of the cells that lie wholly inside, on a grid over the canvas (height, width); empty where none does."""

        def inside(start: int, stop: int, cells: int, pixels: int) -> slice:
            first = -(-start * cells // pixels)
            return slice(first, max(stop * cells // pixels, first))

        return inside(self.top, self.bottom, height, canvas[0]), inside(self.left, self.right, width, canvas[1])

    def __str__(self) -> str:
        return f"x {self.left}..{self.right}, y {self.top}..{self.bottom}"


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to a linear layer's output channels from `start` on: up (down x), or up x where there is no down."""

    up: Tensor  # (out, rank) or (out, in)
    down: Tensor | None = None  # (rank, in)
    start: int = 0


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept.

    context: its prompt, encoded, `(1, tokens, width)`. words: the rows of the context that name it. deltas: its LoRA by the layer's name.
    """

    box: Box
    context: Tensor
    words: tuple[int, ...]
    deltas: Mapping[str, Sequence[Delta]]


def validate(boxes: Sequence[Box], canvas: tuple[int, int]) -> None:
    """Raises ValueError where a box is empty, outside the canvas (height, width), or shares a pixel with another."""
    height, width = canvas
    for index, box in enumerate(boxes, 1):
        if box.left >= box.right or box.top >= box.bottom:
            raise ValueError(f"concept {index} has an empty box ({box}); give it a width and a height above 0")
        if box.left < 0 or box.top < 0 or box.right > width or box.bottom > height:
            raise ValueError(f"concept {index}'s box ({box}) leaves the canvas of {width} x {height}; move it, or make the canvas larger")
        for other, second in enumerate(boxes[: index - 1], 1):
            if box.left < second.right and second.left < box.right and box.top < second.bottom and second.top < box.bottom:
                raise ValueError(f"the boxes of concept {other} ({second}) and concept {index} ({box}) overlap; move them apart")


def fits(index: int, name: str, module: Any, deltas: Sequence[Delta]) -> bool:
    """Whether a layer takes a concept's deltas. Only linear layers do. Raises ValueError where the shapes are another base's or no LoRA's."""
    if not hasattr(module, "in_features"):
        return False
    for delta in deltas:
        broken = f"concept {index}'s LoRA is damaged: {name} has"
        if delta.down is not None and delta.up.shape[1] != len(delta.down):
            raise ValueError(f"{broken} matrices of ranks {delta.up.shape[1]} and {len(delta.down)}; load another file")
        if not all(matrix.isfinite().all() for matrix in (delta.up, delta.down) if matrix is not None):
            raise ValueError(f"{broken} NaN or infinity among its values, so the picture would be black; load another file")
        columns = (delta.up if delta.down is None else delta.down).shape[1]
        if columns != module.in_features or delta.start + delta.up.shape[0] > module.out_features:
            raise ValueError(
                f"concept {index}'s LoRA belongs to another base: its {name} goes from {columns} to {delta.up.shape[0]} channels, "
                f"the model's from {module.in_features} to {module.out_features}"
            )
    return True
