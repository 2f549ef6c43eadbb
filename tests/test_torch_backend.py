"""The torch backend against torch's own attention in float64 with a mask a token, and against the float64 oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels import dispatch, reference
from tessera.kernels.attention import attention, describe, explain
from tessera.kernels.block_mask import BlockMask, PooledTail, num_blocks
from tessera.kernels.torch_backend import block_sparse, dense

quick = settings(deadline=None, max_examples=60)


def tensors(batch=1, heads=2, kv_heads=None, q_len=100, k_len=100, head_dim=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, head_dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads or heads, k_len, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_mask(q, k, block_m, block_n, density=0.4, batch=None, heads=None, seed=0):
    shape = (batch or q.shape[0], heads or q.shape[1], num_blocks(q.shape[2], block_m), num_blocks(k.shape[2], block_n))
    return BlockMask.from_dense(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density, block_m, block_n)


def check(q, k, v, mask=None, key_bias=None, scale=0.2, atol=1e-5, tail=None, lse_atol=1e-4):
    """Both ways through the backend, with and without lse, against the oracle."""
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=key_bias, scale=scale, tail=tail)
    run = dense.run if mask is None else block_sparse.run
    more = () if tail is None else (tail,)
    out, nothing = run(q, k, v, mask, key_bias, scale, False, *more)
    again, lse = run(q, k, v, mask, key_bias, scale, True, *more)
    assert nothing is None and out.dtype == again.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(again.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=lse_atol, rtol=1e-6)


@quick
@given(
    st.integers(0, 999),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([(16, 16), (32, 16), (16, 64), (128, 128)]),
    st.sampled_from([3, 16, 40]),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape(seed, batch, heads, q_len, k_len, blocks, head_dim, with_bias, density, broadcast):
    q, k, v = tensors(batch, *heads, q_len, k_len, head_dim, seed)
    mask = random_mask(q, k, *blocks, density, 1 if broadcast[0] else None, 1 if broadcast[1] else None, seed)
    bias = torch.randn(batch, k_len) if with_bias else None
    check(q, k, v, mask, bias)
    check(q, k, v, None, bias)


@quick
@given(
    st.integers(0, 999),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([(16, 16), (32, 8), (16, 64), (128, 16), (32, 5)]),
    st.integers(1, 5),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.tuples(st.booleans(), st.booleans()),
)
def test_a_tail_of_any_shape(seed, batch, heads, q_len, k_len, blocks, coarse, hidden, density, broadcast):
    """hidden: the share of the keys that the bias hides, the others it weighs; None: no bias."""
    q, k, v = tensors(batch, *heads, q_len, k_len, 16, seed)
    mask = random_mask(q, k, *blocks, density, 1 if broadcast[0] else None, 1 if broadcast[1] else None, seed)
    bias = None
    if hidden is not None:
        bias = torch.randn(batch, k_len).masked_fill(torch.rand(batch, k_len, generator=torch.Generator().manual_seed(seed)) < hidden, -math.inf)
    check(q, k, v, mask, bias, tail=PooledTail(coarse))


def test_where_the_keys_of_a_block_are_alike_a_tail_makes_it_dense_attention():
    q, k, v = tensors(2, 4, 2, 70, 96, 16)
    k, v = (x[:, :, ::32].repeat_interleave(32, 2) for x in (k, v))
    for coarse in (1, 2, 4):
        out, lse = attention(q, k, v, block_mask=random_mask(q, k, 16, 8, 0.3), tail=PooledTail(coarse), return_lse=True)
        expected, expected_lse = reference.attention(q, k, v)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)


def test_the_full_mask_leaves_no_tail():
    q, k, v = tensors(1, 2, None, 90, 90, 16)
    full = random_mask(q, k, 32, 8, 1.1)
    assert torch.equal(attention(q, k, v, block_mask=full, tail=PooledTail(4)), attention(q, k, v, block_mask=full, key_bias=torch.zeros(1, 90)))
    assert PooledTail(4).density(full, 90) == 0.0


def test_what_a_tail_adds_to_the_density():
    """10 keys in blocks of 2, coarse ones of 4, 4 and 2: a row that reads block 1 has pooled keys of block 0, blocks 2 and 3, block 4."""
    mask = BlockMask.from_dense(torch.tensor([[[[False, True, False, False, False], [True] * 5, [False] * 5]]]), 4, 2)
    assert PooledTail(2).density(mask, 10).item() == pytest.approx((3 + 0 + 3) / 3 / 10)
    assert PooledTail(1).density(mask, 10).item() == pytest.approx((4 + 0 + 5) / 3 / 10)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_a_tail_in_half_precision(dtype, atol):
    """Pooled keys are rounded as keys are, and so are their scores."""
    q, k, v = tensors(2, 2, None, 100, 130, 32, dtype=dtype)
    for bias in (None, torch.randn(2, 130)):
        check(q, k, v, random_mask(q, k, 32, 8), bias, atol=atol, tail=PooledTail(4), lse_atol=atol)


def test_against_torch_with_a_token_mask():
    q, k, v = tensors(2, 4, 2, 300, 333, 24)
    mask = random_mask(q, k, 64, 32)
    tokens = mask.token_mask(300, 333)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=tokens, enable_gqa=True)
    expected = expected.masked_fill(~tokens.any(-1, keepdim=True), 0.0)
    out, _ = block_sparse.run(q, k, v, mask, None, 24**-0.5, False)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precisions(dtype, atol):
    q, k, v = tensors(2, 2, None, 100, 130, 32, dtype=dtype)
    check(q, k, v, random_mask(q, k, 32, 32), atol=atol)
    check(q, k, v, random_mask(q, k, 32, 32), torch.randn(2, 130), atol=atol)


def test_unread_blocks_are_not_touched():
    q, k, v = tensors(1, 2, None, 128, 128, 16)
    kept = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    kept[:, :, 0, 1] = kept[:, :, 1, 1] = kept[:, :, 3, 2] = kept[:, :, 3, 1] = True
    mask = BlockMask.from_dense(kept, 32, 32)
    expected = block_sparse.run(q, k, v, mask, None, 0.25, False)[0]
    for unread in (0, 3):
        k[:, :, 32 * unread : 32 * unread + 32] = math.nan
        v[:, :, 32 * unread : 32 * unread + 32] = math.nan
    mask = BlockMask(mask.indices.masked_fill(torch.arange(mask.indices.shape[-1]) >= mask.counts[..., None], 10**6), mask.counts, 32, 32)
    for return_lse in (False, True):
        torch.testing.assert_close(block_sparse.run(q, k, v, mask, None, 0.25, return_lse)[0], expected)


def test_memory_behind_the_last_token_is_not_read():
    """Views into larger tensors, as hosts pass them: NaN before, behind and between."""
    q, k, v = tensors(2, 2, None, 70, 70, 16)
    mask = random_mask(q, k, 32, 32, 0.7)
    expected = block_sparse.run(q, k, v, mask, None, 0.25, False)[0]

    def bury(x):
        host = torch.full((2, 90, 3, 32), math.nan)
        view = host.transpose(1, 2)[:, :2, 10:80, 8:24]
        return view.copy_(x)

    strided = [bury(x) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(block_sparse.run(*strided, mask, None, 0.25, False)[0], expected)
    check(*strided, mask)


def test_rows_that_read_nothing():
    q, k, v = tensors(1, 2, None, 96, 96, 16)
    kept = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    kept[0, 1, 1] = False
    mask = BlockMask.from_dense(kept, 32, 32)
    check(q, k, v, mask)
    out, lse = block_sparse.run(q, k, v, mask, None, 0.25, True)
    assert not out[0, 1, 32:64].any() and lse[0, 1, 32:64].isneginf().all()


@pytest.mark.parametrize("masked", [True, False])
def test_keys_that_the_bias_hides(masked):
    q, k, v = tensors(2, 2, None, 96, 90, 16)
    bias = torch.zeros(2, 90)
    bias[0, 32:64] = -math.inf
    bias[1] = -math.inf
    kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    kept[0, 0, 1] = torch.tensor([False, True, False])  # of the first sample, only hidden keys
    check(q, k, v, BlockMask.from_dense(kept, 32, 32) if masked else None, bias)


def test_an_overflow_stays_visible():
    """A host must be able to see that values are not finite, whatever is done for rows that read nothing."""
    q, k, v = tensors(1, 1, None, 64, 64, 16)
    v[0, 0, 5, 3] = math.inf
    bias = torch.zeros(1, 64)
    for mask in (None, random_mask(q, k, 32, 32, 1.0)):
        run = dense.run if mask is None else block_sparse.run
        assert not run(q, k, v, mask, bias, 0.25, False)[0].isfinite().all()


def test_many_chunks_give_the_same(monkeypatch):
    q, k, v = tensors(2, 4, 2, 200, 200, 16)
    mask = random_mask(q, k, 16, 16)
    whole = block_sparse.run(q, k, v, mask, None, 0.25, True)
    monkeypatch.setattr(block_sparse, "CPU_CHUNK_BYTES", 1)
    for a, b in zip(whole, block_sparse.run(q, k, v, mask, None, 0.25, True), strict=True):
        torch.testing.assert_close(a, b)


def test_the_full_mask_is_dense_attention():
    q, k, v = tensors(1, 3, None, 257, 257, 64)
    mask = random_mask(q, k, 128, 64, 1.1)
    torch.testing.assert_close(attention(q, k, v, block_mask=mask, precision="native"), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=0)


def test_who_serves_what():
    q, k, v = tensors()
    sparse = explain(describe(q, k, v, block_mask=random_mask(q, k, 16, 16)), "native")
    assert sparse.implementation is not None and sparse.implementation.backend == "torch"
    whole = explain(describe(q, k, v), "native")
    assert whole.implementation is not None and whole.implementation.backend == "sdpa"
    assert "cannot skip blocks" in _row("sdpa").refuse(dispatch.Problem(q.device, q.dtype, 2, 2, 100, 100, 16, (16, 16)))
    assert "no block mask" in _row("torch").refuse(dispatch.Problem(q.device, q.dtype, 2, 2, 100, 100, 16))
    out, lse = attention(q, k, v, return_lse=True, precision="native")
    torch.testing.assert_close(lse.double(), reference.attention(q, k, v)[1], atol=1e-5, rtol=0)
    assert out.shape == q.shape


def _row(backend):
    return next(row for row in dispatch.implementations() if row.backend == backend)


WHOLE = BlockMask.from_dense(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16, 16)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": torch.randn(2, 8, 16)}, "q has shape"),
        ({"k": torch.randn(1, 2, 64, 16).half()}, "k is torch.float16"),
        ({"v": torch.randn(1, 2, 63, 16)}, "do not fit"),
        ({"k": torch.randn(1, 3, 64, 16), "v": torch.randn(1, 3, 64, 16)}, "do not fit"),
        ({"key_bias": torch.zeros(1, 65)}, "key_bias has shape"),
        ({"key_bias": torch.zeros(1, 64, dtype=torch.int64)}, "key_bias is torch.int64 on cpu; expected floating point or bool on cpu"),
        ({"key_bias": torch.zeros(1, 64, device="meta")}, "key_bias is torch.float32 on meta"),
        ({"key_bias": torch.full((1, 64), math.nan)}, "key_bias has NaN or \\+inf"),
        ({"key_bias": torch.full((1, 64), math.inf)}, "key_bias has NaN or \\+inf"),
        ({"block_mask": BlockMask.from_indices(torch.zeros(1, 1, 3, 1).int(), 16, 16)}, "block_mask covers"),
        ({"block_mask": BlockMask.from_indices(torch.full((1, 1, 4, 1), 4), 16, 16)}, "block_mask covers 4 and more key blocks; expected 4"),
        ({"block_mask": WHOLE, "k": torch.randn(1, 2, 65, 16), "v": torch.randn(1, 2, 65, 16)}, "block_mask covers 4 key blocks; expected 5"),
        ({"block_mask": WHOLE, "k": torch.randn(1, 2, 48, 16), "v": torch.randn(1, 2, 48, 16)}, "block_mask covers 4 key blocks; expected 3"),
        ({"block_mask": WHOLE, "q": torch.randn(1, 2, 65, 16)}, "block_mask covers"),
        ({"block_mask": BlockMask(WHOLE.indices.to("meta"), WHOLE.counts.to("meta"), 16, 16, trusted=True)}, "block_mask is on meta but q is on cpu"),
        ({"block_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "block_mask is a Tensor; make one with BlockMask.from_dense"),
        ({"q": torch.empty(1, 2, 0, 16)}, "non-empty"),
        ({"precision": "int3"}, "int3"),
        ({"tail": PooledTail(2)}, "a tail stands for what a block mask leaves out"),
    ],
)
def test_malformed_input_is_named(change, words):
    arguments = {"q": torch.randn(1, 2, 64, 16), "k": torch.randn(1, 2, 64, 16), "v": torch.randn(1, 2, 64, 16)} | change
    with pytest.raises(ValueError, match=words):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("coarse", [0, -1, 1.5])
def test_a_coarse_block_has_a_block(coarse):
    with pytest.raises(ValueError, match=f"coarse is {coarse}"):
        PooledTail(coarse)


# the key bias


LEVELS = {
    "-1e6": lambda bias: torch.where(bias > 0, -1e6, bias),
    "-3e38": lambda bias: torch.where(bias > 0, -3e38, bias),
    "-inf": lambda bias: torch.where(bias > 0, -math.inf, bias),
    "all far below": lambda bias: bias - 1e6,
    "all lowest": lambda bias: torch.full_like(bias, -3e38),
    "all lowest or hidden": lambda bias: torch.where(bias > 0, -3e38, -math.inf),
    "one block far below": lambda bias: torch.where(torch.arange(len(bias[0])) < 32, bias - 1e6, bias),
    "one block lowest": lambda bias: torch.where(torch.arange(len(bias[0])) < 32, -3e38, bias),
}


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_low_bias_loses_no_score(level, dtype, atol):
    """The first query block reads the first key block only, whatever is elsewhere."""
    q, k, v = tensors(2, 4, 2, 100, 90, 16, dtype=dtype)
    bias = LEVELS[level](torch.randn(2, 90))
    kept = torch.rand(2, 1, 4, 3) < 0.7
    kept[:, :, 0] = torch.tensor([True, False, False])
    for mask in (None, BlockMask.from_dense(kept, 32, 32)):
        check(q, k, v, mask, bias, atol=atol)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bias_is_float32_beside_half_operands(dtype, sparse):
    """-70000 is -inf in float16 and 1000.5 is 1000 in bfloat16: neither rounding may happen."""
    q = torch.full((1, 1, 32, 16), 4.0).to(dtype)
    k = torch.zeros(1, 1, 64, 16, dtype=dtype)
    k[:, :, :32] = 16.0  # a score of 1024 for half the keys, that the bias takes away again
    v = torch.randn(1, 1, 64, 16).to(dtype)
    bias = torch.zeros(1, 64)
    bias[:, :32] = -1024.5 + torch.rand(32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 2, dtype=torch.bool), 32, 32) if sparse else None
    check(q, k, v, mask, bias, scale=1.0, atol=2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_a_bias_of_another_dtype(dtype, sparse):
    q, k, v = tensors(2, 2, None, 64, 64, 16)
    bias = torch.rand(2, 64) < 0.5 if dtype == torch.bool else torch.randn(2, 64).to(dtype)
    expected_bias = torch.zeros(2, 64).masked_fill(~bias, -math.inf) if dtype == torch.bool else bias.float()
    mask = random_mask(q, k, 16, 16) if sparse else None
    out, lse = attention(q, k, v, block_mask=mask, key_bias=bias, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=expected_bias)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=0)
    if dtype == torch.bool and not sparse:
        torch.testing.assert_close(attention(q, k, v, key_bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None]))


# float64 and gradients


@pytest.mark.parametrize("sparse, tail", [(False, None), (True, None), (True, PooledTail(2))])
def test_float64_stays_float64(sparse, tail):
    q, k, v = tensors(2, 4, 2, 70, 90, 8, dtype=torch.float64)
    mask = random_mask(q, k, 16, 32) if sparse else None
    bias = torch.randn(2, 90, dtype=torch.float64)
    expected, expected_lse = reference.attention(q, k, v, block_mask=mask, key_bias=bias, tail=tail)
    for return_lse in (False, True):
        found = attention(q, k, v, block_mask=mask, key_bias=bias, tail=tail, return_lse=return_lse)
        out, lse = found if return_lse else (found, expected_lse)
        assert out.dtype == lse.dtype == torch.float64
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("sparse, tail", [(False, None), (True, None), (True, PooledTail(2))])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients(sparse, tail, with_bias, return_lse):
    """Against finite differences, through both results; with rows that read nothing, hidden keys and a ragged end."""
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 1, 9, 11, 3, dtype=torch.float64))
    hidden = torch.zeros(2, 11, dtype=torch.bool)
    hidden[0, 3:6] = hidden[1, :4] = True
    bias = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(2, 2, 3, 3) < 0.6
    kept[0, 0, 1] = False
    kept[1, :, 2] = torch.tensor([True, False, False])  # of the second sample, hidden keys only
    mask = BlockMask.from_dense(kept, 4, 4) if sparse else None

    def call(q, k, v, bias):
        key_bias = bias.masked_fill(hidden, -math.inf) if with_bias else None
        if not return_lse:
            return attention(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail)
        out, lse = attention(q, k, v, block_mask=mask, key_bias=key_bias, return_lse=True, tail=tail)
        return out, lse.masked_fill(lse.isneginf(), 0.0)  # a finite difference of -inf is no number

    assert torch.autograd.gradcheck(call, (q, k, v, bias), atol=1e-6)


def test_gradients_of_rows_that_read_nothing_are_zeros():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, None, 32, 32, 4))
    kept = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    kept[..., 0, 0] = True
    out, lse = attention(q, k, v, block_mask=BlockMask.from_dense(kept, 16, 16), return_lse=True)
    (out.sum() + lse[:, :, :16].sum()).backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and not x.grad[:, :, 16:].any() and x.grad[:, :, :16].any()


def test_where_no_row_reads_anything_gradients_are_zeros():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, None, 32, 32, 4))
    nothing = BlockMask.from_dense(torch.zeros(1, 1, 2, 2, dtype=torch.bool), 16, 16)
    attention(q, k, v, block_mask=nothing).sum().backward()
    for x in (q, k, v):
        assert torch.equal(x.grad, torch.zeros_like(x))


# a call that silently ran otherwise


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_sparse_call_that_ran_dense_would_show(return_lse):
    """Keys and values that no row keeps are enormous: whoever reads them has nothing else in its result."""
    q, k, v = tensors(1, 2, None, 128, 128, 16)
    kept = torch.rand(1, 2, 4, 4) < 0.6
    kept[..., 2] = False
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, 32, 32)
    clean = attention(q, k, v, block_mask=mask)
    k[:, :, 64:96], v[:, :, 64:96] = q[:, :, :32] * 1e3, 1e6
    found = attention(q, k, v, block_mask=mask, return_lse=return_lse)
    assert torch.equal(found[0] if return_lse else found, clean) or torch.allclose(found[0] if return_lse else found, clean, atol=1e-5)
    assert attention(q, k, v).abs().max() > 1e5, "dense, it shows"
