"""permute: put tokens that attend alike next to each other, so that a block of consecutive tokens is worth keeping or dropping as one.

A permuter is `f(grid, block, protect_first_frame) -> order`, an int64 tensor `(seq_len,)`: order[i] is the token that moves to
position i. Full tiles come first and start at multiples of `block`; ragged remainders follow, then the first frame when it is
protected, then the tokens before and after the grid. So the protected tokens share as few blocks as possible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grid import TokenGrid

Permuter = Callable[[TokenGrid, int, bool], Tensor]
PERMUTERS: dict[str, Permuter] = {}


def permuter(function: Permuter) -> Permuter:
    PERMUTERS[function.__name__] = function
    return function


@permuter
def window3d(grid: TokenGrid, block: int, protect_first_frame: bool) -> Tensor:
    """Windows of frames x height x width: (2, 8, 8) for 128 tokens. RainFusion2.0 (Ascend MindIE-SD) and its LightX2V port.

    An image, or a clip of which one frame is left to tile, gets flat (8, 16) windows.
    """
    frames = grid.frames - (1 if protect_first_frame and grid.frames > 1 else 0)
    return _tiles(grid, window_shape(block, frames), protect_first_frame)


@permuter
def spatial_tiles(grid: TokenGrid, block: int, protect_first_frame: bool) -> Tensor:
    """Tiles inside a frame, 8 x 16 for 128 tokens: the reorder of DraftAttention (Shen et al. 2025)."""
    return _tiles(grid, window_shape(block, 1), protect_first_frame)


def window_shape(block: int, frames: int) -> tuple[int, int, int]:
    """(frames, height, width) of a window with `block` tokens, a power of two >= 4: two frames deep where a square remains, else flat."""
    depth = 2 if frames > 1 and block.bit_length() % 2 == 0 else 1
    area = block // depth
    height = 1 << ((area.bit_length() - 1) // 2)
    return depth, height, area // height


def _tiles(grid: TokenGrid, tile: tuple[int, int, int], protect_first_frame: bool) -> Tensor:
    ids = torch.arange(grid.video_tokens).view(grid.frames, grid.height, grid.width) + grid.before
    first = ids[:0]
    if protect_first_frame and grid.frames > 1:
        first, ids = ids[:1], ids[1:]
    depth, height, width = tile
    whole = tuple(size - size % step for size, step in zip(ids.shape, tile, strict=True))
    core = ids[: whole[0], : whole[1], : whole[2]].unflatten(0, (-1, depth)).unflatten(2, (-1, height)).unflatten(4, (-1, width))
    parts = [
        core.permute(0, 2, 4, 1, 3, 5).flatten(),
        ids[: whole[0], whole[1] :].flatten(),  # bottom rows
        ids[: whole[0], : whole[1], whole[2] :].flatten(),  # right columns
        ids[whole[0] :].flatten(),  # last frames
        first.flatten(),
        torch.arange(grid.before),
        torch.arange(grid.seq_len - grid.after, grid.seq_len),
    ]
    return torch.cat(parts)
