"""When a run looks for its blocks, what it keeps of them, and what the guard finds. The patcher on its own, no host needed."""

import json
import math

import pytest
import torch

from tessera.kernels import reference
from tessera.kernels.block_mask import BlockMask
from tessera.kernels.sparsity import TokenGrid, affordable, exact, get, prepare, sampled_error
from tessera.models.families import TokenSpans
from tessera.models.patchers import attention as patcher
from tessera.models.patchers import search
from tessera.models.patchers.attention import AttentionPatch, ModelCall
from tessera.models.patchers.report import HOST, SPARSE, summary
from tessera.models.patchers.search import GUARD_ROWS, Masks, guard_rows
from tessera.models.patchers.settings import AttentionSettings

SPANS = TokenSpans(4, 8, 8)  # 256 tokens
SHIFT = 5.0


def flow(percent):
    return SHIFT * (1 - percent) / (1 + (SHIFT - 1) * (1 - percent))


def schedule(steps):
    return [flow(step / steps) for step in range(steps + 1)]


def smooth(seed=0, batch=1, noise=0.3):
    """q, k, v of tokens that are alike where they are near: `(batch, 2, 256, 16)`."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(0, size / 4, size) for size in (4, 8, 8)), indexing="ij")
    place = torch.stack(axes, -1).view(-1, 3) @ torch.randn(batch, 2, 3, 16, generator=generator)
    q, k, v = ((2 * place + shift).sin() * 2 for shift in (0.0, 0.1, 0.7))
    return q, k, v + noise * torch.randn(v.shape, generator=generator)


def patch_of(**changes):
    base = dict(method="tessera", density=0.25, precision="native", min_tokens=0, start_percent=0.3, block=32)
    return AttentionPatch(AttentionSettings(**{**base, **changes}))


def step(patch, sigma, tensors, branch="cond", spans=SPANS, layers=1):
    """One model call whose layers all get these tensors; returns the outputs."""
    call = ModelCall(spans, sigma, branch)
    patch.begin(call)
    q, k, v = tensors
    outs = [patch.attend(call, q, k, v, lambda: reference.attention(q, k, v)[0].float(), lambda out: out) for _ in range(layers)]
    assert not patch.finish(call)
    return outs[0]


def run(patch, steps=10, at=None, sigmas=None, **keywords):
    """One sampling run; at: tensors of a step. Returns the outputs of its steps."""
    sigmas = sigmas or schedule(steps)
    patch.start(flow, sigmas)
    outs = [step(patch, sigma, (at or {}).get(number, smooth()), **keywords) for number, sigma in enumerate(sigmas[:-1])]
    return outs


def story(patch):
    """Of every call: "L" looked at, "D" dense, "S" sparse."""
    return "".join("S" if record.outcome == SPARSE else "L" if record.search else "D" for record in patch.report.records)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        (dict(), 10, "DDLSSSSSSS"),
        (dict(start_percent=0.0), 10, "LSSSSSSSSS"),  # no dense step: the first sparse one stays dense for it
        (dict(start_percent=0.0, search_every=4), 10, "LSSSLSSSSS"),  # a fifth look would serve one step only
        (dict(gentle_few_steps=True), 4, "LSSS"),
        (dict(gentle_few_steps=True), 3, "DSS"),  # does not pay
        (dict(end_percent=0.6), 10, "DDLSSSSDDD"),
        (dict(end_percent=0.4), 10, "DDDSSDDDDD"),  # two sparse steps
        (dict(density=1.0), 10, "DDDDDDDDDD"),
        (dict(dense_blocks=frozenset({0})), 10, "DDDDDDDDDD"),
        (dict(min_tokens=1000), 10, "DDDDDDDDDD"),
    ],
)
def test_when_a_run_looks(settings, steps, expected):
    patch = patch_of(**settings)
    run(patch, steps)
    assert story(patch) == expected


def test_a_step_that_was_skipped_is_made_up_for():
    """EasyCache and its like leave out model calls, also that of the last dense step."""
    patch = patch_of()
    sigmas = schedule(10)
    patch.start(flow, sigmas)
    for number in (0, 1, 4, 5, 7, 9):
        step(patch, sigmas[number], smooth())
    assert story(patch) == "DDLSSS"


def test_a_run_whose_levels_are_unknown_looks_in_its_first_sparse_step():
    patch = patch_of(start_percent=0.0)
    patch.start()
    for sigma in (0.9, 0.5, 0.1):
        step(patch, sigma, smooth())
    assert story(patch) == "LSS"


def test_a_resumed_run_looks_in_its_first_step():
    patch = patch_of()
    run(patch, sigmas=schedule(10)[5:])
    assert story(patch) == "LSSSS"


def test_noise_that_is_added_again_makes_masks_stale():
    patch = patch_of(start_percent=0.0)
    sigmas = schedule(10)
    patch.start(flow, sigmas)
    for number in (2, 3, 2, 3):
        step(patch, sigmas[number], smooth())
    assert story(patch) == "LSLS"


def test_a_run_too_short_to_look_chooses_by_means_and_says_so():
    patch = patch_of(error=0.05, density=0.3, start_percent=0.0)
    run(patch, 3)
    assert story(patch) == "SSS"
    report = patch.report.as_dict()
    assert report["density"] == pytest.approx(0.3, abs=0.01) and report["work"] > report["density"]
    assert "too few sparse steps to look exactly: blocks are chosen by their means" in summary(report)


def test_dense_steps_are_the_hosts_and_sparse_ones_are_near_them():
    patch, tensors = patch_of(), smooth()
    outs = run(patch)
    exact = reference.attention(*tensors)[0].float()
    for number, out in enumerate(outs):
        assert torch.equal(out, exact) == (number < 3)
    error = ((outs[-1] - exact).norm() / exact.norm()).item()
    assert 0.001 < error < 0.15
    shown = patch.report.as_dict()
    assert shown["error"] == pytest.approx(error, rel=0.35), "a few rows speak for all"
    assert len(shown["errors"]) == 7 and shown["errors"][0][:2] == [3, 0]


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1])
def test_an_error_is_asked_for_and_density_is_the_result(error):
    patch = patch_of(error=error)
    out, exact = run(patch)[-1], reference.attention(*smooth())[0]
    report = patch.report.as_dict()
    assert ((out - exact).norm() / exact.norm()).item() < 2 * error
    assert report["error"] == pytest.approx(((out - exact).norm() / exact.norm()).item(), rel=0.4)
    assert report["asked_error"] == error and f"asked {error:.0%}" in summary(report)
    assert report["density"] > {0.02: 0.4, 0.05: 0.25, 0.1: 0.12}[error]


def test_an_error_that_takes_nearly_all_pairs_runs_dense():
    patch = patch_of(error=1e-4)
    run(patch)
    assert story(patch) == "DDL" + "D" * 7
    assert "an error of 0.01% takes nearly all pairs (7)" in summary(patch.report.as_dict())


def test_every_kind_of_call_has_its_own_mask():
    patch, sigmas = patch_of(start_percent=0.0), schedule(10)
    patch.start(flow, sigmas)
    kinds = [
        (smooth(0), dict(branch=("cond", None))),
        (smooth(1), dict(branch=("uncond", None))),
        (smooth(1), dict(branch=("uncond", None))),  # a guidance pass with the same conditioning, later in the step
        (smooth(2), dict(branch=("cond", (0, 1)))),  # a context window
        (smooth(3, batch=2), dict(branch=("cond", None))),
        (smooth(4), dict(spans=TokenSpans(2, 16, 8))),
    ]
    for sigma in sigmas[:3]:
        for tensors, keywords in kinds:
            step(patch, sigma, tensors, layers=2, **keywords)
    assert story(patch) == "LL" * 6 + "SS" * 12
    assert len(patch.masks) == 12


def test_a_sample_of_a_batch_is_treated_as_alone():
    both = tuple(torch.cat(pair) for pair in zip(smooth(0), smooth(1), strict=True))
    for budget in (dict(), dict(error=0.05)):
        batch = run(patch_of(**budget), at=dict.fromkeys(range(10), both))
        alone = run(patch_of(**budget), at=dict.fromkeys(range(10), smooth(1)))
        torch.testing.assert_close(batch[-1][1:], alone[-1])


@pytest.mark.parametrize("budget", [dict(), dict(error=0.05)])
def test_a_run_does_not_depend_on_those_before_it(budget):
    others = dict.fromkeys(range(10), smooth(5))
    fresh = [run(patch_of(**budget)), run(patch_of(**budget), at=others)]
    patch = patch_of(**budget)
    for which in (0, 1, 1, 0, 1, 0):
        outs = run(patch, at=others if which else None)
        assert all(torch.equal(out, first) for out, first in zip(outs, fresh[which], strict=True))
    patch.start(flow, schedule(10))  # interrupted in the middle
    for sigma in schedule(10)[:5]:
        step(patch, sigma, smooth(6))
    assert torch.equal(run(patch)[-1], fresh[0][-1])


# the guard


def test_a_mask_that_no_longer_holds_is_looked_for_again():
    """From step 5 on the tokens are in another order: the error of the old mask is seen in that step, and the next one looks."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    others = tuple(x[:, :, order] for x in smooth())
    patch = patch_of(error=0.08)
    outs = run(patch, at=dict.fromkeys(range(5, 10), others))
    assert story(patch) == "DDLSSSLSSS"
    exact = reference.attention(*others)[0]
    before, after = ((outs[number] - exact).norm() / exact.norm() for number in (5, 7))
    assert before > 0.16 and after < 0.12


def test_predictions_learn_from_what_is_measured(monkeypatch):
    monkeypatch.setattr(search, "FACTOR", 4.0)
    patch = patch_of(density=0.3)
    out, exact = run(patch, 20)[-1], reference.attention(*smooth())[0]
    true = ((out - exact).norm() / exact.norm()).item()
    shown = [predicted for _, _, predicted, _ in patch.report.as_dict()["errors"]]
    assert shown[0] > 2 * true, "nothing to learn"
    assert abs(math.log(shown[-1] / true)) < 0.15


def test_sampled_rows_are_exact():
    q, k, v = smooth(batch=2)
    out = q + 0.1 * v
    rows = guard_rows(256, 3, q.device)
    bias = torch.randn(2, 256)
    exact = reference.attention(q, k, v, key_bias=bias, scale=0.3)[0][:, :, rows]
    expected = (out[:, :, rows] - exact).norm() / exact.norm()
    assert sampled_error(out, q, k, v, rows, bias, 0.3).item() == pytest.approx(expected.item(), rel=1e-5)
    few = k[:, :1], v[:, :1]
    exact = reference.attention(q, *few)[0][:, :, rows]
    assert sampled_error(out, q, *few, rows, None, None).item() == pytest.approx(((out[:, :, rows] - exact).norm() / exact.norm()).item(), rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 4096, 20_000, 75_600])
def test_the_guard_looks_at_few_rows_and_others_in_every_step(tokens):
    looks = [guard_rows(tokens, turn, torch.device("cpu")) for turn in range(3)]
    for rows in looks:
        assert rows.unique().numel() == len(rows) == min(tokens, max(GUARD_ROWS[0], min(GUARD_ROWS[1], tokens // 1024)))
        assert 0 <= rows.min() and rows.max() < tokens
        assert tokens < 100 or rows.max() - rows.min() > 0.7 * tokens, "spread over the sequence"
    assert tokens < 1000 or len(set(looks[0].tolist()) & set(looks[1].tolist())) < 8
    if tokens == 4096:
        assert (looks[0] % 64).unique().numel() > 16, "all over the picture, not in one column"


def test_scores_that_are_not_finite_keep_nothing():
    broken = tuple(x.clone() for x in smooth())
    broken[0][0, 0, 3] = torch.nan
    patch = patch_of()
    outs = run(patch, at={2: broken, 3: broken})
    assert story(patch) == "DDLLLSSSSS" and outs[-1].isfinite().all()
    assert patch.report.notes["non-finite scores at layer 0: they are looked at again at the next step"] == 2


def test_a_gpu_whose_kernel_does_not_work_chooses_by_means_and_says_so(monkeypatch):
    """Of a compiler or driver that fails the first call is told, not the user's run."""
    monkeypatch.setattr(exact.triton_backend, "runs_on", lambda device: device.type == "cuda")
    monkeypatch.setattr(exact, "_error_by_kernel", lambda tokens: 1 / 0)
    exact._kernel_works.cache_clear()
    assert not affordable(torch.device("cuda")) and affordable(torch.device("cpu"))
    exact._kernel_works.cache_clear()
    monkeypatch.setattr(patcher, "affordable", lambda device: False)
    patch = patch_of(start_percent=0.0)
    run(patch, 3)
    assert story(patch) == "SSS" and any("nothing can be looked at exactly" in note for note in patch.report.notes)


def test_an_output_of_zeros_has_no_error():
    q, k, v = smooth()
    patch = patch_of()
    run(patch, at=dict.fromkeys(range(10), (q, k, torch.zeros_like(v))))
    report = patch.report.as_dict()
    assert report["calls"][SPARSE] == 7 and report["error"] is None and report["errors"] == []
    json.dumps(report, allow_nan=False)


# what is kept


def test_bits_are_the_mask():
    dense = torch.rand(2, 3, 5, 37) < 0.3
    mask = BlockMask.from_dense(dense, 32, 8)
    bits = mask.to_bits(37)
    assert bits.dtype == torch.uint8 and bits.shape == (2, 3, 5, 5)
    assert bits[1, 2, 3, 4].item() == sum(1 << bit for bit in range(5) if dense[1, 2, 3, 32 + bit])
    again = BlockMask.from_bits(bits, 32, 8, 37, mask.indices.shape[-1])
    assert torch.equal(again.to_dense(37), dense) and torch.equal(again.counts, mask.counts)
    assert (again.block_m, again.block_n, again.key_blocks) == (32, 8, 37)


def test_masks_are_counted_and_freed():
    patch = patch_of()
    run(patch, layers=3)
    size = 3 * 1 * 2 * 8 * 32 // 8  # layers, batch, heads, query blocks, granules as bits
    assert len(patch.masks) == 3 and patch.report.as_dict()["mask_bytes"] == {"device": size, "host": 0}
    patch.release()
    assert len(patch.masks) == 0 and patch.report.as_dict()["mask_bytes"]["device"] == size


@pytest.mark.gpu
def test_masks_beyond_the_bound_wait_in_pinned_memory():
    device = torch.device("cuda")
    arrangement = prepare(get("tessera"), TokenGrid(4, 8, 8), device, block=32)
    dense = torch.rand(1, 2, 8, 32, device=device) < 0.3
    mask = BlockMask.from_dense(dense, 32, 8)
    masks = Masks(most_bytes=100)
    for layer in range(3):
        found = masks.put((layer, None, None, (1, 2, 256, 16)), mask, arrangement, 1)
        assert torch.equal(found.mask(device).to_dense(32), dense)
    assert masks.peak == {"device": 64, "host": 128}
    masks.put((0, None, None, (1, 2, 256, 16)), mask, arrangement, 2)
    assert masks.peak == {"device": 64, "host": 128}, "a mask that is found again takes the place of the old one"


def test_model_calls_that_looked_are_no_measure_of_speed():
    patch = patch_of()
    run(patch)
    for number, record in enumerate(patch.report.model_calls):
        record.end = record.start + (100.0 if number == 2 else 2.0 if number < 3 else 1.0)
    assert patch.report.as_dict()["speedup_per_model_call"] == pytest.approx(2.0)
    assert {record.outcome for record in patch.report.records[:3]} == {HOST}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(error=0.0), "error is 0.0; use a value above 0 and up to 1, such as 0.08"),
        (dict(error=1.5), "error is 1.5"),
        (dict(error=float("nan")), "error is nan"),
        (dict(error=0.1, method="sparge"), "error is 0.1, but sparge cannot predict one; use tessera, or give it a density"),
        (dict(search_every=-1), "search_every is -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        AttentionPatch(AttentionSettings(**{"method": "tessera", **changes}))


@pytest.mark.parametrize("method", ["sparge", "rainfusion2", "draft", "sparge_top_p"])
def test_any_method_can_have_the_tail(method):
    def error(**changes):
        patch = patch_of(method=method, start_percent=0.0, **changes)
        out, exact = run(patch)[-1], reference.attention(*smooth())[0]
        return ((out - exact).norm() / exact.norm()).item(), patch.report.as_dict()

    (plain, without), (pooled, with_tail) = error(), error(tail=True)
    assert pooled < 0.8 * plain
    assert without["work"] == without["density"] and with_tail["work"] > with_tail["density"]
