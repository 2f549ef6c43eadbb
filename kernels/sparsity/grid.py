"""TokenGrid: where the video is in a self-attention sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """A sequence of `before` other tokens, frames x height x width video tokens in raster order, and `after` other tokens.

    The other tokens (text, reference images) are always attended densely. An image has one frame. Sizes are in patchified
    latent tokens. boxes: (frames, height, width) of several grids one after another, such as the layers of a picture, in place of one: together
    they have as many tokens. No box is in more blocks than its tokens need.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0
    boxes: tuple[tuple[int, int, int], ...] = ()

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def seq_len(self) -> int:
        return self.before + self.video_tokens + self.after
