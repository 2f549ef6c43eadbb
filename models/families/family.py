"""TokenSpans: what a DiT family knows about its self-attention sequence before the text length is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...kernels.sparsity import TokenGrid


@dataclass(frozen=True)
class TokenSpans:
    """The video grid of one model call, in patchified latent tokens, and what surrounds it.

    text: "first" and "last" place the text of joint attention; "none" means that self-attention holds no text.
    references_before, references_after: tokens of reference latents directly before and after the grid. boxes: as in TokenGrid.

    The text length is read off the sequence itself, because models pad it or add tokens of their own to it.
    """

    frames: int
    height: int
    width: int
    text: str = "none"
    references_before: int = 0
    references_after: int = 0
    boxes: tuple[tuple[int, int, int], ...] = ()

    @property
    def image_tokens(self) -> int:
        return self.references_before + self.frames * self.height * self.width + self.references_after

    def grid(self, q_len: int, k_len: int) -> TokenGrid | None:
        """The TokenGrid of a self-attention call with these lengths; None where the call is not this self-attention."""
        text = q_len - self.image_tokens
        if q_len != k_len or text < 0 or (text and self.text == "none"):
            return None
        before = self.references_before + (text if self.text == "first" else 0)
        after = self.references_after + (text if self.text == "last" else 0)
        return TokenGrid(self.frames, self.height, self.width, before, after, self.boxes)


@dataclass(frozen=True)
class Family:
    """One DiT family. It is recognised by the module that defines the network's class; the host's package is never imported.

    modules: how the module's dotted name may begin: "comfy.ldm.wan." is all of a folder, without the dot at the end it is one file.
    spans(network, latent_shape, extras) -> TokenSpans. latent_shape is the latent's (..., [frames,] height, width);
    extras holds the keyword arguments of the model call (reference latents and the like).
    """

    name: str
    modules: tuple[str, ...]
    spans: Callable[[Any, tuple[int, ...], Mapping[str, Any]], TokenSpans]


def patches(latent_shape: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of a latent of shape `(batch, channels, [frames,] height, width)`, odd sizes rounded up."""
    frames = latent_shape[2] if len(latent_shape) == 5 else 1
    sizes = (frames, latent_shape[-2], latent_shape[-1])
    padded = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    frames, height, width = (math.ceil(size / patch) for size, patch in zip(sizes, padded, strict=True))
    return frames, height, width


def tokens(latent_shape: tuple[int, ...], patch_size: tuple[int, ...]) -> int:
    """Number of tokens of a latent."""
    return math.prod(patches(latent_shape, patch_size))
