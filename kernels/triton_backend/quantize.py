"""INT8 quantization of q and k in Triton: `kernels.quantize`, which defines it, in one pass over each."""
# ruff: noqa: N803 (constants of a kernel are in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import LOG2E, TINY
from .common import locate, stride_units
from .compile_table import quantize_constants

TO_LOG2 = tl.constexpr(LOG2E)
SMALLEST_SCALE = tl.constexpr(TINY)

RUNTIME_NUMBERS = ("stride_batch", "stride_head", "stride_token", "num_heads", "group", "tokens")


@triton.jit
def _load_rows(x, first, head, batch, stride_batch, stride_head, stride_token, tokens, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """float32 (ROWS, D) from token `first` of one head; zeros beyond HEAD_DIM and beyond the last token."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    x += batch * stride_batch + head * stride_head + first.to(tl.int64) * stride_token
    inside = (row < tokens - first)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(x + (row[:, None] * stride_token + dim[None, :]), mask=inside, other=0).to(tl.float32)


@triton.jit
def _store_rows(quantized, x, first, head_of_all, tokens, D: tl.constexpr, ROWS: tl.constexpr):
    """Round to the nearest integer and store rows of D."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    quantized += (head_of_all * tokens + first) * D
    tl.store(quantized + (row[:, None] * D + dim[None, :]), tl.floor(x + 0.5).to(tl.int8), mask=(row < tokens - first)[:, None])


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def quantize_q_kernel(
    q,  # (batch, num_heads, tokens, head_dim)
    mean,  # float32 (batch, kv_heads, head_dim): key_mean(k), or None when lse_shift is not wanted
    quantized,  # int8 (batch, num_heads, tokens, D)
    scales,  # float32 (batch, num_heads, tokens)
    lse_shift,  # float32 (batch, num_heads, tokens): scale * q.mean, or None
    stride_batch,  # strides in units of STRIDE_UNIT elements
    stride_head,
    stride_token,
    num_heads,
    group,  # query heads that share a head of k
    tokens,
    scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # head_dim padded to a power of two
    ROWS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Quantize ROWS rows of one head, each with its own scale."""
    first, head, batch, head_of_all = locate(tokens, num_heads, ROWS)
    x = _load_rows(
        q, first, head, batch, stride_batch * STRIDE_UNIT, stride_head * STRIDE_UNIT, stride_token * STRIDE_UNIT, tokens, HEAD_DIM, D, ROWS
    )
    x = x * scale
    row = tl.arange(0, ROWS)
    inside = row < tokens - first
    row_offset = head_of_all * tokens + first + row
    if lse_shift is not None:
        dim = tl.arange(0, D)
        mean_of_head = tl.load(mean + (head_of_all // group) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0)
        tl.store(lse_shift + row_offset, tl.sum(x * mean_of_head[None, :], 1), mask=inside)
    x = x * TO_LOG2
    # A maximum may skip NaN; 0 * x carries NaN and infinity into the scale, so that the output shows them.
    row_scale = (tl.max(tl.abs(x), 1) + tl.sum(0.0 * x, 1)) / 127 + SMALLEST_SCALE
    tl.store(scales + row_offset, row_scale, mask=inside)
    _store_rows(quantized, x / row_scale[:, None], first, head_of_all, tokens, D, ROWS)


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def quantize_k_kernel(
    k,  # (batch, num_heads, tokens, head_dim)
    mean,  # float32 (batch, num_heads, head_dim)
    quantized,  # int8 (batch, num_heads, tokens, D)
    scales,  # float32 (batch, num_heads, blocks of ROWS tokens)
    stride_batch,  # strides in units of STRIDE_UNIT elements
    stride_head,
    stride_token,
    num_heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # head_dim padded to a power of two
    ROWS: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Subtract the mean and quantize ROWS rows of one head with one scale."""
    first, head, batch, head_of_all = locate(tokens, num_heads, ROWS)
    x = _load_rows(
        k, first, head, batch, stride_batch * STRIDE_UNIT, stride_head * STRIDE_UNIT, stride_token * STRIDE_UNIT, tokens, HEAD_DIM, D, ROWS
    )
    dim = tl.arange(0, D)
    x -= tl.load(mean + head_of_all * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0)[None, :]
    # Rows beyond the last token are zero minus the mean by now and must not take part in the scale.
    x = tl.where((tl.arange(0, ROWS) < tokens - first)[:, None], x, 0.0)
    block_scale = (tl.max(tl.max(tl.abs(x), 1), 0) + tl.sum(tl.sum(0.0 * x, 1), 0)) / 127 + SMALLEST_SCALE
    tl.store(scales + tl.program_id(0), block_scale)
    _store_rows(quantized, x / block_scale, first, head_of_all, tokens, D, ROWS)


def quantize_q(q: Tensor, scale: float, mean: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """INT8 q with its scales, as `kernels.quantize.quantize_q` defines them.

    q: `(batch, heads, q_len, head_dim)`, floating point, last dimension contiguous. mean: `key_mean(k)`, where the lse is wanted.
    Returns int8 q, contiguous, whose rows are padded with zeros to D = `padded_head_dim(head_dim, "int8")`; float32 scales `(batch, heads, q_len)`;
    and with a mean what must be added to the natural-log lse of the smoothed scores, float32 `(batch, heads, q_len)`.
    """
    batch, heads, q_len, head_dim = q.shape
    unit, strides = stride_units(q)
    constants = quantize_constants(head_dim, unit)
    q8 = torch.empty((batch, heads, q_len, constants["D"]), dtype=torch.int8, device=q.device)
    q_scale = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    lse_shift = None if mean is None else torch.empty_like(q_scale)
    group = 1 if mean is None else heads // mean.shape[1]
    programs = triton.cdiv(q_len, constants["ROWS"]) * heads * batch
    quantize_q_kernel[(programs,)](q, mean, q8, q_scale, lse_shift, *strides, heads, group, q_len, scale, **constants)
    return q8, q_scale, lse_shift


def quantize_k(k: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 k with its scales, as `kernels.quantize.quantize_k` defines them.

    k: `(batch, kv_heads, k_len, head_dim)`, floating point, last dimension contiguous; mean: float32 `(batch, kv_heads, head_dim)`, contiguous.
    Returns int8 k, contiguous, its rows padded as those of q; float32 scales `(batch, kv_heads, key blocks)`.
    """
    batch, heads, k_len, head_dim = k.shape
    unit, strides = stride_units(k)
    constants = quantize_constants(head_dim, unit)
    k8 = torch.empty((batch, heads, k_len, constants["D"]), dtype=torch.int8, device=k.device)
    k_scale = torch.empty((batch, heads, triton.cdiv(k_len, constants["ROWS"])), dtype=torch.float32, device=k.device)
    quantize_k_kernel[(k_scale.numel(),)](k, mean, k8, k_scale, *strides, heads, k_len, **constants)
    return k8, k_scale
