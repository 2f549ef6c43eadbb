"""Clips of layers: several over one another, frame by frame. Frames are float32 `(height, width, 4)` in 0..1, sRGB with straight alpha."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .compose import composite
from .document import Document, Layer

ENDINGS = ("hold", "loop", "hide")


@dataclass(frozen=True, eq=False)
class ClipLayer:
    """A clip over others. frames: `(height, width, 4)` each, straight alpha; a tensor of them or an `AlphaVideo`, read once a composition.

    x, y: of the upper left corner on the canvas, in pixels. ending: what a shorter clip does at its end, "hold" its last frame, "loop", or
    "hide". opacity and blend_mode are those of `document.Layer`.
    """

    name: str
    frames: Iterable[Tensor]
    x: int = 0
    y: int = 0
    opacity: float = 1.0
    blend_mode: str = "normal"
    ending: str = "hold"

    def __post_init__(self) -> None:
        if self.ending not in ENDINGS:
            raise ValueError(f"layer {self.name!r} has ending {self.ending!r}; use one of {', '.join(ENDINGS)}")

    def on_canvas(self, width: int, height: int) -> Iterator[Tensor]:
        """The layer alone, at its place and with its opacity: `(height, width, 4)` a frame."""
        for frame in self.frames:
            yield composite(Document(width, height, (self.as_layer(frame),)))

    def as_layer(self, frame: Tensor) -> Layer:
        """A frame of it as a layer of a document."""
        return Layer(self.name, frame, self.x, self.y, self.opacity, self.blend_mode)


@dataclass(frozen=True, eq=False)
class LayeredClip:
    """Clips over one another on a canvas of width x height pixels, the lowest first. As long as the longest; all have one frame rate."""

    width: int
    height: int
    layers: tuple[ClipLayer, ...]

    def __iter__(self) -> Iterator[Tensor]:
        """The composite, `(height, width, 4)` a frame, by the formulas of `compose.composite`."""
        running = [iter(layer.frames) for layer in self.layers]
        shown: list[Tensor | None] = [None] * len(running)
        ended = [False] * len(running)
        while True:
            for index, layer in enumerate(self.layers):
                frame = next(running[index], None)
                if frame is None:
                    ended[index] = True
                    if layer.ending == "loop":
                        running[index] = iter(layer.frames)
                        frame = next(running[index], None)
                    elif layer.ending == "hold":
                        frame = shown[index]
                shown[index] = frame
            if all(ended):
                return
            layers = tuple(layer.as_layer(frame) for layer, frame in zip(self.layers, shown, strict=True) if frame is not None)
            yield composite(Document(self.width, self.height, layers))
