"""Pictures through a network patch by patch: sizes, alpha, constant pictures, and the figures of Upscale Report."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from tessera.models.upscale import catanet, metrics
from tessera.models.upscale.pictures import NAMED, Network, guided_alpha, passes, plan, target_size, upscale
from tessera.models.upscale.tiling import Tiling, overlapping


def bicubic(scale: int) -> Network:
    return Network(lambda x: F.interpolate(x, scale_factor=scale, mode="bicubic"), scale)


@pytest.mark.parametrize(
    ("size", "wanted", "expected"),
    [
        ((640, 360), {"factor": 2}, (1280, 720)),
        ((641, 359), {"factor": 1.5}, (962, 538)),
        ((640, 360), {"name": "4K UHD 3840 x 2160"}, (3840, 2160)),
        ((360, 640), {"name": "4K UHD 3840 x 2160"}, (2160, 3840)),
        ((1000, 1000), {"name": "4K UHD 3840 x 2160"}, (2160, 2160)),
        ((1000, 500), {"megapixels": 2}, (2000, 1000)),
        ((1, 1), {"factor": 0.1}, (1, 1)),
    ],
)
def test_target_size(size, wanted, expected):
    assert target_size(*size, **wanted) == expected


@pytest.mark.parametrize("wanted", [{"factor": 0}, {"factor": float("nan")}, {"factor": 1000}, {"megapixels": -1}, {"name": "5K"}, {}])
def test_target_sizes_that_make_no_sense(wanted):
    with pytest.raises(ValueError, match=r"factor is|megapixels is|named size is"):
        target_size(100, 100, **wanted)


def test_passes():
    assert passes(100, 100, (200, 200), 2) == 1
    assert passes(100, 100, (250, 250), 2) == 2
    assert passes(100, 100, (50, 50), 4) == 0
    assert passes(100, 100, (100, 100), 4) == 0
    assert passes(10, 10, (6400, 6400), 2) == 3
    assert passes(10, 10, (20, 20), 1) == 0


@given(height=st.integers(1, 120), width=st.integers(1, 120), channels=st.sampled_from([1, 3, 4]), factor=st.floats(0.3, 5), value=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_constant_picture_stays_one_up_to_the_border(height, width, channels, factor, value):
    size = target_size(width, height, factor=factor)
    out = upscale(torch.full((channels, height, width), value), bicubic(2), size, tile=64, overlap=16)
    assert out.shape == (channels, size[1], size[0]) and out.dtype == torch.float32
    assert (out - value).abs().amax() <= 1e-4


@pytest.mark.parametrize("size", [(17, 23), (100, 333)])
def test_patches_equal_the_whole(size):
    """Bicubic reaches two pixels: the margin of an overlap of 32 is more."""
    picture = torch.rand(3, *size)
    whole = F.interpolate(picture[None], scale_factor=2, mode="bicubic")[0].clamp(0, 1)
    torch.testing.assert_close(upscale(picture, bicubic(2), (size[1] * 2, size[0] * 2), tile=64, overlap=32), whole, rtol=0, atol=2e-6)


@given(height=st.integers(1, 70), width=st.integers(1, 70), minimum=st.integers(1, 40), multiple=st.sampled_from([1, 4, 16]))
@settings(max_examples=60, deadline=None)
def test_networks_get_sizes_that_they_take(height, width, minimum, multiple):
    seen = []

    def function(x):
        seen.append(x.shape[-2:])
        return x.repeat_interleave(3, -1).repeat_interleave(3, -2)

    x = torch.rand(1, 3, height, width)
    out = Network(function, 3, minimum, multiple)(x)
    assert torch.equal(out, x.repeat_interleave(3, -1).repeat_interleave(3, -2))
    assert all(side >= minimum and side % multiple == 0 for side in seen[0])


def test_alpha_follows_the_edges_of_the_colours():
    """A disc cut out with the same edge in colour and alpha: guided, alpha is nearer to the true one than bicubic is."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    disc = ((y - 120) ** 2 + (x - 130) ** 2 < 80**2).float()
    large = torch.cat([disc[None] * torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1) + 0.05, disc[None]])
    small = F.avg_pool2d(large[None], 4)[0]
    sharp = Network(lambda part: large[None, :3], 4)  # a perfect network
    out = upscale(small, sharp, (256, 256), tile=64)
    plain = F.interpolate(small[None, 3:], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    assert (out[3] - disc).abs().mean() < 0.5 * (plain[0] - disc).abs().mean()
    assert torch.equal(out[3][:20], torch.zeros(20, 256)) and (out[3][110:130, 120:140] == 1).all()


def test_alpha_without_edges_is_untouched():
    alpha = torch.full((1, 25, 30), 0.25)
    assert torch.equal(guided_alpha(alpha, torch.rand(3, 25, 30), torch.rand(3, 50, 60)), torch.full((1, 50, 60), 0.25))


def test_sixteen_bits_survive():
    ramp = torch.linspace(0, 1, 4096).expand(3, 8, -1)
    out = upscale(ramp, Network(lambda x: x, 1), (4096, 8), tile=512)
    assert len(out[0, 0].unique()) == 4096


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64, 77, 96, 256, 512]), st.floats(0, 0.5))
def test_patches_are_few_and_no_larger_than_needed(height, width, tile, share):
    """Never more of them, nor more area, than patches of the full size; and the overlap that was asked for."""
    overlap = int(tile * share)
    cut = plan(height, width, tile, overlap)
    full = Tiling(tuple(overlapping(side, tile, overlap, overlap // 4) for side in (height, width)))
    assert len(cut.patches) <= len(full.patches) and cut.recomputed <= full.recomputed + 1e-9
    for axis in cut.axes:
        assert axis.tile <= tile
        assert all(left.stop - right.start >= overlap for left, right in itertools.pairwise(axis.spans))


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="2 channels"):
        upscale(torch.zeros(2, 8, 8), bicubic(2), (16, 16))


def test_seam_excess():
    torch.manual_seed(1)
    picture = F.avg_pool2d(torch.rand(1, 3, 404, 404), 5, 1)[0]
    cut = plan(200, 200, 64, 16)
    assert metrics.seam_excess(picture, cut, 2) == pytest.approx(1, abs=0.1)
    assert metrics.seam_excess(picture, cut, 2, picture) == 1
    seams = picture.clone()
    for axis in (0, 1):
        for span in cut.axes[axis].spans[1:]:
            seams.select(axis + 1, span.start * 2).add_(0.2)
    assert metrics.seam_excess(seams, cut, 2) > 1.5 and metrics.seam_excess(seams, cut, 2, picture) > 1.5
    assert metrics.seam_excess(picture, plan(64, 64, 64, 16), 2) == 1


def drawn(height: int, width: int) -> torch.Tensor:
    """Waves of many lengths and directions, and discs with hard edges."""
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    waves = sum(torch.sin(torch.randn(()) * x / 4 + torch.randn(()) * y / 4 + 6.3 * torch.rand(3, 1, 1)) / (1 + index % 6) for index in range(24))
    out = waves / waves.abs().max() * 0.4 + 0.5
    for _ in range(8):
        centre, radius = torch.rand(2) * torch.tensor([width, height]), 5 + 20 * torch.rand(())
        out = torch.where((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2, torch.rand(3, 1, 1), out)
    return out


@pytest.mark.parametrize(("tile", "overlap"), [(96, 32), (64, 24)])
def test_a_network_in_patches_has_no_seams(root, tile, overlap):
    """The built-in CATANet, which groups tokens over the whole patch: tiled against untiled."""
    network = Network(catanet.build(load_file(root / "models/upscale/upscale_models/tessera_catanet_x2.safetensors")), 2, catanet.MIN_SIDE)
    picture = drawn(118, 150)
    with torch.inference_mode():
        whole = network(picture[None])[0].clamp(0, 1)
        tiled = upscale(picture, network, (300, 236), tile=tile, overlap=overlap)
    assert metrics.seam_excess(tiled, plan(118, 150, tile, overlap), 2, whole) == pytest.approx(1, abs=0.02)
    assert (tiled - whole).abs().max() <= 2 / 255


def test_flicker_and_distances():
    still = torch.rand(1, 3, 20, 20).expand(5, -1, -1, -1)
    assert metrics.flicker(still) == 0 and metrics.flicker(still[:2]) == 0
    ramp = torch.arange(5.0).view(5, 1, 1, 1) * 0.1 * torch.ones(5, 3, 4, 4)
    assert metrics.flicker(ramp) == pytest.approx(0, abs=1e-6)
    assert metrics.flicker(torch.rand(5, 3, 20, 20)) > 0.3
    x = torch.rand(3, 40, 40)
    assert metrics.psnr(x, x) == pytest.approx(120) and metrics.psnr(x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert metrics.ssim(x, x) == pytest.approx(1)


def test_ssim_is_that_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    x, y = torch.rand(3, 50, 60), torch.rand(3, 50, 60) * 0.5 + 0.2
    expected = skimage.structural_similarity(
        x.numpy(), y.numpy(), channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    assert metrics.ssim(x, y) == pytest.approx(expected[:, 5:-5, 5:-5].mean(), abs=1e-4)


def test_named_sizes_are_what_they_say():
    for name, size in NAMED.items():
        assert name.endswith(f"{size[0]} x {size[1]}")
