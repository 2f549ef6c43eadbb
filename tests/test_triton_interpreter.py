"""The Triton kernels against float64, run on the CPU by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the one test of an ordinary run starts pytest again on this
file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tessera.kernels import dispatch, quantize, reference, selftest, triton_backend
from tessera.kernels.attention import attention
from tessera.kernels.block_mask import BlockMask, PooledTail, num_blocks
from tessera.kernels.sparsity import exact
from tessera.kernels.sparsity.tokens import Tokens
from tessera.kernels.triton_backend import IMPLEMENTATIONS, interpreting

pytest.importorskip("triton", reason="Triton is not installed")
inside = pytest.mark.skipif(not interpreting(), reason="test_in_the_interpreter runs it with TRITON_INTERPRET=1")

PRECISIONS = {"native": torch.float16, "bf16": torch.bfloat16, "fp16": torch.float32, "int8": torch.bfloat16}
"""The input dtype that each precision is tested with."""

TOLERANCE = {implementation.precision: implementation.tolerance for implementation in IMPLEMENTATIONS}


@pytest.mark.slow
@pytest.mark.skipif(interpreting(), reason="already inside")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> None:
    """Two defects of the interpreters of Triton 3.6 and 3.7, neither of them in the kernels under test.

    They multiply bfloat16 tiles as the raw 16-bit integers in which they hold them, and newer releases of numpy refuse
    their conversion of a loop bound, an array of one element, to a Python integer.
    """
    if not interpreting():
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def widened(handle):
        if handle.dtype != tl.bfloat16 or handle.data.dtype != numpy.uint16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def patch_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    interpreter._patch_lang_tensor = patch_index


def poisoned_view(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor of NaN, with odd strides."""
    batch, heads, tokens, head_dim = x.shape
    around = torch.full((batch, tokens + 3, heads + 1, head_dim + 5), float("nan"), dtype=x.dtype)
    view = around[:, 1 : tokens + 1, :heads, 2 : head_dim + 2].transpose(1, 2)
    view.copy_(x)
    return view


LAYOUTS = {
    "contiguous": lambda x: x,
    "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "poisoned": poisoned_view,
    "strided rows": lambda x: torch.stack((x, x), -1)[..., 0],
}


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, key_bias: Tensor | None, precision: str, tail: PooledTail | None = None) -> None:
    """Run the kernel and compare with float64, everywhere and in the rows that read nothing."""
    out, lse = attention(q, k, v, block_mask=mask, key_bias=key_bias, precision=precision, return_lse=True, tail=tail)
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert torch.isfinite(out).all()
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    magnitude = expected.abs().sum()
    # The last terms: one number alone may be rounded this far, and there may be only one.
    assert (out - expected).abs().sum() <= TOLERANCE[precision] * magnitude + 1e-3
    assert not lse[~empty].numel() or (lse - expected_lse)[~empty].abs().max() <= selftest.LSE_TOLERANCE


@inside
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_equals_float64(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    precision = draw(st.sampled_from(list(PRECISIONS)))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    q_len, k_len = draw(st.integers(1, 150)), draw(st.integers(1, 200))
    head_dim = draw(st.sampled_from([8, 40, 64, 72, 96, 128]))
    layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    dtype = PRECISIONS[precision]
    q = layout(torch.randn(batch, kv_heads * group, q_len, head_dim).to(dtype))
    k = layout((torch.randn(batch, kv_heads, k_len, head_dim) + 2 * torch.randn(1, kv_heads, 1, head_dim)).to(dtype))
    v = layout(torch.randn(batch, kv_heads, k_len, head_dim).to(dtype))
    mask = None
    tail = None
    blocks = draw(st.sampled_from([None, (16, 16), (32, 8), (64, 32), (128, 8), (128, 32), (32, 64), (128, 64), (128, 128), (256, 256)]))
    if blocks is not None:
        mask_batch, mask_heads = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads * group]))
        kept = torch.rand(mask_batch, mask_heads, num_blocks(q_len, blocks[0]), num_blocks(k_len, blocks[1])) < draw(st.sampled_from([0.0, 0.4, 1.0]))
        mask = BlockMask.from_dense(kept, *blocks)
        coarse = draw(st.sampled_from([None, 1, 2, 4, 5, 16]))
        tail = None if coarse is None else PooledTail(coarse)
    key_bias = None
    if draw(st.booleans()):
        key_bias = torch.randn(batch, k_len)
        key_bias[-1, : draw(st.integers(0, k_len))] = -torch.inf
    check(q, k, v, mask, key_bias, precision, tail)


@inside
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("head_dim", "blocks", "tail"),
    [
        *((64, (256, 128), None), (128, (64, 128), None), (128, (128, 64), None)),
        *((128, (128, 64), PooledTail(2)), (64, (128, 32), None), (64, (128, 32), PooledTail(4)), (72, (64, 8), PooledTail(8))),
    ],
)
def test_sparse_with_everything(precision: str, head_dim: int, blocks: tuple[int, int], tail: PooledTail | None, poisoned: None) -> None:
    """Batch 2, GQA, ragged ends, mask blocks longer than a tile and shorter, an empty mask row, hidden keys, and no memory read unwritten."""
    dtype = PRECISIONS[precision]
    q = poisoned_view(torch.randn(2, 4, 200, head_dim).to(dtype))
    k = poisoned_view((torch.randn(2, 2, 333, head_dim) + 4 * torch.randn(1, 2, 1, head_dim)).to(dtype))
    v = poisoned_view(torch.randn(2, 2, 333, head_dim).to(dtype))
    kept = torch.rand(2, 4, num_blocks(200, blocks[0]), num_blocks(333, blocks[1])) < 0.5
    kept[1, 2, -1] = False
    kept[1, 3, 0] = True
    key_bias = torch.randn(2, 333)
    key_bias[1, 50:170] = -torch.inf
    check(q, k, v, BlockMask.from_dense(kept, *blocks), key_bias, precision, tail)


@inside
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("granule", [8, 16, 32])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 16], ids="{} kept".format)
def test_granules_that_do_not_fill_a_tile(kept: int, granule: int, precision: str) -> None:
    """Whatever no row lists is enormous, the key behind the last in memory is NaN, and the last granule of the sequence has 3 keys."""
    k_len = 20 * granule + 3
    dtype = PRECISIONS[precision]
    q, k, v = (poisoned_view(torch.randn(1, 1, tokens, 64).to(dtype)) for tokens in (40, k_len, k_len))
    listed = torch.zeros(21, dtype=torch.bool)
    listed[torch.randperm(20)[: max(kept - 1, 0)]] = True
    listed[20] = kept > 0
    hidden = ~listed.repeat_interleave(granule)[:k_len]
    v[:, :, hidden] = 3e4
    if precision != "int8":  # it would spoil the scales of the others
        k[:, :, hidden] = 20 * q[:, :, :1]
    check(q, k, v, BlockMask.from_dense(listed.expand(1, 1, 2, 21).clone(), 32, granule), None, precision)


@inside
@pytest.mark.parametrize("coarse", [1, 2, 3, 4, 40, 500])
def test_the_list_of_a_tail_is_its_terms(coarse: int) -> None:
    """Rows of every length, an empty and a full one among them; more coarse blocks than are looked at at a time; shared masks."""
    from tessera.kernels.triton_backend.tail import list_tail

    for key_blocks, shape in ((37, (2, 3, 5)), (1100, (1, 1, 4))):
        kept = torch.rand(*shape, key_blocks) < torch.linspace(0.0, 1.01, shape[2])[:, None] ** 3
        mask, tail = BlockMask.from_dense(kept, 16, 8), PooledTail(coarse)
        indices, counts = list_tail(mask, tail, 8 * key_blocks - 5)
        terms = tail.terms(kept)
        assert indices.dtype == counts.dtype == torch.int32 and torch.equal(counts, terms.sum(-1, dtype=torch.int32))
        assert counts.max() <= indices.shape[-1] <= key_blocks
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        found = torch.zeros_like(terms, dtype=torch.int32).scatter_add_(-1, indices.masked_fill(~used, 0).long(), used.int())
        assert torch.equal(found, terms.int())


@inside
@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_the_keys_of_a_block_are_alike_a_tail_makes_it_dense_attention(precision: str) -> None:
    dtype = PRECISIONS[precision]
    q, k, v = torch.randn(2, 4, 70, 64).to(dtype), *(torch.randn(2, 2, 3, 64).to(dtype).repeat_interleave(32, 2) for _ in range(2))
    mask = BlockMask.from_dense(torch.rand(2, 4, 5, 12) < 0.3, 16, 8)
    out, lse = attention(q, k, v, block_mask=mask, tail=PooledTail(4), precision=precision, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v)
    assert (out - expected).abs().sum() <= TOLERANCE[precision] * expected.abs().sum()
    assert (lse - expected_lse).abs().max() <= selftest.LSE_TOLERANCE


@inside
def test_a_sample_with_every_key_hidden_gives_zeros() -> None:
    q, k, v = (torch.randn(2, 1, 20, 64).half() for _ in range(3))
    key_bias = torch.zeros(2, 20)
    key_bias[1] = -torch.inf
    check(q, k, v, None, key_bias, "native")
    check(q, k, v, None, key_bias, "int8")


LOW_BIASES = {
    "far below": lambda bias: bias - 1e6,
    "lowest": lambda bias: bias.new_full(bias.shape, -3e38),
    "lowest and hidden": lambda bias: torch.where(bias > 0, -3e38, -torch.inf),
    "some far below": lambda bias: torch.where(torch.arange(bias.shape[1]) < 64, bias - 1e6, bias),
    "some lowest": lambda bias: torch.where(torch.arange(bias.shape[1]) < 64, -3e38, bias),
    "high": lambda bias: bias + 1e6,
}


@inside
@pytest.mark.parametrize("precision", ["native", "int8"])
@pytest.mark.parametrize("low", LOW_BIASES)
def test_low_biases_lose_no_score(low: str, precision: str) -> None:
    """Of two samples, with and without a mask whose second row reads nothing but the first 64 keys."""
    dtype = PRECISIONS[precision]
    q, k, v = (torch.randn(2, 2, tokens, 64).to(dtype) for tokens in (40, 150, 150))
    key_bias = LOW_BIASES[low](torch.randn(2, 150))
    kept = torch.rand(1, 2, 2, 5) < 0.6
    kept[..., 1, :] = torch.tensor([True, True, False, False, False])
    mask = BlockMask.from_dense(kept, 32, 32)
    for given_mask in (None, mask, BlockMask.from_dense(kept.repeat_interleave(4, 3)[..., :19], 32, 8)):
        check(q, k, v, given_mask, key_bias, precision)
    if "lowest" not in low:  # beside which no float holds how many keys a pooled key stands for
        check(q, k, v, mask, key_bias, precision, PooledTail(2))


@inside
def test_low_scores_are_not_lost() -> None:
    """Every score of a row is below -5e6."""
    q = torch.full((1, 1, 20, 64), 1e4).bfloat16()
    k = -q + torch.randn(1, 1, 20, 64).bfloat16()
    v = torch.randn(1, 1, 20, 64).bfloat16()
    out, lse = attention(q, k, v, precision="native", return_lse=True)
    assert lse.isfinite().all() and (lse < -5e6).all() and out.abs().sum(-1).all()


@inside
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool])
def test_a_bias_of_any_dtype_is_float32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 40, 64).half() for _ in range(3))
    key_bias = torch.rand(1, 40) < 0.5 if dtype == torch.bool else torch.randn(1, 40).to(dtype)
    plain = torch.zeros(1, 40).masked_fill(~key_bias, -torch.inf) if dtype == torch.bool else key_bias.float()
    for precision in ("native", "int8"):
        assert torch.equal(attention(q, k, v, key_bias=key_bias, precision=precision), attention(q, k, v, key_bias=plain, precision=precision))


@inside
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_sparse_call_that_ran_dense_would_show(precision: str, return_lse: bool) -> None:
    """Keys and values that no row keeps are enormous: whoever reads them has nothing else in its result."""
    q, k, v = (torch.randn(1, 2, 128, 64).to(PRECISIONS[precision]) for _ in range(3))
    kept = torch.rand(1, 2, 4, 4) < 0.6
    kept[..., 2] = False
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, 32, 32)
    k[:, :, 64:96] = 20 * q[:, :, :32]
    v[:, :, 64:96] = 3e4
    expected, _ = reference.attention(q, k, v, block_mask=mask)
    found = attention(q, k, v, block_mask=mask, precision=precision, return_lse=return_lse)
    out = found[0] if return_lse else found
    assert (out - expected).abs().max() < (0.5 if precision == "int8" else 0.02)
    assert attention(q, k, v, precision=precision).abs().max() > 1e3, "dense, it shows"


@inside
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_int8_call_that_ran_native_would_show(sparse: bool, with_bias: bool) -> None:
    """The result is attention over the rounded q and k, not over q and k: three times nearer to the one than to the other."""
    q, k, v = (torch.randn(1, 2, tokens, 64).half() for tokens in (70, 150, 150))
    scale = 1.0
    mean = quantize.key_mean(k)
    (q8, q_scale), (k8, k_scale) = quantize.quantize_q(q, scale), quantize.quantize_k(k, mean)
    rounded_q = q8 * q_scale[..., None] / quantize.LOG2E / scale
    rounded_k = k8 * k_scale.repeat_interleave(quantize.K_BLOCK, 2)[:, :, :150, None] + mean[:, :, None]
    mask = BlockMask.from_dense(torch.rand(1, 2, 3, 5) < 0.7, 32, 32) if sparse else None
    bias = torch.randn(1, 150) if with_bias else None
    quantized, _ = reference.attention(rounded_q, rounded_k, v, block_mask=mask, key_bias=bias, scale=scale)
    exact, _ = reference.attention(q, k, v, block_mask=mask, key_bias=bias, scale=scale)
    out = attention(q, k, v, block_mask=mask, key_bias=bias, precision="int8", scale=scale)
    assert 3 * (out - quantized).norm() < (out - exact).norm()
    native = attention(q, k, v, block_mask=mask, key_bias=bias, precision="native", scale=scale)
    assert 3 * (native - exact).norm() < (native - quantized).norm(), "native, it shows"


@inside
def test_constant_keys_and_zero_queries() -> None:
    """Keys that equal their mean and queries of zero leave INT8 nothing to quantize."""
    q, k = torch.zeros(1, 1, 70, 64).half(), torch.ones(1, 1, 70, 64).half()
    check(q, k, torch.randn(1, 1, 70, 64).half(), None, None, "int8")


@inside
@pytest.mark.parametrize("precision", ["native", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_not_hidden(precision: str, bad: float) -> None:
    for name in ("q", "k", "v"):
        tensors = {other: torch.randn(1, 1, 40, 64).half() for other in ("q", "k", "v")}
        tensors[name][0, 0, 3, 5] = bad
        assert not torch.isfinite(attention(**tensors, precision=precision)).all(), name


@inside
def test_large_values_do_not_overflow() -> None:
    """bfloat16 has float32's range. v beyond float16's must come out whole: nothing may pass through float16."""
    q, k = (torch.randn(1, 1, 40, 64).bfloat16() for _ in range(2))
    v = 1e6 * torch.randn(1, 1, 40, 64).bfloat16()
    for precision in ("native", "bf16", "int8"):
        check(q, k, v, None, None, precision)
    check(q.float(), k.float(), v.float(), None, None, "int8")


@inside
def test_output_keeps_the_layout_of_q() -> None:
    q, k, v = (LAYOUTS["token-major"](torch.randn(2, 3, 20, 64).half()) for _ in range(3))
    assert attention(q, k, v, precision="native").transpose(1, 2).is_contiguous()
    assert attention(q.contiguous(), k, v, precision="native").is_contiguous()


@inside
def test_scale_must_be_positive() -> None:
    q = torch.randn(1, 1, 16, 64).half()
    with pytest.raises(ValueError, match="positive"):
        attention(q, q, q, precision="native", scale=-1.0)


@inside
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda implementation: implementation.name)
def test_self_test_passes(implementation: dispatch.Implementation) -> None:
    assert selftest.failure(implementation, torch.device("cpu")) is None


@inside
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_quantization_kernels_equal_plain_torch(head_dim: int) -> None:
    from tessera.kernels.triton_backend import quantize as kernels

    q = poisoned_view(torch.randn(2, 4, 70, head_dim))
    k = poisoned_view(torch.randn(2, 2, 150, head_dim) + 5)
    scale = head_dim**-0.5
    mean = quantize.key_mean(k)
    q8, q_scale, lse_shift = kernels.quantize_q(q, scale, mean)
    k8, k_scale = kernels.quantize_k(k, mean)
    for (numbers, scales), (expected, expected_scales) in (
        ((q8, q_scale), quantize.quantize_q(q, scale)),
        ((k8, k_scale), quantize.quantize_k(k, mean)),
    ):
        torch.testing.assert_close(scales, expected_scales)
        assert (numbers[..., :head_dim].int() - expected.int()).abs().max() <= 1
        assert (numbers[..., :head_dim] == expected).float().mean() > 0.999
        assert not numbers[..., head_dim:].any()
    torch.testing.assert_close(lse_shift, scale * (q * mean.repeat_interleave(2, 1)[:, :, None]).sum(-1))


@inside
@pytest.mark.parametrize(("tokens", "block", "granule", "head_dim"), [(70, 16, 8, 40), (100, 64, 32, 128), (130, 64, 64, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_of_the_tail_are_those_of_plain_torch(tokens: int, block: int, granule: int, head_dim: int, dtype: torch.dtype, poisoned: None) -> None:
    """GQA, ragged ends, hidden and weighed keys, rows that only fill a block; what torch computes is held against float64 in test_tail_error.py."""
    q = torch.randn(2, 4, tokens, head_dim).to(dtype)
    k, v = torch.randn(2, 2, 2, tokens, head_dim).to(dtype)
    bias = torch.randn(2, tokens)
    bias[1, 5:40] = -torch.inf
    shown = (torch.arange(tokens) % 7 != 3).float()
    call = Tokens(q, k, v, shown.log()[None], bias, block, granule, head_dim**-0.5)
    assert triton_backend.runs_on(q.device)
    found = exact.error(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_kernel_works", lambda device: False)
        expected = exact.error(call)
    for costs, right in zip(found, expected, strict=True):
        assert costs.shape == right.shape and ((costs - right).norm() / right.norm()).item() < (2e-2 if dtype != torch.float16 else 2e-3)
