"""INT8 operands for q.k, in plain torch: the definition that the Triton quantization kernels are tested against.

SageAttention (Zhang et al., arXiv:2410.02367): the keys of a head share a large common component that costs INT8 most of
its range. Subtracting their mean adds the same number, -q.mean, to every score of a query, which softmax ignores; only
the log-sum-exp has to be put right by adding scale * q.mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import num_blocks

K_BLOCK = 64
"""Keys that share one scale."""

LOG2E = 1.4426950408889634

TINY = 1e-12
"""Added to every scale, so that neither it nor the product of two is zero for rows of zeros."""


def key_mean(k: Tensor) -> Tensor:
    """The mean over the tokens of k `(batch, kv_heads, k_len, head_dim)`, float32 `(batch, kv_heads, head_dim)`."""
    return k.mean(2, dtype=torch.float32)


def quantize_q(q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """INT8 q with one scale a row, into which the softmax scale and log2(e) are folded.

    q: floating point `(batch, heads, q_len, head_dim)`; scale: what the scores q.k are multiplied by.
    Returns int8 like q and float32 `(batch, heads, q_len)`, with `q8 * q_scale = q * scale * log2(e)` to within half a step.
    """
    x = q.float() * (scale * LOG2E)
    q_scale = x.abs().amax(-1) / 127 + TINY
    return _round(x / q_scale[..., None]), q_scale


def quantize_k(k: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 k minus its mean, with one scale for each `K_BLOCK` keys.

    k: floating point `(batch, kv_heads, k_len, head_dim)`; mean: `key_mean(k)`.
    Returns int8 like k and float32 `(batch, kv_heads, key blocks)`, with `k8 * k_scale = k - mean` to within half a step.
    The last block may be ragged: its scale looks at real keys only.
    """
    x = k.float() - mean[:, :, None]
    blocks = num_blocks(x.shape[2], K_BLOCK)
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * K_BLOCK - x.shape[2]))
    k_scale = padded.unflatten(2, (blocks, K_BLOCK)).abs().amax((-1, -2)) / 127 + TINY
    per_key = k_scale.repeat_interleave(K_BLOCK, 2)[:, :, : x.shape[2], None]
    return _round(x / per_key), k_scale


def _round(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5).to(torch.int8)
