"""Flash attention over a list of key blocks: the Triton kernel and its launcher.

One program computes one tile of BLOCK_M queries of one head. It walks over the tiles of BLOCK_N keys that the block mask
lists for its query block (or over all keys when there is no mask), keeps the running maximum, sum and weighted values of
the online softmax in registers, and writes its tile of the output once. Listed blocks that are shorter than a tile, granules, are
gathered into full ones, so that the products stay as large. The pooled keys of a tail are gathered in the same way behind them.

Sources: Dao, FlashAttention-2 (arXiv:2307.08691) for the loop; Zhang et al., SageAttention (arXiv:2410.02367) for the INT8
q.k with smoothed K; hao-ai-lab/FastVideo and ModelTC/LightX2V for walking over a per-row list of key blocks.
"""
# ruff: noqa: N803 (constants of a kernel are in capitals)

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu
from ..block_mask import BlockMask, PooledTail
from ..quantize import LOG2E, key_mean
from .common import locate, stride_units
from .compile_table import Config, attention_constants, config_for
from .quantize import quantize_k, quantize_q
from .tail import list_tail, pooled_keys

TO_LOG2 = tl.constexpr(LOG2E)

# The running maximum starts finite: a tile whose scores are all -inf then gives exp2(-inf - finite) = 0, never NaN. No score is below it.
START_MAX = tl.constexpr(-3e38)

# Lengths and strides change with every resolution; a kernel compiled for one of them must serve all.
RUNTIME_NUMBERS = (
    *(f"{tensor}_stride_{dim}" for tensor in ("q", "k", "v", "out") for dim in ("batch", "head", "token")),
    *("mask_stride_batch", "mask_stride_head", "mask_width", "tail_width", "pooled"),
    *("num_heads", "group", "q_len", "k_len"),
)


@triton.jit
def _load_rows(pointers, dim, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load rows that are WIDTH elements long, padded to D with zeros. `dim` counts along them."""
    if WIDTH == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=dim < WIDTH, other=0)


@triton.jit
def _listed(blocks, slot, slots, BLOCK: tl.constexpr):
    """The keys at some slots of a list of blocks of BLOCK keys that has so many slots, the last one's key for those behind it."""
    slot = tl.minimum(slot, slots - 1)
    return tl.load(blocks + slot // BLOCK) * BLOCK + slot % BLOCK


@triton.jit
def _top_bias(bias, indices, keys, k_len, tops, BLOCK_N: tl.constexpr, MASK_N: tl.constexpr):
    """`tops`, BLOCK_N numbers, or the biases of the listed keys where they are larger. Arguments as those of `_attend`."""
    key = tl.arange(0, BLOCK_N)
    for tile in range(0, tl.cdiv(keys, BLOCK_N)):
        start = tile * BLOCK_N
        if MASK_N < BLOCK_N:
            tops = tl.maximum(tops, tl.load(bias + _listed(indices, start + key, keys, MASK_N)))
        else:
            if indices is not None:
                start = tl.load(indices + start // MASK_N) * MASK_N + start % MASK_N
            tops = tl.maximum(tops, tl.load(bias + start.to(tl.int64) + tl.minimum(key, k_len - start - 1)))
    return tops


@triton.jit
def _attend(
    q_tile,
    k,  # the keys of a head
    v,
    bias,  # one number a key, in natural logarithms, or None
    k_scale,  # one number for K_BLOCK keys, or None without INT8
    indices,  # the list of their blocks of MASK_N that is to be read, or None for all
    keys,  # how many there are in those blocks
    k_len,
    k_stride,
    v_stride,
    q_scale,  # one number a row, or None
    to_log2,
    top_bias,
    row_max,  # the largest score so far, in units of log2
    row_sum,  # the sum of p = 2^(score - row_max) so far
    acc,  # the sum of p v so far
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    QK_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Take the listed keys into the online softmax, a tile at a time. Returns row_max, row_sum and acc."""
    key = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, D)
    for tile in range(0, tl.cdiv(keys, BLOCK_N)):
        start = tile * BLOCK_N
        if MASK_N < BLOCK_N:  # gathered: every key of the tile has an address of its own
            keys_left = keys - start
            real_key = _listed(indices, start + key, keys, MASK_N)
            row_key = real_key.to(tl.int64)
            first = 0
        else:
            if indices is not None:
                start = tl.load(indices + start // MASK_N) * MASK_N + start % MASK_N
            keys_left = k_len - start
            real_key = tl.minimum(key, keys_left - 1)
            row_key = real_key
            first = start.to(tl.int64)

        # K is read transposed: its contiguous side becomes the inner dimension of the dot, as tensor cores want it.
        k_pointers = k + first * k_stride + (row_key[None, :] * k_stride + dim[:, None])
        k_tile = _load_rows(k_pointers, dim[:, None], QK_WIDTH, D)
        scores = tl.dot(q_tile, k_tile).to(tl.float32)
        row_to_log2 = tl.full([BLOCK_M], 1.0, tl.float32) * to_log2
        if q_scale is not None:
            if MASK_N < BLOCK_N:
                scores *= tl.load(k_scale + real_key // K_BLOCK)[None, :]
                row_to_log2 = q_scale
            else:
                row_to_log2 = q_scale * tl.load(k_scale + start // K_BLOCK)
        if bias is not None:
            key_bias = tl.load(bias + first + real_key) - top_bias
            scores = scores * row_to_log2[:, None] + key_bias[None, :] * TO_LOG2
            row_to_log2 = tl.full([BLOCK_M], 1.0, tl.float32)
        if keys_left < BLOCK_N:
            scores = tl.where((key < keys_left)[None, :], scores, -float("inf"))

        # Scaling after the maximum, which a positive scale allows, leaves one fused multiply-add a score.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * row_to_log2)
        p = tl.exp2(scores * row_to_log2[:, None] - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * correction + tl.sum(p, 1)
        v_pointers = v + first * v_stride + (row_key[:, None] * v_stride + dim[None, :])
        v_tile = _load_rows(v_pointers, dim[None, :], HEAD_DIM, D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * correction[:, None])
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def attention_kernel(
    q,  # (batch, heads, q_len, head_dim); with INT8 its rows are padded to D
    k,  # (batch, kv_heads, k_len, head_dim); with INT8 its rows are padded to D
    v,  # (batch, kv_heads, k_len, head_dim)
    out,  # like q before quantization
    lse,  # float32 (batch, heads, q_len): natural log, or None
    indices,  # int32 (mask batch, mask heads, mask query blocks, mask_width), or None for dense
    counts,  # int32 (mask batch, mask heads, mask query blocks), or None
    key_bias,  # float32 (batch, k_len), or None
    q_scale,  # float32 (batch, heads, q_len), or None without INT8
    k_scale,  # float32 (batch, kv_heads, blocks of K_BLOCK keys), or None
    tail_indices,  # int32 (mask batch, mask heads, mask query blocks, tail_width): pooled keys, or None without a tail
    tail_counts,  # int32 like counts, or None
    pooled_k,  # as k, contiguous (batch, kv_heads, pooled, head_dim or D), or None
    pooled_v,  # as v, contiguous (batch, kv_heads, pooled, head_dim), or None
    pooled_bias,  # float32 (batch, pooled): the natural logarithm of what each one's keys weigh together, or None
    pooled_scale,  # as k_scale, or None
    q_stride_batch,  # strides in units of STRIDE_UNIT elements
    q_stride_head,
    q_stride_token,
    k_stride_batch,
    k_stride_head,
    k_stride_token,
    v_stride_batch,
    v_stride_head,
    v_stride_token,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
    mask_stride_batch,  # strides of counts; 0 where one mask serves all batches or heads
    mask_stride_head,
    mask_width,
    tail_width,
    pooled,
    num_heads,
    group,  # query heads that share a head of k and v
    q_len,
    k_len,
    to_log2,  # scale * log2(e); with INT8 it is folded into q_scale and this is 1
    HEAD_DIM: tl.constexpr,  # a constant, so that loads of rows that are padded to D can still be long ones
    D: tl.constexpr,  # head_dim padded to a power of two
    QK_WIDTH: tl.constexpr,  # elements in a row of q and k: head_dim, or with INT8 D
    BLOCK_M: tl.constexpr,  # queries and keys in a tile
    BLOCK_N: tl.constexpr,
    MASK_M: tl.constexpr,  # queries in a block of the mask, a multiple of BLOCK_M
    MASK_N: tl.constexpr,  # keys in a block of the mask: a multiple of BLOCK_N, or a granule, of which BLOCK_N is one
    K_BLOCK: tl.constexpr,  # keys that share an INT8 scale
    STRIDE_UNIT: tl.constexpr,  # multiplying by it tells the compiler how far rows are aligned
):
    """softmax(q k^T) v for one tile of queries."""
    first_row, head, batch, head_of_all = locate(q_len, num_heads, BLOCK_M)
    kv_head = head // group
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    rows_left = q_len - first_row
    row_offset = head_of_all * q_len + first_row
    k_stride = k_stride_token * STRIDE_UNIT
    v_stride = v_stride_token * STRIDE_UNIT

    q += (batch * q_stride_batch + head * q_stride_head + first_row.to(tl.int64) * q_stride_token) * STRIDE_UNIT
    # Rows and keys beyond the last are replaced by the last one: that costs less than masked loads, and they are never used.
    q_row = tl.minimum(row, rows_left - 1)
    q_tile = _load_rows(q + (q_row[:, None] * (q_stride_token * STRIDE_UNIT) + dim[None, :]), dim[None, :], QK_WIDTH, D)
    k += (batch * k_stride_batch + kv_head * k_stride_head) * STRIDE_UNIT
    v += (batch * v_stride_batch + kv_head * v_stride_head) * STRIDE_UNIT
    if key_bias is not None:
        key_bias += batch * k_len
    q_scale_tile = None
    if q_scale is not None:
        q_scale_tile = tl.load(q_scale + row_offset + row, mask=row < rows_left, other=1.0)
        k_scale += head_of_all // group * tl.cdiv(k_len, K_BLOCK)

    # How many keys to read, not counting those that a ragged last block lacks.
    keys = k_len
    if indices is not None:
        mask_row = batch * mask_stride_batch + head * mask_stride_head + first_row // MASK_M
        count = tl.load(counts + mask_row)
        indices += mask_row * mask_width
        # Ids ascend, so only the last listed block can be ragged.
        last_block = tl.load(indices + count - 1, mask=count > 0, other=0)
        missing = tl.where(count > 0, tl.maximum((last_block + 1) * MASK_N - k_len, 0), 0)
        keys = count * MASK_N - missing
    if tail_indices is not None:
        tail_keys = tl.load(tail_counts + mask_row)
        tail_indices += mask_row * tail_width
        pooled_bias += batch * pooled
        pooled_k += head_of_all // group * pooled * QK_WIDTH
        pooled_v += head_of_all // group * pooled * HEAD_DIM
        if q_scale is not None:
            pooled_scale += head_of_all // group * tl.cdiv(pooled, K_BLOCK)

    # The softmax does not see a number that all keys of a row share. With the largest bias at 0, none swallows the scores beside it.
    top_bias = 0.0
    if key_bias is not None:
        tops = tl.full([BLOCK_N], -float("inf"), tl.float32)
        tops = _top_bias(key_bias, indices, keys, k_len, tops, BLOCK_N, MASK_N)
        if tail_indices is not None:
            tops = _top_bias(pooled_bias, tail_indices, tail_keys, pooled, tops, BLOCK_N, 1)
        top_bias = tl.max(tops, 0)
        top_bias = tl.where(top_bias == -float("inf"), 0.0, top_bias)

    row_max = tl.full([BLOCK_M], START_MAX, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    row_max, row_sum, acc = _attend(
        q_tile, k, v, key_bias, k_scale, indices, keys, k_len, k_stride, v_stride, q_scale_tile, to_log2, top_bias, row_max, row_sum, acc,
        HEAD_DIM, D, QK_WIDTH, BLOCK_M, BLOCK_N, MASK_N, K_BLOCK,
    )  # fmt: skip
    if tail_indices is not None:  # pooled keys are read as blocks of one key
        row_max, row_sum, acc = _attend(
            q_tile, pooled_k, pooled_v, pooled_bias, pooled_scale, tail_indices, tail_keys, pooled, QK_WIDTH, HEAD_DIM, q_scale_tile, to_log2,
            top_bias, row_max, row_sum, acc, HEAD_DIM, D, QK_WIDTH, BLOCK_M, BLOCK_N, 1, K_BLOCK,
        )  # fmt: skip

    # A row that read nothing has a sum of 0: its output is 0 / 1 and its lse log2(0) = -inf.
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out += (batch * out_stride_batch + head * out_stride_head + first_row.to(tl.int64) * out_stride_token) * STRIDE_UNIT
    out_pointers = out + (row[:, None] * (out_stride_token * STRIDE_UNIT) + dim[None, :])
    tl.store(out_pointers, acc.to(out.dtype.element_ty), mask=(row < rows_left)[:, None] & (dim < HEAD_DIM)[None, :])
    if lse is not None:
        tl.store(lse + row_offset + row, (row_max + tl.log2(row_sum)) / TO_LOG2 + top_bias, mask=row < rows_left)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _operand_dtype(operand: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of `dtype` is cast to for a dot whose operands are not quantized."""
    native = torch.bfloat16 if dtype == torch.float32 else dtype  # the only half that has float32's range
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "native": native}[operand]


def _empty_like_rows(q: Tensor) -> Tensor:
    """An uninitialised output. If q is a view of (batch, tokens, heads, head_dim), so is it: hosts merge its heads without a copy."""
    if q.stride(1) < q.stride(2):
        return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
    tail: PooledTail | None = None,
    *,
    qk: str = "native",
    pv: str = "native",
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel. Shapes as in `kernels.attention.attention`, whose checks have been made.

    qk, pv: the operands of the two dots, as an `Implementation` declares them. Native ones of float32 are bfloat16.
    config: how tiles are computed; None takes the compile table's.
    Returns the output in q's dtype, laid out token by token if q is, and float32 `(batch, heads, q_len)` if return_lse.
    Raises ValueError if scale is not positive.
    """
    if scale <= 0:
        raise ValueError(f"attention: scale is {scale}; the Triton kernels need a positive one")
    batch, num_heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    blocks = None if block_mask is None else (block_mask.block_m, block_mask.block_n)
    extras = return_lse or key_bias is not None
    config = config or config_for(head_dim, blocks, qk=qk, extras=extras, tail=tail is not None, capability=gpu.of(q.device).capability)
    out = _empty_like_rows(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if return_lse else None

    bias = None if key_bias is None else key_bias.contiguous()
    indices = counts = tail_indices = tail_counts = pooled_k = pooled_v = pooled_bias = None
    q_scale = k_scale = pooled_scale = lse_shift = None
    mask_layout = (0, 0, 0)
    tail_width = pooled = 0
    if block_mask is not None:
        indices, counts = block_mask.indices.contiguous(), block_mask.counts.contiguous()
        mask_batch, mask_heads, query_blocks, width = indices.shape
        mask_layout = (mask_heads * query_blocks if mask_batch > 1 else 0, query_blocks if mask_heads > 1 else 0, width)
    programs = triton.cdiv(q_len, config.block_m) * num_heads * batch
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if block_mask is not None and tail is not None:
            tail_indices, tail_counts = list_tail(block_mask, tail, k_len)
            pooled_k, pooled_v, pooled_bias = pooled_keys(k, v, bias, tail.sizes(block_mask.block_n))
            pooled_v = pooled_v.to(_operand_dtype(pv, v.dtype))
            tail_width, pooled = tail_indices.shape[-1], pooled_bias.shape[1]
        if qk == "int8":
            mean = key_mean(k)
            q, q_scale, lse_shift = quantize_q(_contiguous_rows(q), scale, mean if return_lse else None)
            k, k_scale = quantize_k(_contiguous_rows(k), mean)
            if pooled_k is not None:
                pooled_k, pooled_scale = quantize_k(pooled_k, mean)
        else:
            if pooled_k is not None:
                pooled_k = pooled_k.to(_operand_dtype(qk, k.dtype))
            q, k = (_contiguous_rows(x.to(_operand_dtype(qk, x.dtype))) for x in (q, k))
        v = _contiguous_rows(v.to(_operand_dtype(pv, v.dtype)))
        unit, strides = stride_units(q, k, v, out)
        attention_kernel[(programs,)](
            q, k, v, out, lse, indices, counts, bias, q_scale, k_scale, tail_indices, tail_counts, pooled_k, pooled_v, pooled_bias, pooled_scale,
            *strides, *mask_layout, tail_width, pooled, num_heads, num_heads // kv_heads, q_len, k_len, 1.0 if qk == "int8" else scale * LOG2E,
            **attention_constants(head_dim, blocks, qk, config, unit), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    if lse is not None and lse_shift is not None:
        lse += lse_shift
    return out, lse
