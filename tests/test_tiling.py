"""The tiling core: what comes out of patches is what would have come out of the whole, for every size, overlap and number of axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tessera.models.upscale.tiling import Progress, Tiling, jointly_modulated, overlapping, run_within_memory, stream, whole


@st.composite
def axes(draw, largest=300):
    size = draw(st.integers(1, largest))
    tile = draw(st.integers(2, 96))
    if draw(st.booleans()):
        return jointly_modulated(size, tile)
    overlap = draw(st.integers(0, tile // 2))
    return overlapping(size, tile, overlap, draw(st.integers(0, overlap // 2)))


@given(axis=axes(), scale=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_weights_sum_to_one_and_do_not_fall_at_the_border(axis, scale):
    total = torch.zeros(axis.size * scale, dtype=torch.float64)
    for span, weight in zip(axis.spans, axis.weights(scale), strict=True):
        assert weight.isfinite().all() and (weight >= 0).all()
        total[span.start * scale : span.stop * scale] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    first, last = (axis.weights(scale)[index] for index in (0, -1))
    if len(axis.spans) > 1:
        assert first[0] >= first[: len(first) // 2].amax() - 1e-6 and last[-1] >= last[len(last) // 2 :].amax() - 1e-6


@given(st.lists(axes(40), min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_identity_and_nearest_are_exact(parts, scale):
    tiling = Tiling(tuple(parts))
    x = torch.rand(2, *(axis.size for axis in parts))

    def nearest(part):
        for axis in range(1, part.ndim):
            part = part.repeat_interleave(scale, axis)
        return part

    torch.testing.assert_close(tiling.run(nearest, x, scale=[scale] * len(parts)), nearest(x), rtol=0, atol=1e-6)
    constant = torch.full_like(x, 0.7)
    torch.testing.assert_close(tiling.run(lambda part: part, constant), constant, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(17, 23), (1, 1), (64, 65), (480, 852), (4096, 2304)])
@pytest.mark.parametrize("share", [0, 0.25, 0.5])
def test_sizes(height, width, share):
    tiling = Tiling((overlapping(height, 256, int(256 * share)), overlapping(width, 256, int(256 * share))))
    x = torch.rand(1, height, width)
    torch.testing.assert_close(tiling.run(lambda part: part, x), x, rtol=0, atol=1e-6)


@given(height=st.integers(1, 90), width=st.integers(1, 90), radius=st.integers(1, 4), extra=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_local_operator_is_exact_with_its_reach_as_margin(height, width, radius, extra):
    kernel = torch.rand(1, 1, 2 * radius + 1, 2 * radius + 1) / (2 * radius + 1) ** 2
    overlap = 2 * radius + extra
    tiling = Tiling(tuple(overlapping(size, max(32, 2 * overlap), overlap, radius) for size in (height, width)))
    x = torch.rand(1, 1, height, width)

    def blur(part):
        return F.conv2d(part, kernel, padding=radius)

    torch.testing.assert_close(tiling.run(blur, x), blur(x), rtol=0, atol=2e-6)


def test_a_margin_is_needed():
    """The test of the test above: without it the seams show."""
    x = torch.rand(1, 1, 64, 64)
    tiling = Tiling((overlapping(64, 32, 8), overlapping(64, 32, 8)))

    def blur(part):
        return F.avg_pool2d(part, 5, 1, 2)

    assert (tiling.run(blur, x) - blur(x)).abs().amax() > 1e-2


def test_joint_modulation_has_auxiliary_patches_on_the_seams():
    axis = jointly_modulated(96, 32)
    assert [(span.start, span.stop) for span in axis.spans] == [(0, 32), (16, 48), (32, 64), (48, 80), (64, 96)]
    weights = axis.weights()
    auxiliary = weights[1]
    assert auxiliary.argmax() in (15, 16) and auxiliary[0] < 0.05 and auxiliary[-1] < 0.05
    assert (auxiliary[:16].diff() > 0).all() and (auxiliary[16:].diff() < 0).all()
    assert weights[0][0] == 1 and weights[-1][-1] == 1


def test_operators_may_change_the_channels():
    x = torch.rand(3, 50, 70)
    tiling = Tiling((overlapping(50, 32, 8), overlapping(70, 32, 8)))
    torch.testing.assert_close(tiling.run(lambda part: part.mean(0, keepdim=True), x), x.mean(0, keepdim=True), rtol=0, atol=1e-6)


class StopHereError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was():
    x = torch.rand(1, 100, 100)
    tiling = Tiling((overlapping(100, 32, 8), overlapping(100, 32, 8)))
    progress, calls = Progress(), []

    def operator(part):
        calls.append(1)
        return part

    def stop(progress, patch, canvas):
        if progress.done == 5:
            raise StopHereError

    with pytest.raises(StopHereError):
        tiling.run(operator, x, progress=progress, on_patch=stop)
    assert progress.done == 5
    torch.testing.assert_close(tiling.run(operator, x, progress=progress), x, rtol=0, atol=1e-6)
    assert len(calls) == progress.total == len(tiling.patches)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError])
def test_tiles_get_smaller_when_memory_runs_out(error):
    x = torch.rand(1, 300, 300)

    def operator(part):
        if part.shape[-1] > 100:
            raise error("no memory")
        return part

    def tiling(tile):
        return Tiling(tuple(overlapping(300, tile, tile // 8) for _ in range(2)))

    progress = Progress()
    torch.testing.assert_close(run_within_memory(operator, x, tiling, 256, progress=progress), x, rtol=0, atol=1e-6)
    assert [line.split()[1] for line in progress.steps_down] == ["256", "128"]
    with pytest.raises(error):
        run_within_memory(operator, x, tiling, 256, smallest=128)


@given(
    frames=st.integers(0, 60),
    window=st.integers(1, 16),
    share=st.floats(0, 0.9),
    margin=st.floats(0, 0.5),
    scale=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_streaming_is_identity_and_holds_two_windows(frames, window, share, margin, scale):
    overlap = int(share * window)
    held, most = 0, 0
    clip = torch.rand(max(frames, 1), 2, 3)[:frames]

    def source():
        nonlocal held, most
        for frame in clip:
            held += 1
            most = max(most, held)
            yield frame

    def operator(part):
        return part.repeat_interleave(scale, 0)

    out = []
    for frame in stream(operator, source(), window, overlap, scale=scale, margin=int(margin * overlap)):
        out.append(frame)
        held = min(held, 2 * window + frames - len(out) // scale)
    assert len(out) == frames * scale
    if frames:
        torch.testing.assert_close(torch.stack(out), operator(clip), rtol=0, atol=1e-6)


def test_streaming_reads_no_further_than_it_must():
    read = []

    def source():
        for index in range(1000):
            read.append(index)
            yield torch.full((1,), float(index))

    frames = stream(lambda part: part, source(), 8, 4)
    for index in range(200):
        assert next(frames).item() == pytest.approx(index)
        assert len(read) <= index + 2 * 8 + 4


def test_streaming_matches_the_same_windows_in_memory():
    """A temporal operator that sees its window: blending is that of an axis cut at the same places."""
    clip = torch.rand(4 * 6 + 8, 3)
    axis = overlapping(len(clip), 8, 2)
    assert [span.start for span in axis.spans] == [0, 6, 12, 18, 24]

    def operator(part):
        return part - part.mean(0, keepdim=True)

    in_memory = Tiling((axis,)).run(lambda part: operator(part.T).T, clip.T.contiguous()).T
    torch.testing.assert_close(torch.stack(list(stream(operator, clip, 8, 2))), in_memory, rtol=0, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="overlap < tile"):
        overlapping(100, 32, 32)
    with pytest.raises(ValueError, match="margin of at most half"):
        overlapping(100, 32, 8, 5)
    with pytest.raises(ValueError, match="window 4, overlap 4"):
        next(stream(lambda part: part, [torch.zeros(1)], 4, 4))
    tiling = Tiling((whole(10),))
    with pytest.raises(ValueError, match=r"the canvas is \(10,\)"):
        tiling.run(lambda part: part, torch.zeros(1, 11))
    with pytest.raises(ValueError, match="it should end in"):
        tiling.run(lambda part: part[..., 1:], torch.zeros(1, 10))


def test_memory_and_recomputation_are_known_before():
    tiling = Tiling((overlapping(1000, 256, 64), overlapping(1000, 256, 64)))
    assert tiling.recomputed == pytest.approx((len(tiling.axes[0].spans) * 256 / 1000) ** 2)
    assert tiling.memory(3, (2, 2)) >= 3 * 4 * 2000 * 2000
