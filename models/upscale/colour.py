"""Give an upscaled clip the colours of what it was made from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

METHODS = ("wavelet", "adain", "lab", "none")
LEVELS = 5


def match(clip: Tensor, source: Tensor, method: str) -> Tensor:
    """Clip and source `(frames, 3, height, width)` in 0..1, of one size; returns the clip with colours from `source`.

    wavelet: the low frequencies of the source, the high ones of the clip (as StableSR's colour fix). adain: mean and deviation of each
    channel of each frame. lab: the same in CIELAB, lightness left alone. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"colour is {method!r}; use one of {', '.join(METHODS)}")
    if method == "wavelet":
        return (clip - low_frequencies(clip) + low_frequencies(source)).clamp(0, 1)
    if method == "adain":
        return _same_statistics(clip, source).clamp(0, 1)
    if method == "lab":
        lab, wanted = to_lab(clip), to_lab(source)
        return from_lab(torch.cat([lab[:, :1], _same_statistics(lab[:, 1:], wanted[:, 1:])], 1)).clamp(0, 1)
    return clip


def low_frequencies(x: Tensor, levels: int = LEVELS) -> Tensor:
    """An a-trous pyramid of 3 x 3 binomial blurs, radius 1, 2, 4 ...; edges are repeated."""
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    for level in range(levels):
        radius = 1 << level
        x = F.conv2d(F.pad(x, (radius,) * 4, mode="replicate"), kernel, dilation=radius, groups=x.shape[1])
    return x


def _same_statistics(x: Tensor, wanted: Tensor) -> Tensor:
    axes = (-2, -1)
    deviation = wanted.std(axes, keepdim=True) / x.std(axes, keepdim=True).clamp_min(1e-5)
    return (x - x.mean(axes, keepdim=True)) * deviation + wanted.mean(axes, keepdim=True)


# sRGB (IEC 61966-2-1) to CIE XYZ, white D65, and CIELAB.
_XYZ = torch.tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]], dtype=torch.float64)
_DELTA = 6 / 29


def to_lab(rgb: Tensor) -> Tensor:
    """`(frames, 3, height, width)` sRGB in 0..1 -> L in 0..100, a, b."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    matrix = (_XYZ / _XYZ.sum(1, keepdim=True)).to(rgb)
    xyz = torch.einsum("ij,fjhw->fihw", matrix, linear)
    x, y, z = torch.where(xyz > _DELTA**3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * _DELTA**2) + 4 / 29).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def from_lab(lab: Tensor) -> Tensor:
    """The inverse of `to_lab`."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    xyz = torch.stack([y + a / 500, y, y - b / 200], 1)
    xyz = torch.where(xyz > _DELTA, xyz**3, 3 * _DELTA**2 * (xyz - 4 / 29))
    matrix = torch.linalg.inv(_XYZ / _XYZ.sum(1, keepdim=True)).to(lab)
    linear = torch.einsum("ij,fjhw->fihw", matrix, xyz)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(1e-12) ** (1 / 2.4) - 0.055)
