"""Blend modes, as functions of colours, in torch on any device.

Formulas: W3C, Compositing and Blending Level 1 (the same as ISO 32000-2, section 11.3.5) for its sixteen modes; Adobe's descriptions of
Photoshop's blending modes for the others; GIMP's manual for grain extract and grain merge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Blend = Callable[[Tensor, Tensor], Tensor]
"""(backdrop, source), both float `(..., 3)` in 0..1 -> the blended colour, same shape."""

PASS_THROUGH = "pass-through"  # groups only

_LUMINOSITY = (0.3, 0.59, 0.11)  # W3C, section 10.2


def _hard_light(b: Tensor, s: Tensor) -> Tensor:
    return torch.where(s <= 0.5, 2 * b * s, _screen(b, 2 * s - 1))


def _screen(b: Tensor, s: Tensor) -> Tensor:
    return b + s - b * s


def _color_dodge(b: Tensor, s: Tensor) -> Tensor:
    return torch.where(b == 0, 0, torch.where(s >= 1, 1, (b / (1 - s)).clamp_max(1)))


def _color_burn(b: Tensor, s: Tensor) -> Tensor:
    return torch.where(b >= 1, 1, torch.where(s == 0, 0, 1 - ((1 - b) / s).clamp_max(1)))


def _soft_light(b: Tensor, s: Tensor) -> Tensor:
    d = torch.where(b <= 0.25, ((16 * b - 12) * b + 4) * b, b.clamp_min(0).sqrt())
    return torch.where(s <= 0.5, b - (1 - 2 * s) * b * (1 - b), b + (2 * s - 1) * (d - b))


def _vivid_light(b: Tensor, s: Tensor) -> Tensor:
    """Colour burn with 2 s below one half, colour dodge with 2 s - 1 above. At the ends the source decides, whatever the backdrop."""
    burn = torch.where(s == 0, 0, 1 - ((1 - b) / (2 * s)).clamp_max(1))
    dodge = torch.where(s >= 1, 1, (b / (2 - 2 * s)).clamp_max(1))
    return torch.where(s <= 0.5, burn, dodge)


def _hard_mix(b: Tensor, s: Tensor) -> Tensor:
    """1 where the two add up to more than 1. Where they add up to 1 exactly, Photoshop gives 1 if the backdrop is the lighter one."""
    over = b + s - 1
    return torch.where(over.abs() < 1e-5, b > s, over > 0).to(b.dtype)


def _divide(b: Tensor, s: Tensor) -> Tensor:
    return torch.where(b == 0, 0, torch.where(s == 0, 1, (b / s).clamp_max(1)))


def _lum(c: Tensor) -> Tensor:
    return (c * c.new_tensor(_LUMINOSITY)).sum(-1, keepdim=True)


def _sat(c: Tensor) -> Tensor:
    return c.amax(-1, keepdim=True) - c.amin(-1, keepdim=True)


def _with_lum(c: Tensor, wanted: Tensor) -> Tensor:
    """SetLum and ClipColor of the W3C."""
    c = c + (wanted - _lum(c))
    lum, low, high = _lum(c), c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    c = torch.where(low < 0, lum + (c - lum) * lum / (lum - low).clamp_min(1e-12), c)
    return torch.where(high > 1, lum + (c - lum) * (1 - lum) / (high - lum).clamp_min(1e-12), c)


def _with_sat(c: Tensor, wanted: Tensor) -> Tensor:
    """SetSat of the W3C: minimum to 0, maximum to the saturation, the middle in proportion."""
    spread = _sat(c)
    return torch.where(spread > 0, (c - c.amin(-1, keepdim=True)) * wanted / spread.clamp_min(1e-12), 0)


MODES: dict[str, Blend] = {
    "normal": lambda b, s: s,
    "dissolve": lambda b, s: s,  # of its alpha `composite` makes a pattern of full and empty pixels
    # W3C, separable
    "multiply": lambda b, s: b * s,
    "screen": _screen,
    "overlay": lambda b, s: _hard_light(s, b),
    "darken": torch.minimum,
    "lighten": torch.maximum,
    "color-dodge": _color_dodge,
    "color-burn": _color_burn,
    "hard-light": _hard_light,
    "soft-light": _soft_light,
    "difference": lambda b, s: (b - s).abs(),
    "exclusion": lambda b, s: b + s - 2 * b * s,
    # W3C, not separable
    "hue": lambda b, s: _with_lum(_with_sat(s, _sat(b)), _lum(b)),
    "saturation": lambda b, s: _with_lum(_with_sat(b, _sat(s)), _lum(b)),
    "color": lambda b, s: _with_lum(s, _lum(b)),
    "luminosity": lambda b, s: _with_lum(b, _lum(s)),
    # Photoshop
    "linear-burn": lambda b, s: (b + s - 1).clamp_min(0),
    "linear-dodge": lambda b, s: (b + s).clamp_max(1),
    "vivid-light": _vivid_light,
    "linear-light": lambda b, s: (b + 2 * s - 1).clamp(0, 1),
    "pin-light": lambda b, s: torch.where(s <= 0.5, torch.minimum(b, 2 * s), torch.maximum(b, 2 * s - 1)),
    "hard-mix": _hard_mix,
    "subtract": lambda b, s: (b - s).clamp_min(0),
    "divide": _divide,
    "darker-color": lambda b, s: torch.where(_lum(s) < _lum(b), s, b),
    "lighter-color": lambda b, s: torch.where(_lum(s) > _lum(b), s, b),
    # GIMP
    "grain-extract": lambda b, s: (b - s + 0.5).clamp(0, 1),
    "grain-merge": lambda b, s: (b + s - 0.5).clamp(0, 1),
}


def to_linear(srgb: Tensor) -> Tensor:
    """IEC 61966-2-1, 0..1."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: Tensor) -> Tensor:
    """The inverse of `to_linear`."""
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(1e-12) ** (1 / 2.4) - 0.055)
