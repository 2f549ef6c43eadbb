"""The patcher on its own: which call goes where, and what the report says. No host needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tessera
from tessera.kernels import dispatch, reference
from tessera.kernels.sparsity import RECIPES
from tessera.models.families import TokenSpans
from tessera.models.families.qwen_image import QWEN_IMAGE
from tessera.models.patchers import attention as patcher
from tessera.models.patchers.attention import AttentionPatch, ModelCall, auto_block, percent_of
from tessera.models.patchers.report import summary
from tessera.models.patchers.settings import AttentionSettings

LAYOUT = TokenSpans(5, 8, 8)  # 320 tokens


def qkv(tokens=320, k_len=None, heads=2, head_dim=16, batch=1):
    return (torch.randn(batch, heads, n, head_dim) for n in (tokens, k_len or tokens, k_len or tokens))


def flow(shift=5.0):
    return lambda percent: shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def settings(**changes):
    return AttentionSettings(**{**dict(method="rainfusion2", density=0.5, precision="native", min_tokens=0, start_percent=0.0), **changes})


def attend(patch, call, q, k, v, **keywords):
    """(result, whether the host's attention ran)."""
    ran = []

    def dense():
        ran.append(True)
        return reference.attention(q, k, v)[0].to(q.dtype)

    return patch.attend(call, q, k, v, dense, lambda out: out, **keywords), bool(ran)


def run(patch, sigmas, layers=3, layout=LAYOUT, **keywords):
    patch.start(flow(), sigmas)
    for sigma in sigmas[:-1]:
        call = ModelCall(layout, sigma)
        patch.begin(call)
        for _ in range(layers):
            attend(patch, call, *qkv(), **keywords)
        assert not patch.finish(call)
    return patch.report.as_dict()


SIGMAS = [flow()(step / 10) for step in range(11)]


def test_schedule_by_percent_and_dense_blocks():
    report = run(AttentionPatch(settings(start_percent=0.25, end_percent=0.75, dense_blocks=frozenset({0}))), SIGMAS)
    # Steps 3..7 lie in 25 %..75 %; block 0 of each stays dense.
    expected = [[None, *([True] * 2)] if 3 <= step <= 7 else [None] * 3 for step in range(10)]
    sparse = [[True if density < 1 else None for density in row] for row in report["density_by_step_and_layer"]]
    assert sparse == expected
    assert report["calls"] == {"sparse": 10, "host": 20}
    assert report["reasons"] == {"outside the sparse steps": 15, "dense block": 5}
    assert report["sparse_share_in_window"] == 1.0
    assert report["overall_density"] == pytest.approx((10 * report["density"] + 20) / 30)


def test_density_1_is_the_hosts_own_result():
    q, k, v = qkv()
    patch = AttentionPatch(settings(density=1.0))
    patch.start(flow(), SIGMAS)
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    marker = torch.full((3,), 7.0)
    assert patch.attend(call, q, k, v, lambda: marker, lambda out: out) is marker
    assert patch.report.reasons == {"density 1": 1}


def test_cross_attention_is_no_self_attention_call():
    patch = AttentionPatch(settings())
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    _, host = attend(patch, call, *qkv(k_len=20))
    assert host
    report = patch.report.as_dict()
    assert report["reasons"] == {"cross-attention": 1}
    assert report["self_attention_calls"] == 0
    assert summary(report) == "rainfusion2: not accelerated, no self-attention call reached the patch: cross-attention (1)"


def test_calls_of_another_length_are_counted_and_named():
    """2 calls of the grid's length, the first in a dense block, and 40 that are a token longer: a family that moved its text."""
    patch = AttentionPatch(settings(dense_blocks=frozenset({0})))
    patch.start(flow(), SIGMAS)
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    hosts = [attend(patch, call, *qkv(tokens=tokens))[1] for tokens in (320, 320, *[321] * 40)]
    assert hosts == [True, False, *[True] * 40]
    report = patch.report.as_dict()
    assert report["self_attention_calls"] == 42
    assert report["calls"] == {"host": 41, "sparse": 1}
    assert report["reasons"] == {"dense block": 1, "another length than the video's": 40}
    assert report["sparse_share_in_window"] == 1 / 41
    assert [len(row) for row in report["density_by_step_and_layer"]] == [2]
    assert "1 of 42 self-attention calls sparse" in summary(report)
    assert summary(report).endswith(" · another length than the video's (40)")


ODD_SHAPES = {
    "3-D": dict(q=(1, 320, 32), k=(1, 320, 32), v=(1, 320, 32)),
    "4-D v among 3-D": dict(q=(1, 320, 32), k=(1, 320, 32), v=(1, 320, 2, 16)),
    "v of other head_dim": dict(q=(1, 2, 320, 16), k=(1, 2, 320, 16), v=(1, 2, 320, 8)),
    "k of other batch": dict(q=(2, 2, 320, 16), k=(1, 2, 320, 16), v=(1, 2, 320, 16)),
    "heads that do not divide": dict(q=(1, 3, 320, 16), k=(1, 2, 320, 16), v=(1, 2, 320, 16)),
    "five dimensions": dict(q=(1, 1, 2, 320, 16), k=(1, 1, 2, 320, 16), v=(1, 1, 2, 320, 16)),
    "no tokens": dict(q=(1, 2, 0, 16), k=(1, 2, 0, 16), v=(1, 2, 0, 16)),
}


@pytest.mark.parametrize("layout", [LAYOUT, None], ids=["family", "unknown"])
@pytest.mark.parametrize("shapes", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_shapes_that_are_not_understood_go_to_the_host(shapes, layout):
    patch = AttentionPatch(settings(method="sparge", precision="auto"))
    patch.start(flow(), SIGMAS)
    call = ModelCall(layout, 0.5)
    patch.begin(call)
    q, k, v = (torch.randn(shape) for shape in shapes.values())
    marker = torch.zeros(1)
    assert patch.attend(call, q, k, v, lambda: marker, lambda out: out) is marker
    assert not patch.finish(call)
    (reason,) = patch.report.reasons
    assert "expected" in reason or "do not fit" in reason


def test_operands_of_different_dtypes_go_to_the_host():
    patch = AttentionPatch(settings())
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    q, k, v = qkv()
    marker = torch.zeros(1)
    assert patch.attend(call, q, k, v.to(torch.bfloat16), lambda: marker, lambda out: out) is marker
    assert sum(patch.report.reasons.values()) == 1


def test_short_sequences_stay_with_the_host():
    patch = AttentionPatch(settings(min_tokens=12288))
    report = run(patch, SIGMAS)
    assert report["reasons"] == {"320 tokens, fewer than min_tokens 12288": 30}
    assert "0 of 30 self-attention calls sparse" in summary(report)


@pytest.mark.parametrize(("side", "layers", "reason"), [(1024, 1, "density 1"), (640, 6, "density 1"), (640, 5, "11220 tokens, fewer than")])
def test_layered_pictures_reach_the_default_of_min_tokens(side, layers, reason):
    """Qwen-Image-Layered samples its layers, the merged picture and the reference in one sequence, behind the text: here of 20 tokens."""
    latent = torch.empty(1, 16, 1, side // 8, side // 8, device="meta")
    layout = QWEN_IMAGE.spans(SimpleNamespace(patch_size=2), (1, 16, layers + 1, *latent.shape[3:]), {"ref_latents": [latent]})
    patch = AttentionPatch(AttentionSettings(density=1.0, precision="native"))  # density 1 is asked for where it is long enough
    patch.start(flow(), SIGMAS)
    call = ModelCall(layout, 0.5)
    patch.begin(call)
    q = torch.zeros(1, 1, (layers + 2) * (side // 16) ** 2 + 20, 1)
    patch.attend(call, q, q, q, lambda: q, lambda out: out)
    assert [found.startswith(reason) for found in patch.report.reasons] == [True]


def test_one_token():
    patch = AttentionPatch(settings())
    call = ModelCall(TokenSpans(1, 1, 1), 0.5)
    patch.begin(call)
    out, host = attend(patch, call, *qkv(tokens=1))
    assert host and out.shape == (1, 2, 1, 16)


@pytest.mark.parametrize("head_dim", [40, 256])
def test_unusual_head_dims_run(head_dim):
    patch = AttentionPatch(settings(density=0.5))
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    out, host = attend(patch, call, *qkv(head_dim=head_dim))
    assert not host and out.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2], ids="qkv")
def test_non_finite_input_is_repeated_dense_and_disabled(value, which):
    tensors = list(qkv())
    tensors[which][0, 0, 5, 3] = value
    patch = AttentionPatch(settings())
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    _, host = attend(patch, call, *tensors)
    assert not host
    assert patch.finish(call)
    again = patch.again(call)
    _, host = attend(patch, again, *tensors)
    assert host and not patch.finish(again)
    later = ModelCall(LAYOUT, 0.4)
    patch.begin(later)
    _, host = attend(patch, later, *tensors)
    assert host, "the layer is disabled at this precision for the rest of the run"
    report = patch.report.as_dict()
    assert report["repeated_model_calls"] == 1
    assert report["self_attention_calls"] == 2  # the struck call is not counted
    assert report["backends"] == {}
    assert "non-finite output at layer 0 (native)" in summary(report)


def test_runs_do_not_depend_on_earlier_runs():
    patch = AttentionPatch(settings())
    q, k, v = qkv()

    def once():
        patch.start(flow(), SIGMAS)
        call = ModelCall(LAYOUT, 0.5)
        patch.begin(call)
        return attend(patch, call, q, k, v)[0]

    first = once()
    patch._disabled.add((0, "native"))
    assert torch.equal(first, once())


def test_unknown_family_runs_sparge_and_says_so_otherwise():
    patch = AttentionPatch(settings(method="sparge"))
    assert run(patch, SIGMAS, layout=None)["sparse_share_in_window"] == 1.0
    report = run(AttentionPatch(settings(method="rainfusion2")), SIGMAS, layout=None)
    assert report["sparse_share_in_window"] == 0.0
    assert report["reasons"] == {"unknown model family: rainfusion2 needs the token grid, sparge does not": 30}


def test_few_step_models_are_treated_gently():
    sigmas = [flow()(step / 4) for step in range(5)]
    report = run(AttentionPatch(settings(density=0.2, start_percent=0.2, gentle_few_steps=True)), sigmas)
    assert report["asked_density"] == 0.5
    assert [row[0] < 1 for row in report["density_by_step_and_layer"]] == [False, True, True, True]
    assert any(note.startswith("4 steps") for note in report["notes"])


def test_half_of_a_split_schedule_is_not_a_few_step_model():
    """The low-noise half of 12 steps has 6 of its own."""
    sigmas = [flow()(step / 12) for step in range(6, 13)]
    report = run(AttentionPatch(settings(density=0.2, gentle_few_steps=True)), sigmas)
    assert report["asked_density"] == 0.2
    assert not report["notes"]


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_percent_of_inverts_the_schedule(percent):
    assert percent_of(flow()(percent), flow()) == pytest.approx(percent, abs=2e-3)


def test_unavailable_precision_is_a_counted_fallback():
    report = run(AttentionPatch(settings(precision="int8")), SIGMAS)
    assert report["calls"] == {"sparse": 30}
    assert report["backends"] == {"torch/native": 30}
    assert any(note.startswith("int8 is not available here, native precision used") for note in report["notes"])


def test_mask_refresh_reuses_masks_per_layer_and_branch(monkeypatch):
    made = []
    original = patcher.sparse_attention

    def counting(*arguments, mask, **keywords):
        made.append(mask is None)
        return original(*arguments, mask=mask, **keywords)

    monkeypatch.setattr(patcher, "sparse_attention", counting)
    patch = AttentionPatch(settings(mask_refresh=3))
    patch.start(flow(), SIGMAS)
    for sigma in SIGMAS[:6]:
        for branch in ("cond", "uncond"):
            call = ModelCall(LAYOUT, sigma, branch)
            patch.begin(call)
            for _ in range(2):
                attend(patch, call, *qkv())
    assert sum(made) == 2 * 2 * 2  # two refreshes, two branches, two layers
    assert len(made) == 24


@pytest.mark.parametrize("branches", [("a", "a"), (("a", (0, 1)), ("a", (1, 2)))], ids=["guidance passes", "context windows"])
def test_masks_are_not_shared_within_a_step(branches):
    """With one step there is nothing to reuse: a mask that serves several steps gives what a fresh one gives."""
    inputs = [tuple(qkv()) for _ in range(2)]

    def step(refresh):
        patch = AttentionPatch(settings(mask_refresh=refresh))
        patch.start(flow(), SIGMAS)
        outs = []
        for branch, tensors in zip(branches, inputs, strict=True):
            call = ModelCall(LAYOUT, 0.5, branch)
            patch.begin(call)
            outs.append(attend(patch, call, *tensors)[0])
        return outs

    for shared, fresh in zip(step(5), step(1), strict=True):
        assert torch.equal(shared, fresh)


def test_masks_are_chosen_anew_when_the_noise_rises_again():
    """Restart samplers and a second pass go back to a sigma that was there before."""
    patch = AttentionPatch(settings(mask_refresh=50))
    patch.start(flow(), SIGMAS)
    first, later = (tuple(qkv()) for _ in range(2))
    for sigma, tensors in ((0.9, first), (0.5, first)):
        call = ModelCall(LAYOUT, sigma)
        patch.begin(call)
        attend(patch, call, *tensors)
    call = ModelCall(LAYOUT, 0.9)
    patch.begin(call)
    out, _ = attend(patch, call, *later)
    fresh = AttentionPatch(settings())
    fresh.start(flow(), SIGMAS)
    call = ModelCall(LAYOUT, 0.9)
    fresh.begin(call)
    assert torch.equal(out, attend(fresh, call, *later)[0])


def test_masks_of_windows_that_are_gone_are_forgotten():
    patch = AttentionPatch(settings(mask_refresh=2))
    patch.start(flow(), SIGMAS)
    for number, sigma in enumerate(SIGMAS[:-1]):
        call = ModelCall(LAYOUT, sigma, ("cond", number))
        patch.begin(call)
        attend(patch, call, *qkv())
    assert len(patch.masks) == 2


def test_dense_quantized_where_the_gpu_has_it(monkeypatch):
    """With an INT8 backend that takes the call, short sequences run dense through it; at native precision the host keeps them."""
    calls = []

    def run_int8(q, k, v, block_mask, key_bias, scale, return_lse, tail=None):
        calls.append(block_mask)
        out, lse = reference.attention(q, k, v, block_mask=block_mask, key_bias=key_bias, scale=scale, tail=tail)
        return out.to(q.dtype), lse.float() if return_lse else None

    patcher.kernel.explain(dispatch.Problem(torch.device("cpu"), torch.float32, 1, 1, 1, 1, 16))  # fills the registry
    fake = dispatch.Implementation("fake", "int8", (), lambda: run_int8)
    monkeypatch.setattr(dispatch, "_implementations", [fake, *dispatch._implementations])
    report = run(AttentionPatch(settings(precision="auto", min_tokens=12288)), SIGMAS[:3])
    assert report["calls"] == {"dense quantized": 6}
    assert calls[-6:] == [None] * 6  # its self-test ran before
    assert run(AttentionPatch(settings(precision="native", min_tokens=12288)), SIGMAS[:3])["calls"] == {"host": 6}
    assert run(AttentionPatch(settings(precision="auto", min_tokens=12288)), SIGMAS[:3], quantize=False)["calls"] == {"host": 6}


def test_a_forced_backend_is_forced_in_a_patched_model_too():
    """One that takes no call leaves them to the host, with its reason; what was chosen under force is not kept beyond it."""
    patch = AttentionPatch(settings())
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    assert not attend(patch, call, *qkv())[1]
    with tessera.use_backend("sdpa/native"):
        assert attend(patch, call, *qkv())[1]
    assert not attend(patch, call, *qkv())[1]
    assert patch.report.backends == {"torch/native": 2}
    assert patch.report.reasons == {"sdpa/native: torch's scaled_dot_product_attention cannot skip blocks": 1}


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
def test_the_probe_asks_what_the_kernel_is_asked(monkeypatch, grad):
    """Kernels without gradients refuse a call that needs some: the probe must know, or the call raises inside the run."""

    def no_grad(problem):
        return "the kernels compute no gradients" if problem.requires_grad else None

    def run_int8(q, k, v, block_mask, key_bias, scale, return_lse, tail=None):
        out, lse = reference.attention(q, k, v, block_mask=block_mask, key_bias=key_bias, scale=scale, tail=tail)
        return out.to(q.dtype), lse.float() if return_lse else None

    patcher.kernel.explain(dispatch.Problem(torch.device("cpu"), torch.float32, 1, 1, 1, 1, 16))  # fills the registry
    fake = dispatch.Implementation("like-triton", "int8", (no_grad,), lambda: run_int8)
    monkeypatch.setattr(dispatch, "_implementations", [fake, *dispatch._implementations])
    patch = AttentionPatch(settings(precision="auto"))
    patch.start(flow(), SIGMAS)
    call = ModelCall(LAYOUT, 0.5)
    patch.begin(call)
    q, k, v = qkv()
    out, host = attend(patch, call, q.requires_grad_(grad), k, v)
    assert not host
    assert patch.report.backends == {"torch/native" if grad else "like-triton/int8": 1}
    if grad:
        out.sum().backward()
        assert q.grad is not None and q.grad.abs().sum() > 0
        assert patch.report.refusals == {"like-triton/int8": "the kernels compute no gradients", **patch.report.refusals}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="nosuch"), "method is 'nosuch'"),
        (dict(density=0.0), "density is 0.0"),
        (dict(density=1.5), "density is 1.5"),
        (dict(precision="fp8"), "precision is 'fp8'"),
        (dict(block=48), "block is 48"),
        (dict(start_percent=0.8, end_percent=0.2), "start_percent is 0.8"),
        (dict(mask_refresh=0), "mask_refresh is 0"),
        (dict(method_settings={"tau": 1.0}), "rainfusion2 has no setting tau"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionPatch(settings(**change))


@pytest.mark.parametrize(("tokens", "block"), [(75600, 128), (2048, 128), (2047, 64), (576, 32), (100, 16)])
def test_auto_block_leaves_sixteen_blocks(tokens, block):
    assert auto_block(tokens) == block


@pytest.mark.parametrize("method", [name for name, recipe in RECIPES.items() if not recipe.control])
def test_key_bias_hides_keys_in_every_method(method):
    """Keys behind a -inf bias must not matter: the result is that of other values there, also where blocks were looked for before."""
    q, k, v = qkv()
    bias = torch.zeros(1, 320)
    bias[:, 40:60] = float("-inf")
    changed = v.clone()
    changed[:, :, 40:60] = 100.0
    outs = []
    for values in (v, changed):
        patch = AttentionPatch(settings(method=method))
        for sigma in (0.6, 0.5):
            call = ModelCall(LAYOUT, sigma)
            patch.begin(call)
            out, host = attend(patch, call, q, k, values, key_bias=bias)
        assert not host
        outs.append(out)
    assert torch.equal(*outs)
