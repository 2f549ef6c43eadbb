"""permute: put tokens that attend alike next to each other, so that a block of consecutive tokens is worth keeping or dropping as one.

A permuter is `f(grid, block, protect_first_frame) -> order`, an int64 tensor `(seq_len,)`: order[i] is the token that moves to
position i. Full tiles come first and start at multiples of `block`; ragged remainders follow, then the first frame when it is
protected, then the tokens before and after the grid. So the protected tokens share as few blocks as possible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import registry
from .grid import TokenGrid

Permuter = Callable[[TokenGrid, int, bool], Tensor]
PERMUTERS: dict[str, Permuter] = {}


def permuter(function: Permuter) -> Permuter:
    registry.add(PERMUTERS, "permuter", function.__name__, function)
    return function


@permuter
def window3d(grid: TokenGrid, block: int, protect_first_frame: bool) -> Tensor:
    """Windows of frames x height x width: (2, 8, 8) for 128 tokens. RainFusion2.0 (Ascend MindIE-SD) and its LightX2V port.

    A frame without a partner (an image, the last of an odd number) gets flat windows, (8, 16) for 128 tokens. Ours: the ports refuse it.
    Ours, too: windows lie in windows, so that each half, quarter or eighth of a block, a granule, is as compact as the block.
    """
    frames, first = _frames(grid, protect_first_frame)
    deep, flat = _window(block, 2), _window(block, 1)
    paired = frames.shape[0] - frames.shape[0] % deep[0]
    tiles, rest = _tiles(frames[:paired], deep)
    flat_tiles, flat_rest = _tiles(frames[paired:], flat)
    tiles, flat_tiles = (x.view(-1, block)[:, _nested(window)].flatten() for x, window in ((tiles, deep), (flat_tiles, flat)))
    return _order(grid, tiles, flat_tiles, rest, flat_rest, first)


@permuter
def spatial_tiles(grid: TokenGrid, block: int, protect_first_frame: bool) -> Tensor:
    """Tiles inside a frame, 8 x 16 for 128 tokens: the reorder of DraftAttention (Shen et al. 2025), for any height and width."""
    frames, first = _frames(grid, protect_first_frame)
    return _order(grid, *_tiles(frames, _window(block, 1)), first)


def ragged(grid: TokenGrid, block: int, permuter: Permuter | None) -> tuple[Tensor, Tensor]:
    """Blocks of variable length for a grid of boxes: (order, hidden), int64 and bool `(positions,)`.

    A box begins a block where it would not fit into what is left of one, and what is left is filled with the last token again, hidden. The
    tokens before and after the grid come last, in blocks of their own.
    """
    runs, start = [], grid.before
    for frames, height, width in grid.boxes:
        box = TokenGrid(frames, height, width)
        inner = torch.arange(box.seq_len) if permuter is None else permuter(box, block, False)
        runs.append(start + inner)
        start += box.seq_len
    around = torch.cat([torch.arange(grid.before), torch.arange(start, grid.seq_len)])
    order: list[Tensor] = []
    hidden: list[Tensor] = []
    length = 0

    def fill() -> None:
        nonlocal length
        gap = -length % block
        if gap:
            order.append(order[-1][-1].expand(gap))
            hidden.append(torch.ones(gap, dtype=torch.bool))
            length += gap

    for run in (*runs, around):
        if len(run) > -length % block or run is around:
            fill()
        order.append(run)
        hidden.append(torch.zeros(len(run), dtype=torch.bool))
        length += len(run)
    return torch.cat(order), torch.cat(hidden)


def _window(block: int, deepest: int) -> tuple[int, int, int]:
    """(frames, height, width) of a window of `block` tokens, a power of two: two frames deep where that leaves a square, else flat."""
    doublings = block.bit_length() - 1
    depth = 2 if deepest > 1 and doublings % 2 else 1
    height = 1 << ((doublings - (depth - 1)) // 2)
    return depth, height, block // depth // height


def _nested(window: tuple[int, int, int]) -> Tensor:
    """The raster positions of a window, sides powers of two, in the order of their bits taken in turn (Morton): column, row and frame first."""
    sides = [torch.arange(size) for size in window]
    place, rank, next_bit = torch.cartesian_prod(*sides), torch.zeros(window).long().flatten(), 0
    for bit in range(max(window).bit_length() - 1):
        for axis in (2, 1, 0):
            if 1 << bit < window[axis]:
                rank |= (place[:, axis] >> bit & 1) << next_bit
                next_bit += 1
    return rank.argsort()


def _frames(grid: TokenGrid, protect_first_frame: bool) -> tuple[Tensor, Tensor]:
    """(token ids `(frames, height, width)` to put in windows, those of the protected first frame). A still image has none."""
    ids = torch.arange(grid.before, grid.before + grid.video_tokens).view(grid.frames, grid.height, grid.width)
    protected = 1 if protect_first_frame and grid.frames > 1 else 0
    return ids[protected:], ids[:protected]


def _tiles(ids: Tensor, tile: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(ids of the full tiles, tile after tile; the remainders). ids: `(frames, height, width)`, frames a multiple of the tile's."""
    depth, height, width = tile
    bottom, right = ids.shape[1] - ids.shape[1] % height, ids.shape[2] - ids.shape[2] % width
    full = ids[:, :bottom, :right].unflatten(0, (-1, depth)).unflatten(2, (-1, height)).unflatten(4, (-1, width))
    # Each strip is walked along its long side, so that a block of its tokens is as compact as it can be.
    strips = (ids[:, bottom:].transpose(1, 2), ids[:, :bottom, right:])
    return full.permute(0, 2, 4, 1, 3, 5).flatten(), torch.cat([strip.flatten() for strip in strips])


def _order(grid: TokenGrid, *video: Tensor) -> Tensor:
    after = torch.arange(grid.seq_len - grid.after, grid.seq_len)
    return torch.cat([*(part.flatten() for part in video), torch.arange(grid.before), after])
