"""Colours of an upscaled clip: against scikit-image's CIELAB where it is there, and against what each method promises."""

from __future__ import annotations

import pytest
import torch

from tessera.models.upscale import colour


@pytest.mark.parametrize("method", colour.METHODS)
def test_a_clip_with_its_own_colours_is_left_alone(method):
    clip = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(colour.match(clip, clip, method), clip, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_a_tint_is_taken_away(method):
    source = torch.rand(2, 3, 64, 64) * 0.5 + 0.2
    tinted = source * torch.tensor([0.9, 0.8, 1.0]).view(1, 3, 1, 1) + torch.tensor([0.05, 0.0, 0.02]).view(1, 3, 1, 1)
    mean = (-2, -1)
    assert (tinted.mean(mean) - source.mean(mean)).abs().amax() > 0.05
    assert (colour.match(tinted, source, method).mean(mean) - source.mean(mean)).abs().amax() < 0.01


def test_lab_leaves_lightness_alone():
    source, clip = torch.rand(1, 3, 32, 32) * 0.4 + 0.3, torch.rand(1, 3, 32, 32) * 0.4 + 0.3
    lightness = [colour.to_lab(x)[:, 0] for x in (colour.match(clip, source, "lab"), clip)]
    torch.testing.assert_close(*lightness, rtol=0, atol=0.5)


def test_wavelet_keeps_detail():
    checks = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float() * 0.2 + 0.4
    clip = checks.expand(1, 3, 64, 64)
    out = colour.match(clip, torch.full_like(clip, 0.3), "wavelet")
    assert out.std() == pytest.approx(float(clip.std()), rel=0.05)


def test_known_lab_values():
    """White, black and the sRGB primaries, from Lindbloom's calculator (D65)."""
    known = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18),
        (0, 0, 1): (32.30, 79.19, -107.86),
    }
    rgb = torch.tensor(list(known), dtype=torch.float64).view(-1, 3, 1, 1)
    torch.testing.assert_close(colour.to_lab(rgb).flatten(1), torch.tensor(list(known.values()), dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(colour.from_lab(colour.to_lab(rgb)), rgb, rtol=0, atol=1e-6)


def test_unknown_method():
    with pytest.raises(ValueError, match="colour is 'sepia'"):
        colour.match(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "sepia")
