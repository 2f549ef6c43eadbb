"""Denoise a large latent in windows that are fused at every step: PatchVSR's joint modulation, as a ComfyUI context handler."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
from comfy.context_windows import ContextHandlerABC
from torch import Tensor

from ...models.upscale.tiling import Axis, Tiling, jointly_modulated, last, overlapping, whole
from .patch_adapter import PatchGuide

PATCH = 2  # latent positions of a token, in height and width, for every supported family
COORDINATES = ("canvas", "window")
FUSIONS = ("joint", "average")


def window_tiling(shape: tuple[int, ...], tile: int, frames: int, frame_overlap: int, fusion: str) -> Tiling:
    """Windows over a latent `(batch, channels, [frames,] height, width)`, in tokens in space and in latent frames in time.

    tile: tokens of a window's side. fusion: "joint" has auxiliary windows on the seams; "average" is MultiDiffusion's plain mean over windows
    that share half (Bar-Tal et al. 2023, arXiv:2302.08113), for comparison.
    """
    time = [] if len(shape) == 4 else [overlapping(shape[2], frames, frame_overlap) if 0 < frames < shape[2] else whole(shape[2])]
    sides = [size // PATCH for size in shape[-2:]]
    return Tiling((*time, *(jointly_modulated(side, tile) if fusion == "joint" else overlapping(side, tile, tile // 2) for side in sides)))


class JointModulation(ContextHandlerABC):
    """Every window is predicted by itself and the predictions are summed with weights that are largest on the seams' own windows.

    tile: tokens of a window's side. coordinates: "canvas" tells the model where the window lies (RoPE options, where the model has them),
    "window" makes each a picture of its own. frames, frame_overlap: windows over time, in latent frames; 0 frames: all at once.
    guide: a patch adapter at work on the clip.
    """

    def __init__(
        self,
        tile: int,
        coordinates: str = "canvas",
        frames: int = 0,
        frame_overlap: int = 0,
        fusion: str = "joint",
        guide: PatchGuide | None = None,
    ):
        self.tile, self.coordinates, self.frames, self.frame_overlap, self.fusion = tile, coordinates, frames, frame_overlap, fusion
        self.guide = guide

    def should_use_context(self, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> bool:
        return self.guide is not None or len(self._tiling(x_in).patches) > 1

    def get_resized_cond(self, cond_in: Any, x_in: Tensor, window: tuple[slice, ...], device: Any = None) -> Any:
        """What conditions hold for every position of the latent (a low-resolution view, a mask) is cut like it; the rest is for all."""
        return None if cond_in is None else [self._cut(cond, x_in, window) for cond in cond_in]

    def execute(self, calc_cond_batch: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> list[Tensor]:
        tiling = self._tiling(x_in)
        scale = (*(1,) * (len(tiling.axes) - 2), PATCH, PATCH)
        weights = [self._weights(axis, factor) for axis, factor in zip(tiling.axes, scale, strict=True)]
        sums = [torch.zeros_like(x_in) for _ in conds]
        for patch in tiling.patches:
            mm.throw_exception_if_processing_interrupted()
            window = tuple(slice(part.start * factor, part.stop * factor) for part, factor in zip(patch.slices, scale, strict=True))
            options = dict(model_options["transformer_options"])
            if self.coordinates == "canvas":
                shift = dict(zip(("shift_y", "shift_x"), (float(part.start) for part in patch.slices[-2:]), strict=True))
                options["rope_options"] = {**options.get("rope_options", {}), **shift}
            if self.guide is not None:
                options = self.guide.options(options, window, timestep)
            parts = [self.get_resized_cond(cond, x_in, window) for cond in conds]
            out = calc_cond_batch(model, parts, x_in[last(window)], timestep, {**model_options, "transformer_options": options})
            for total, part in zip(sums, out, strict=True):
                for axis, index in enumerate(patch.index):
                    part = part * weights[axis][index].to(part).view(-1, *(1,) * (len(tiling.axes) - 1 - axis))
                total[last(window)] += part
        return sums

    def _weights(self, axis: Axis, scale: int) -> list[Tensor]:
        if self.fusion == "joint":
            return axis.weights(scale)
        counts = torch.zeros(axis.size)
        for span in axis.spans:
            counts[span.start : span.stop] += 1
        return [(1 / counts[span.start : span.stop]).repeat_interleave(scale) for span in axis.spans]

    def _tiling(self, x_in: Tensor) -> Tiling:
        return window_tiling(tuple(x_in.shape), self.tile, self.frames, self.frame_overlap, self.fusion)

    def _cut(self, cond: dict[str, Any], x_in: Tensor, window: tuple[slice, ...]) -> dict[str, Any]:
        if cond.get("control") is not None:
            raise ValueError("Patch Upscale Video: a control net is in the conditioning, and its picture cannot be cut into windows; leave it out")

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[last(window)] if value.shape[x_in.ndim - len(window) :] == x_in.shape[x_in.ndim - len(window) :] else value
            if isinstance(getattr(value, "cond", None), Tensor):
                return value._copy_with(cut(value.cond))
            return value

        out = {key: cut(value) for key, value in cond.items()}
        out["model_conds"] = {key: cut(value) for key, value in cond.get("model_conds", {}).items()}
        return out
