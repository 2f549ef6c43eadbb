"""Patches with overlap and their blending: run a local operator on a canvas of any size in constant memory, without a seam.

An axis is cut into spans; each has a weight over its positions, and at every position the weights of an axis sum to one. Patches in
two and three dimensions are products of spans, and so are their weights, which therefore sum to one as well. A weight never falls
towards a border of the canvas: there is nobody there to take over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
MapPatches = Callable[[Iterable[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class Span:
    """Positions start..stop-1 of an axis. Weight 1 on core, falling to 0 over `fade` positions before and after it, 0 beyond."""

    start: int
    stop: int
    core: tuple[float, float]
    fade: tuple[float, float]  # before and after the core; 0 at a border of the canvas

    def raw_weight(self, positions: Tensor) -> Tensor:
        """Trapezoid at float64 positions, not yet normalised."""
        before = _ramp(positions - (self.core[0] - self.fade[0]), self.fade[0])
        after = _ramp(self.core[1] + self.fade[1] - positions, self.fade[1])
        return torch.minimum(before, after)


def _ramp(distance: Tensor, length: float) -> Tensor:
    return (distance / length).clamp(0, 1) if length else (distance >= 0).to(distance.dtype)


@dataclass(frozen=True)
class Axis:
    """One axis of a canvas and how it is cut."""

    size: int
    spans: tuple[Span, ...]

    @property
    def tile(self) -> int:
        """Positions in the longest span."""
        return max(span.stop - span.start for span in self.spans)

    def weights(self, scale: int = 1) -> list[Tensor]:
        """For each span float32 weights at its positions on a `scale` times finer grid; at every position of the axis they sum to one."""
        positions = (torch.arange(self.size * scale, dtype=torch.float64) + 0.5) / scale
        parts = [positions[span.start * scale : span.stop * scale] for span in self.spans]
        raw = [span.raw_weight(part) for span, part in zip(self.spans, parts, strict=True)]
        total = torch.zeros(self.size * scale, dtype=torch.float64)
        for span, weight in zip(self.spans, raw, strict=True):
            total[span.start * scale : span.stop * scale] += weight
        return [(weight / total[span.start * scale : span.stop * scale]).float() for span, weight in zip(self.spans, raw, strict=True)]


def overlapping(size: int, tile: int, overlap: int, margin: int = 0) -> Axis:
    """Spans of `tile` positions that share at least `overlap` with their neighbours, evenly spread.

    margin: positions at an inner end of a span whose result is not used, because the operator would have seen beyond it; with a margin
    of at least the operator's reach the result is that without tiles. The blend takes place in the rest of the overlap.
    Raises ValueError where overlap or margin leave nothing.
    """
    if not 0 <= overlap < tile or not 0 <= 2 * margin <= overlap:
        raise ValueError(f"tile {tile}, overlap {overlap}, margin {margin}: use 0 <= overlap < tile, and a margin of at most half the overlap")
    if size <= tile:
        return whole(size)
    count = ceil((size - overlap) / (tile - overlap))
    starts = [round(index * (size - tile) / (count - 1)) for index in range(count)]
    return Axis(size, tuple(_trapezoid(start, tile, size, overlap, margin) for start in starts))


def whole(size: int) -> Axis:
    """The axis in one piece."""
    return Axis(size, (Span(0, size, (0, size), (0, 0)),))


def jointly_modulated(size: int, tile: int) -> Axis:
    """PatchVSR's multi-patch joint modulation (Du et al. 2025, arXiv:2509.26025): a grid without overlap, and between every two patches an
    auxiliary one, half in each, whose weight is largest on the seam and falls to both sides. The grid's patches have the rest."""
    if size <= tile:
        return whole(size)
    count = ceil(size / tile)
    seams = [round(index * size / count) for index in range(count + 1)]
    reach = min(b - a for a, b in itertools.pairwise(seams)) / 2
    spans = []
    for index in range(count):
        start = min(max((seams[index] + seams[index + 1] - tile) // 2, 0), size - tile)
        fade = (reach if index else 0, reach if index < count - 1 else 0)
        spans.append(Span(start, start + tile, (seams[index] + fade[0], seams[index + 1] - fade[1]), fade))
        if index < count - 1:
            seam = seams[index + 1]
            start = min(max(seam - tile // 2, 0), size - tile)
            spans.append(Span(start, start + tile, (seam, seam), (reach, reach)))
    return Axis(size, tuple(spans))


def _trapezoid(start: int, tile: int, size: int, overlap: int, margin: int) -> Span:
    stop = start + tile
    blend = overlap - 2 * margin
    before, after = (blend if start > 0 else 0), (blend if stop < size else 0)
    core = (start + (margin + before if start > 0 else 0), stop - (margin + after if stop < size else 0))
    return Span(start, stop, core, (before, after))


@dataclass(frozen=True)
class Patch:
    """A product of spans: where it lies on the canvas, and its number on each axis."""

    index: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass
class Progress:
    """What a run has finished, so that an interrupted one can go on where it was. Give it to `run` again with the same canvas."""

    done: int = 0
    total: int = 0
    steps_down: list[str] = field(default_factory=list)  # why the tiles were made smaller, each time
    _sum: Tensor | None = None
    _tiling: Tiling | None = None


OnPatch = Callable[[Progress, Patch, Tensor], None]
"""(progress, patch, canvas so far), after each patch; what it raises ends the run, and the progress keeps what was finished."""


@dataclass(frozen=True)
class Tiling:
    """A canvas of one to three axes (time, height, width: the last ones of a tensor) cut into patches."""

    axes: tuple[Axis, ...]

    @property
    def patches(self) -> list[Patch]:
        spans = [[(index, slice(span.start, span.stop)) for index, span in enumerate(axis.spans)] for axis in self.axes]
        return [Patch(tuple(index for index, _ in parts), tuple(part for _, part in parts)) for parts in itertools.product(*spans)]

    @property
    def recomputed(self) -> float:
        """Positions computed / positions on the canvas: what the overlap costs."""
        return prod(sum(span.stop - span.start for span in axis.spans) / axis.size for axis in self.axes)

    def memory(self, channels: int, scale: Sequence[int], itemsize: int = 4, working: float = 0.0) -> int:
        """Bytes that `run` needs beside its input: the result, one patch in and out, and `working` bytes of the operator per input position."""
        tile = prod(axis.tile for axis in self.axes)
        finer = prod(scale)
        canvas = prod(axis.size for axis in self.axes)
        return int(channels * itemsize * (canvas * finer + tile * (1 + 2 * finer)) + tile * working)

    def run(
        self,
        operator: Operator,
        x: Tensor,
        *,
        scale: Sequence[int] | None = None,
        progress: Progress | None = None,
        on_patch: OnPatch | None = None,
        device: torch.device | None = None,
        map_patches: MapPatches | None = None,
    ) -> Tensor:
        """Apply `operator` patch by patch to x `(..., *canvas)`; it maps a patch `(..., *tile)` to `(..., *tile * scale)`.

        scale: integer factor of each axis, default 1. The result is float32, on x's device. device: where patches are computed, default
        x's. on_patch: for previews, progress and interrupts. map_patches: computes them in place of `operator`, in their order, such as
        `Workers.map`. Raises ValueError when x or the operator's result has another shape.
        """
        scale = tuple(scale) if scale is not None else (1,) * len(self.axes)
        size = tuple(axis.size for axis in self.axes)
        if tuple(x.shape[x.ndim - len(size) :]) != size:
            raise ValueError(f"the canvas is {size} and the tensor {tuple(x.shape)}; make the tiling from the tensor's last {len(size)} sizes")
        progress = Progress() if progress is None else progress
        patches = self.patches
        if progress._tiling != self or progress._sum is None:
            lead = x.shape[: x.ndim - len(size)]
            finer = [length * factor for length, factor in zip(size, scale, strict=True)]
            progress._sum = None
            progress.done, progress._tiling = 0, self
        else:
            lead, finer = x.shape[: x.ndim - len(size)], list(progress._sum.shape[x.ndim - len(size) :])
        progress.total = len(patches)
        weights = [axis.weights(factor) for axis, factor in zip(self.axes, scale, strict=True)]
        remaining = patches[progress.done :]
        parts = (x[last(patch.slices)] for patch in remaining)
        outs = map_patches(parts) if map_patches is not None else (operator(part if device is None else part.to(device)) for part in parts)
        for patch, out in zip(remaining, outs, strict=True):
            part = x[last(patch.slices)]
            expected = [part.shape[part.ndim - len(size) + axis] * scale[axis] for axis in range(len(size))]
            if list(out.shape[out.ndim - len(size) :]) != expected:
                raise ValueError(f"the operator made {tuple(out.shape)} of {tuple(part.shape)}; with a scale of {scale} it should end in {expected}")
            out = out.to(x.device, torch.float32)
            if progress._sum is None:
                progress._sum = torch.zeros(*(out.shape[: out.ndim - len(size)] or lead), *finer, dtype=torch.float32, device=x.device)
            for axis, index in enumerate(patch.index):
                weight = weights[axis][index].to(x.device)
                out = out * weight.view(-1, *(1,) * (len(size) - 1 - axis))
            target = tuple(slice(part.start * factor, part.stop * factor) for part, factor in zip(patch.slices, scale, strict=True))
            progress._sum[last(target)] += out
            progress.done += 1
            if on_patch is not None:
                on_patch(progress, patch, progress._sum)
        assert progress._sum is not None
        result, progress._sum, progress._tiling = progress._sum, None, None
        return result


def last(slices: tuple[slice, ...]) -> Any:
    """An index of the last axes."""
    return (..., *slices)


def run_within_memory(
    operator: Operator,
    x: Tensor,
    tiling: Callable[[int], Tiling],
    tile: int,
    *,
    smallest: int = 64,
    progress: Progress | None = None,
    **arguments: Any,
) -> Tensor:
    """`Tiling.run` with tiles that are halved, down to `smallest`, each time there is no memory for one. `tiling(tile)` makes the tiling.

    Raises the out-of-memory error when the smallest tile does not fit either.
    """
    progress = Progress() if progress is None else progress
    while True:
        try:
            return tiling(tile).run(operator, x, progress=progress, **arguments)
        except (torch.cuda.OutOfMemoryError, MemoryError) as error:
            if tile // 2 < smallest:
                raise
            progress.steps_down.append(f"tile {tile} did not fit in memory ({type(error).__name__}); {tile // 2} was used")
            tile //= 2
            progress._sum = None  # the result so far belongs to other tiles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def stream(operator: Operator, frames: Iterable[Tensor], window: int, overlap: int, *, scale: int = 1, margin: int = 0) -> Iterator[Tensor]:
    """Apply a temporal operator to a clip of any length, holding two windows of it at most.

    frames: tensors of one shape, one a frame. operator: maps `(frames, ...)` to `(frames * scale, ...)`. Yields the result frame by frame,
    float32. Windows of `window` frames share `overlap`; the last one ends with the clip and may share more. The weights are those of the
    same windows in memory (`Axis`), so the result is too.
    """
    if not 0 <= overlap < window or not 0 <= 2 * margin <= overlap:
        raise ValueError(f"window {window}, overlap {overlap}, margin {margin}: use 0 <= overlap < window, and a margin of at most half the overlap")
    source = iter(frames)
    buffer: list[Tensor] = []  # input frames from `first` on
    first, start, total = 0, 0, None  # total: of the clip, once its end has been seen
    sums: dict[int, Tensor] = {}
    norms: dict[int, float] = {}
    while True:
        # One stride beyond the window, to know whether the next one is the last.
        while total is None and first + len(buffer) < start + 2 * window - overlap:
            frame = next(source, None)
            if frame is None:
                total = first + len(buffer)
            else:
                buffer.append(frame)
        if total == 0:
            return
        stop = start + window if total is None else min(start + window, total)
        size = total if total is not None else stop + 1
        span = _trapezoid(start, stop - start, size, overlap, margin)
        out = operator(torch.stack(buffer[start - first : stop - first])).float()
        weight = span.raw_weight((torch.arange(start * scale, stop * scale, dtype=torch.float64) + 0.5) / scale).tolist()
        for index, value in zip(range(start * scale, stop * scale), weight, strict=True):
            part = out[index - start * scale]
            sums[index] = sums[index] + value * part if index in sums else value * part
            norms[index] = norms.get(index, 0.0) + value
        last = total is not None and stop == total
        following = start + window - overlap
        if total is not None and not last:
            following = min(following, total - window)
        ready = size * scale if last else following * scale
        for index in sorted(index for index in sums if index < ready):
            yield sums.pop(index) / norms.pop(index)
        if last:
            return
        start = following
        del buffer[: start - first]
        first = start
