"""The oracle itself, against torch and against the formula written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from tessera.kernels import reference
from tessera.kernels.block_mask import BlockMask, PooledTail


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dense_is_softmax_attention(kv_heads):
    q, k, v = torch.randn(2, 4, 37, 20), torch.randn(2, kv_heads, 53, 20), torch.randn(2, kv_heads, 53, 20)
    out, lse = reference.attention(q, k, v, scale=0.3)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = q.double() @ k.double().repeat_interleave(4 // kv_heads, 1).transpose(2, 3) * 0.3
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_two_keys_by_hand():
    q, k, v = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [math.log(3.0)]]]]), torch.tensor([[[[1.0], [5.0]]]])
    out, lse = reference.attention(q, k, v, scale=1.0)
    assert out.item() == pytest.approx((1 * 1 + 3 * 5) / 4)
    assert lse.item() == pytest.approx(math.log(4.0))


def test_key_bias_weighs_and_hides_keys():
    q, k, v = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    bias = torch.tensor([[0.0, math.log(2.0), 0.0, -math.inf]])
    out, _ = reference.attention(q, k, v, key_bias=bias)
    twice = [0, 1, 1, 2]
    expected, _ = reference.attention(q, k[:, :, twice], v[:, :, twice])
    torch.testing.assert_close(out, expected)


def test_block_mask_hides_what_it_does_not_list():
    q, k, v = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    out, lse = reference.attention(q, k, v, block_mask=BlockMask.from_dense(mask[None, None], 4, 4))
    kept = [0, 1, 2, 3, 8, 9, 10]
    first, _ = reference.attention(q[:, :, :4], k[:, :, kept], v[:, :, kept])
    last, _ = reference.attention(q[:, :, 8:], k[:, :, 4:8], v[:, :, 4:8])
    torch.testing.assert_close(out[:, :, :4], first)
    torch.testing.assert_close(out[:, :, 8:], last)
    assert not out[:, :, 4:8].any()
    assert lse[:, :, 4:8].isneginf().all() and lse[:, :, 8:].isfinite().all()


def test_a_pooled_key_counts_as_often_as_it_has_keys():
    """Blocks of 2 keys, coarse ones of 4 and a ragged one: the first is read, its neighbour has its own pooled key, the others one together."""
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    mask = BlockMask.from_dense(torch.tensor([[[[True, False, False, False, False]]]]), 4, 2)
    out, lse = reference.attention(q, k, v, block_mask=mask, tail=PooledTail(2))
    groups = [[0], [1], [2, 3], [4, 5, 6, 7], [8]]
    pooled_k, pooled_v = (torch.stack([x[:, :, group].mean(2) for group in groups], 2) for x in (k, v))
    times = torch.tensor([len(group) for group in groups])
    expected, expected_lse = reference.attention(q, pooled_k.repeat_interleave(times, 2), pooled_v.repeat_interleave(times, 2))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=0)


def test_a_pooled_key_is_the_mean_of_weighed_keys():
    q, k, v = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    bias = torch.tensor([[0.0, math.log(2.0), 0.0, -math.inf, -math.inf]])
    nothing = BlockMask.from_dense(torch.zeros(1, 1, 1, 2, dtype=torch.bool), 4, 4)
    out, lse = reference.attention(q, k, v, block_mask=nothing, key_bias=bias, tail=PooledTail(1))
    mean_k, mean_v = (x[:, :, [0, 1, 1, 2]].double().mean(2, keepdim=True) for x in (k, v))
    torch.testing.assert_close(out, mean_v.expand_as(out))
    torch.testing.assert_close(lse, (q.double() @ mean_k.mT * 8**-0.5)[..., 0] + math.log(4.0))
