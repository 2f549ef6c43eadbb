"""What an upscaled picture or clip looks like in figures: seams, flicker, distance to a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .tiling import Tiling


def seam_excess(picture: Tensor, tiling: Tiling, scale: int, reference: Tensor | None = None, offsets: int = 16) -> float:
    """Gradient across the borders of patches, over what it is elsewhere: 1 is no seam, and more is one.

    picture, reference: `(channels, height, width)`; tiling: of the network's input. With a reference (the same picture untiled) the
    gradient is compared on the same lines. Without, with `offsets` grids of lines between the borders. 1.0 where there is one patch.
    """
    ratios = []
    for axis, cut in ((1, tiling.axes[0]), (2, tiling.axes[1])):
        lines = sorted({side * scale for span in cut.spans for side in (span.start, span.stop) if 0 < side < cut.size})
        if not lines:
            continue
        on_lines = _gradient(picture, axis, lines)
        if reference is not None:
            ratios.append(on_lines / _gradient(reference, axis, lines))
            continue
        period = min(b - a for a, b in zip([0, *lines], [*lines, cut.size * scale], strict=True) if b > a)
        shifts = [max(round(index * period / (offsets + 1)), 1) for index in range(1, offsets + 1)]
        between = [_gradient(picture, axis, [line + shift for line in lines if line + shift < picture.shape[axis]]) for shift in shifts]
        ratios.append(on_lines / (sum(between) / len(between)))
    return sum(ratios) / len(ratios) if ratios else 1.0


def _gradient(picture: Tensor, axis: int, lines: list[int]) -> float:
    """Mean absolute difference across the lines before these positions."""
    index = torch.tensor(lines, device=picture.device)
    step = (picture.index_select(axis, index) - picture.index_select(axis, index - 1)).abs().mean()
    return max(float(step), 1e-8)


def flicker(clip: Tensor) -> float:
    """Mean absolute second difference in time of a clip `(frames, channels, height, width)`: steady motion and stills have little."""
    if len(clip) < 3:
        return 0.0
    return float((clip[2:] - 2 * clip[1:-1] + clip[:-2]).abs().mean())


def psnr(x: Tensor, reference: Tensor) -> float:
    """Decibels between tensors in 0..1; 120 where they are equal."""
    return float(-10 * torch.log10((x.double() - reference.double()).square().mean().clamp_min(1e-12)))


def ssim(x: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of `(..., channels, height, width)` in 0..1: Gaussian window of 11, sigma 1.5, valid positions."""
    x, reference = (part.reshape(-1, 1, *part.shape[-2:]).double() for part in (x, reference))
    side = min(11, *x.shape[-2:])
    line = torch.exp(-((torch.arange(side, dtype=torch.float64) - (side - 1) / 2) ** 2) / (2 * 1.5**2)).to(x.device)
    line = line / line.sum()

    def mean(part: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(part, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(reference)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(reference * reference) - mean_y**2
    covariance = mean(x * reference) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())
