"""The arithmetic of bench/quality.py and bench/heads.py: what its tables say of calls and clips whose answer is known."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from tessera.kernels.block_mask import BlockMask
from tessera.kernels.sparsity import RECIPES, TokenGrid, choose, prepare

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The modules quality, heads and chart, as a script in their folder sees them."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("quality", "heads", "chart")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def row(method, off, of, **more):
    return dict(method=method, asked=0.3, density=0.3, work=0.3, off=off, of=of, recall=0.5, predicted=None, choosing=0.1) | more


def test_an_error_is_a_mean_over_heads_or_of_all_heads_as_one(bench):
    _, heads, _ = bench
    rows = [row("a", [1.0, 16.0], [100.0, 16.0]), row("a", [4.0], [4.0], predicted=0.5), row("b", [0.0], [1.0])]
    first, second = heads.summarise(rows)
    assert first["error"] == pytest.approx((0.1 + 1.0 + 1.0) / 3)
    assert first["pooled_error"] == pytest.approx(math.sqrt(21 / 120))
    assert first["ratio"] == pytest.approx([2.0, 2.0, 2.0])  # measured 1, predicted 0.5
    assert second["error"] == 0.0 and second["ratio"] is None


def test_the_recall_is_the_attention_in_kept_blocks(bench):
    _, heads, _ = bench
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 40, 8, dtype=torch.float64)
    kept = torch.rand(1, 2, 5, 3) < 0.5
    mask = BlockMask.from_dense(kept, 8, 16)
    p = (q @ k.mT / math.sqrt(8)).softmax(-1)
    expected = (p * mask.token_mask(40, 40)[0]).sum() / p.sum()
    assert heads.recall(heads.block_mass(q, k, 8, 4), mask, 4) == pytest.approx(expected.item())


@pytest.mark.parametrize("name", ["draft", "rainfusion2"])
def test_a_density_counts_what_is_kept_anyway(bench, name):
    _, heads, _ = bench
    grid = TokenGrid(8, 8, 8)
    arrangement = prepare(RECIPES[name], grid, torch.device("cpu"), block=16)
    q, k, v = torch.randn(3, 1, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    anyway = arrangement.forced.pairs.float().mean().item()
    for density in (0.9, 0.4, 0.01):
        mask, _ = choose(RECIPES[name], arrangement, q, k, v, density=heads.asked(density, arrangement))
        assert mask.density(512).item() == pytest.approx(max(density, anyway), abs=0.01)


def test_every_recipe_is_in_the_table_with_and_without_a_tail(bench):
    _, heads, _ = bench
    tails = {name for name, recipe in heads.methods().items() if recipe.compensate == "pooled_tail"}
    for name in RECIPES:
        assert name in heads.methods() and ({name, f"{name}+tail"} & tails)


def test_planted_heads_look_where_they_are_made_to(bench, monkeypatch):
    """Of the attention that a query gives, most is at its own place, in its own frame or in its object: far more than a share of the keys."""
    _, heads, _ = bench
    monkeypatch.setattr(heads, "GRID", TokenGrid(5, 8, 12))
    layer = heads.planted(1)
    again = heads.planted(1)
    assert all(torch.equal(one, other) for one, other in zip(layer.now, again.now, strict=True))
    q, k, _ = (dict(zip(heads.KINDS, x[0], strict=True)) for x in layer.now)
    frame, place = torch.arange(480) // 96, torch.arange(480) % 96
    for kind, where in (("frame", frame), ("tube", place)):
        p = (q[kind] @ k[kind].mT / math.sqrt(128)).softmax(-1)
        same = where[:, None] == where
        assert (p * same).sum() / p.sum() > 2 * same.float().mean()
    moved = (layer.earlier[0] - layer.now[0]).norm() / layer.now[0].norm()
    assert 0.03 < moved < 0.3


def test_clips_are_compared_frame_by_frame(bench, tmp_path):
    quality, _, _ = bench
    base = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy()
    run = base.copy()
    run[1] = np.clip(run[1] + 0.1, 0, None)
    for name, clip in (("run", run), ("base", base)):
        np.save(tmp_path / f"{name}.npy", clip)
    found = quality.compared(tmp_path / "run.npy", tmp_path / "base.npy")
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.01 / 3), abs=1e-3)
    one = structural_similarity(run[1], base[1], channel_axis=-1, data_range=1.0, gaussian_weights=True, use_sample_covariance=False)
    assert found["ssim"] == pytest.approx((2 + one) / 3, abs=1e-6) and one < 0.999
    assert not (tmp_path / "run.npy").exists() and (tmp_path / "base.npy").exists()


def test_a_table_of_clips_has_means_and_the_worst(bench, tmp_path):
    quality, _, chart = bench
    same = dict(density=0.3, work=0.35, window_work=0.4, overall_work=0.5, searches=3, latent_error=0.1, sparse_share=1.0)
    rows = [dict(method="a", mode=0.3, psnr=psnr, ssim=ssim, **same) for psnr, ssim in ((30.0, 0.9), (34.0, 0.8))]
    rows.append(dict(method="a+tail", mode=0.25, psnr=35.0, ssim=0.95, **same))
    table = quality.summarise(rows)
    assert table[0] == dict(method="a", mode=0.3, runs=2, psnr=32.0, psnr_min=30.0, ssim=pytest.approx(0.85), ssim_min=0.8) | same
    chart.draw(table, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.size == (chart.WIDTH, chart.HEIGHT)


def test_a_spelling_with_a_tail_is_a_setting(bench):
    quality, _, _ = bench
    assert quality.spelled("sparge+tail") == {"method": "sparge", "tail": True}
    assert quality.spelled("sparge") == {"method": "sparge"}
