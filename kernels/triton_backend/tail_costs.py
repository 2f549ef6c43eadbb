"""What it costs to leave a key block to its pooled key, for every query block: the Triton kernel of `kernels.sparsity.exact.error`.

One program sums over the queries of one query block of one head, for a tile of keys. No score leaves it. Formulas as in `exact`: with exact
weights p, values v - w about their block's mean, D = sum p and T the weight of the pooled key, r = sum p (v - w) + (D - T) (w - o), and

    |r|^2 = p G p' + 2 (D - T) p (v - w) (w - o)' + (D - T)^2 |w - o|^2,   G = (v - w) (v - w)' of the block.

A block is a run of columns of a tile. Products are of the operands' dtype, differences and sums of float32.
"""
# ruff: noqa: N803 (constants of a kernel are in capitals)

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import num_blocks
from ..pool import block_bias, block_mean
from .common import locate

RUNTIME_NUMBERS = ("num_heads", "group", "q_len", "k_len", "query_blocks", "granules")
COARSE_NUMBERS = ("num_heads", "group", "q_len", "k_len", "query_blocks", "blocks")
TILE = 64
"""Keys at a time."""

WARPS = 8


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def tail_error_kernel(
    q,  # (batch, heads, q_len, HEAD_DIM), contiguous
    out,  # like q: the exact output
    lse,  # float32 (batch, heads, q_len): natural log
    shown,  # float32 (q_len,): 1, or 0 for what only fills a block
    k,  # (batch, kv_heads, k_len, HEAD_DIM), contiguous
    around,  # like k: values less the mean of their granule
    key_bias,  # float32 (batch, k_len)
    pooled_k,  # (batch, kv_heads, granules, HEAD_DIM), contiguous, in k's dtype
    pooled_v,
    pooled_bias,  # float32 (batch, granules)
    shares,  # float32 (k_len,): 1 / the keys of the key's block
    errors,  # float32 (batch, heads, query_blocks, granules)
    scale,
    num_heads,
    group,
    q_len,
    k_len,
    query_blocks,
    granules,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # head_dim padded to a power of two
    BLOCK: tl.constexpr,  # queries in a query block
    BLOCK_M: tl.constexpr,  # queries at a time, which divides BLOCK
    TILE: tl.constexpr,  # keys in a tile
    GRANULE: tl.constexpr,
):
    """One tile of keys for one query block."""
    first_row, _, batch, head_of_all = locate(q_len, num_heads, BLOCK)
    kv_head = head_of_all // group
    row, key, dim = tl.arange(0, BLOCK_M), tl.arange(0, TILE), tl.arange(0, D)
    place = tl.program_id(1) * TILE + key
    visible = place < k_len
    wanted = visible[None, :] & (dim < HEAD_DIM)[:, None]

    # A key brings its block's pooled key along: sums over a block are then sums over its columns, of all that there is.
    keys = (kv_head * k_len + place).to(tl.int64)[None, :] * HEAD_DIM + dim[:, None]
    pooled_keys = (kv_head * granules + place // GRANULE).to(tl.int64)[None, :] * HEAD_DIM + dim[:, None]
    k_tile = tl.load(k + keys, mask=wanted, other=0.0)
    v_tile = tl.load(around + keys, mask=wanted, other=0.0)
    mean_k = tl.load(pooled_k + pooled_keys, mask=wanted, other=0.0)
    mean_v = tl.load(pooled_v + pooled_keys, mask=wanted, other=0.0)
    bias = tl.load(key_bias + batch * k_len + place, mask=visible, other=-float("inf"))
    mean_bias = tl.load(pooled_bias + batch * granules + place // GRANULE, mask=visible, other=-float("inf"))
    share = tl.load(shares + place, mask=visible, other=0.0)

    same = key[:, None] // GRANULE == key[None, :] // GRANULE
    gram = tl.where(same, tl.dot(tl.trans(v_tile), v_tile), 0.0).to(k_tile.dtype)
    lean = tl.sum(v_tile.to(tl.float32) * mean_v.to(tl.float32), 0)  # (v - w) w' of each key
    length = tl.sum(mean_v.to(tl.float32) * mean_v.to(tl.float32), 0)

    total = tl.zeros([TILE // GRANULE], tl.float32)
    for begin in range(0, BLOCK, BLOCK_M):
        at = first_row + begin + row
        alive = at < q_len
        rows = (head_of_all * q_len + at).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        read = alive[:, None] & (dim < HEAD_DIM)[None, :]
        q_tile = tl.load(q + rows, mask=read, other=0.0)
        o_tile = tl.load(out + rows, mask=read, other=0.0)
        top = tl.load(lse + head_of_all * q_len + at, mask=alive, other=0.0)
        top = tl.where(top == -float("inf"), 0.0, top)
        weight = tl.load(shown + at, mask=alive, other=0.0)

        p = tl.exp(tl.dot(q_tile, k_tile) * scale + (bias[None, :] - top[:, None]))
        over = p - tl.exp(tl.dot(q_tile, mean_k) * scale + (mean_bias[None, :] - top[:, None])) * share[None, :]
        over = tl.sum(tl.reshape(over, [BLOCK_M, TILE // GRANULE, GRANULE]), 2)
        linear = p * (lean[None, :] - tl.dot(o_tile, v_tile))
        linear = tl.sum(tl.reshape(linear, [BLOCK_M, TILE // GRANULE, GRANULE]), 2)
        quadratic = p * tl.dot(p.to(k_tile.dtype), gram)
        quadratic = tl.sum(tl.reshape(quadratic, [BLOCK_M, TILE // GRANULE, GRANULE]), 2)
        far = (length[None, :] - 2.0 * tl.dot(o_tile, mean_v)) * share[None, :]
        far = tl.sum(tl.reshape(far, [BLOCK_M, TILE // GRANULE, GRANULE]), 2) + tl.sum(o_tile.to(tl.float32) * o_tile.to(tl.float32), 1)[:, None]
        costs = tl.maximum(quadratic + over * (2.0 * linear + over * far), 0.0)
        total += tl.sum(costs * weight[:, None], 0)
    granule = tl.program_id(1) * (TILE // GRANULE) + tl.arange(0, TILE // GRANULE)
    target = errors + (head_of_all * query_blocks + first_row // BLOCK) * granules + granule
    tl.store(target, total, mask=granule < granules)


@triton.jit(do_not_specialize=COARSE_NUMBERS)
def coarse_error_kernel(
    q,  # as for `tail_error_kernel`
    out,
    lse,
    shown,
    k,
    v,  # like k: the values themselves
    key_bias,
    pooled_k,  # (batch, kv_heads, blocks, HEAD_DIM)
    pooled_v,
    pooled_bias,  # float32 (batch, blocks)
    errors,  # float32 (batch, heads, query_blocks, blocks)
    scale,
    num_heads,
    group,
    q_len,
    k_len,
    query_blocks,
    blocks,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # queries in a query block, and keys in a coarse block
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """One coarse block of keys for one query block: N = sum p v is formed, and r = N - T w - (D - T) o with it."""
    first_row, _, batch, head_of_all = locate(q_len, num_heads, BLOCK)
    kv_head = head_of_all // group
    block = tl.program_id(1)
    row, key, dim = tl.arange(0, BLOCK_M), tl.arange(0, TILE), tl.arange(0, D)
    inside = dim < HEAD_DIM
    pooled = (kv_head * blocks + block).to(tl.int64) * HEAD_DIM + dim
    mean_k = tl.load(pooled_k + pooled, mask=inside, other=0.0).to(tl.float32)
    mean_v = tl.load(pooled_v + pooled, mask=inside, other=0.0).to(tl.float32)
    mean_bias = tl.load(pooled_bias + batch * blocks + block)

    total = 0.0
    for begin in range(0, BLOCK, BLOCK_M):
        at = first_row + begin + row
        alive = at < q_len
        rows = (head_of_all * q_len + at).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        read = alive[:, None] & inside[None, :]
        q_tile = tl.load(q + rows, mask=read, other=0.0)
        top = tl.load(lse + head_of_all * q_len + at, mask=alive, other=0.0)
        top = tl.where(top == -float("inf"), 0.0, top)
        change = tl.zeros([BLOCK_M, D], tl.float32)
        over = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, BLOCK, TILE):
            place = block * BLOCK + start + key
            visible = place < k_len
            keys = (kv_head * k_len + place).to(tl.int64)
            k_tile = tl.load(k + keys[None, :] * HEAD_DIM + dim[:, None], mask=visible[None, :] & inside[:, None], other=0.0)
            v_tile = tl.load(v + keys[:, None] * HEAD_DIM + dim[None, :], mask=visible[:, None] & inside[None, :], other=0.0)
            bias = tl.load(key_bias + batch * k_len + place, mask=visible, other=-float("inf"))
            p = tl.exp(tl.dot(q_tile, k_tile) * scale + (bias[None, :] - top[:, None]))
            over += tl.sum(p, 1)
            change = tl.dot(p.to(v_tile.dtype), v_tile, change)
        weight = tl.exp(tl.sum(q_tile.to(tl.float32) * mean_k[None, :], 1) * scale + (mean_bias - top))
        o_tile = tl.load(out + rows, mask=read, other=0.0).to(tl.float32)
        change -= weight[:, None] * mean_v[None, :] + (over - weight)[:, None] * o_tile
        total += tl.sum(tl.sum(change * change, 1) * tl.load(shown + at, mask=alive, other=0.0), 0)
    tl.store(errors + (head_of_all * query_blocks + first_row // BLOCK) * blocks + block, total)


def tail_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shown: Tensor, key_bias: Tensor | None, scale: float, block: int, granule: int
) -> tuple[Tensor, Tensor]:
    """float32 `(batch, heads, query blocks, granules)` and `(batch, heads, query blocks, coarse blocks)`: |r|^2, summed over a block's queries.

    q, out `(batch, heads, q_len, head_dim)`; k, v `(batch, kv_heads, k_len, head_dim)`, all of one dtype, multiplied as float16 or bfloat16; lse
    float32 `(batch, heads, q_len)`; shown float32 `(q_len,)`; key_bias float32 `(batch, k_len)` or None; block, of queries and of coarse keys, a
    power of two from 16 on, granule one from 4 to 64.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    half = torch.float16 if q.dtype == torch.float16 else torch.bfloat16
    bias = torch.zeros((batch, k_len), device=q.device) if key_bias is None else key_bias
    query_blocks = num_blocks(q_len, block)
    q, out, k_half, v_half = (x.to(half).contiguous() for x in (q, out, k, v))
    lse, shown, bias = (x.contiguous() for x in (lse, shown, bias))
    programs = query_blocks * heads * batch

    def pooled(size: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (block_mean(x, size, key_bias).to(half).contiguous() for x in (k, v))
        return keys, values, block_bias(bias, size).contiguous()

    def run(kernel: Any, values: Tensor, size: int, *more: Tensor) -> Tensor:
        blocks = num_blocks(k_len, size)
        errors = torch.empty((batch, heads, query_blocks, blocks), dtype=torch.float32, device=q.device)
        kernel[programs, triton.cdiv(k_len, TILE) if more else blocks](
            q, out, lse, shown, k_half, values, bias, *pooled(size), *more, errors, scale, heads, heads // kv_heads, q_len, k_len, query_blocks,
            blocks, **constants(head_dim, block, size if more else None), num_warps=WARPS, num_stages=1,
        )  # fmt: skip
        return errors

    around = (v.float() - block_mean(v, granule, key_bias).repeat_interleave(granule, 2)[:, :, :k_len]).to(half).contiguous()
    block_of_key = torch.arange(k_len, device=q.device) // granule
    shares = block_of_key.bincount(minlength=1).float().reciprocal()[block_of_key]
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        return run(tail_error_kernel, around, granule, shares), run(coarse_error_kernel, v_half, block)


def constants(head_dim: int, block: int, granule: int | None) -> dict[str, int]:
    """The compile-time constants of `tail_error_kernel`, or without a granule of `coarse_error_kernel`."""
    padded = max(1 << (head_dim - 1).bit_length(), 16)
    # Of head_dim 128 more rows do not fit into registers, nor through Triton's passes for tensor memory.
    shape = {"HEAD_DIM": head_dim, "D": padded, "BLOCK": block, "BLOCK_M": min(block, 32 if padded == 128 else 64)}
    return {**shape, "TILE": min(block, TILE)} if granule is None else {**shape, "TILE": TILE, "GRANULE": granule}
