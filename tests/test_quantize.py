"""INT8 operands in plain torch: rounding, smoothing, scales, and the attention that comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.kernels import reference
from tessera.kernels.quantize import K_BLOCK, LOG2E, key_mean, quantize_k, quantize_q


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 200), head_dim=st.sampled_from([8, 40, 64]), size=st.floats(1e-3, 1e3))
def test_numbers_are_within_half_a_step(seed: int, tokens: int, head_dim: int, size: float) -> None:
    torch.manual_seed(seed)
    x = size * torch.randn(2, 3, tokens, head_dim)
    mean = key_mean(x)
    q8, q_scale = quantize_q(x, 0.5)
    k8, k_scale = quantize_k(x, mean)
    assert q8.dtype == k8.dtype == torch.int8 and q8.shape == k8.shape == x.shape
    assert q_scale.shape == (2, 3, tokens) and k_scale.shape == (2, 3, -(-tokens // K_BLOCK))
    per_key = k_scale.repeat_interleave(K_BLOCK, -1)[..., :tokens]
    for numbers, step, exact in ((q8, q_scale, x * 0.5 * LOG2E), (k8, per_key, x - mean[:, :, None])):
        assert ((numbers * step[..., None] - exact).abs() <= 0.5001 * step[..., None]).all()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, smooth: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, from dequantized scores: output and natural-log lse."""
    scale = q.shape[-1] ** -0.5
    mean = key_mean(k) if smooth else torch.zeros_like(k[:, :, 0])
    q8, q_scale = quantize_q(q, scale)
    k8, k_scale = quantize_k(k, mean)
    scores = (q8.double() @ k8.double().mT) * q_scale[..., None] * k_scale.repeat_interleave(K_BLOCK, -1)[:, :, None, : k.shape[2]] / LOG2E
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1) + scale * (q * mean[:, :, None]).sum(-1)


def test_smoothed_attention_is_close_to_float64_and_closer_than_without() -> None:
    """On keys with a large common component, as diffusion transformers have them."""
    q, v = torch.randn(1, 2, 256, 64), torch.randn(1, 2, 500, 64)
    k = torch.randn(1, 2, 500, 64) + 8 * torch.randn(1, 2, 1, 64)
    expected, expected_lse = reference.attention(q, k, v)
    errors = {}
    for smooth in (True, False):
        out, lse = attend(q, k, v, smooth)
        errors[smooth] = float((out - expected).abs().sum() / expected.abs().sum())
        if smooth:
            assert (lse - expected_lse).abs().max() < 0.1
    assert errors[True] < 0.03
    assert errors[False] > 3 * errors[True]


def test_rows_of_zeros_stay_zeros() -> None:
    zeros = torch.zeros(1, 1, 5, 16)
    for numbers, scale in (quantize_q(zeros, 1.0), quantize_k(zeros, key_mean(zeros))):
        assert not numbers.any() and (scale > 0).all() and torch.isfinite(scale).all()


def test_the_ragged_block_looks_at_real_keys_only() -> None:
    """Far from zero, padding counted as zeros minus the mean would set the scale."""
    k = 1000 + torch.randn(1, 1, K_BLOCK + 1, 16)
    mean = key_mean(k)
    _, scale = quantize_k(k, mean)
    torch.testing.assert_close(scale[0, 0, 1], (k[0, 0, -1] - mean[0, 0]).abs().amax() / 127)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_reach_the_scale(bad: float) -> None:
    x = torch.randn(1, 1, 70, 16)
    x[0, 0, 66, 3] = bad
    assert not torch.isfinite(quantize_q(x, 1.0)[1][0, 0, 66])
    assert not torch.isfinite(quantize_k(x, key_mean(x))[1]).any()
