"""The pooled tail for the attention kernel: which pooled keys each row has, and the pooled keys themselves."""
# ruff: noqa: N803 (constants of a kernel are in capitals)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, PooledTail, num_blocks
from ..pool import block_bias, block_mean
from .compile_table import list_constants

RUNTIME_NUMBERS = ("key_blocks", "width")


@triton.jit(do_not_specialize=RUNTIME_NUMBERS)
def list_tail_kernel(
    kept,  # uint8 (rows, key_blocks): 1 where the mask's row reads the block
    indices,  # int32 (rows, width): pooled keys, those of key blocks first, then those of coarse blocks
    counts,  # int32 (rows,)
    key_blocks,
    width,
    COARSE: tl.constexpr,  # key blocks in a coarse block
    PADDED: tl.constexpr,  # that, padded to a power of two
    GROUP: tl.constexpr,  # coarse blocks at a time
):
    """`PooledTail.terms` of one row, as a list in no particular order."""
    row = tl.program_id(0).to(tl.int64)
    kept += row * key_blocks
    indices += row * width
    member = tl.arange(0, PADDED)[None, :]
    listed = 0
    for first in range(0, tl.cdiv(key_blocks, COARSE), GROUP):
        coarse = first + tl.arange(0, GROUP)
        block = coarse[:, None] * COARSE + member
        real = (member < COARSE) & (block < key_blocks)
        read = tl.load(kept + block, mask=real, other=0).to(tl.int32)
        touched = tl.max(read, 1)
        fine = tl.where(real, touched[:, None] - read, 0)
        fine_place = tl.reshape(tl.cumsum(tl.reshape(fine, [GROUP * PADDED]), 0), [GROUP, PADDED]) - 1
        tl.store(indices + listed + fine_place, block, mask=fine != 0)
        listed += tl.sum(tl.sum(fine, 1), 0)
        whole = tl.where(coarse * COARSE < key_blocks, 1 - touched, 0)
        tl.store(indices + listed + tl.cumsum(whole, 0) - 1, key_blocks + coarse, mask=whole != 0)
        listed += tl.sum(whole, 0)
    tl.store(counts + row, listed)


def list_tail(mask: BlockMask, tail: PooledTail, k_len: int) -> tuple[Tensor, Tensor]:
    """int32 (indices, counts) of the pooled keys of each row of a mask, like the mask's own: key block j is j, coarse block j is key blocks + j.

    The device is not read: the lists are as wide as any row of a mask of this width can need.
    """
    key_blocks = num_blocks(k_len, mask.block_n)
    coarse = min(tail.coarse, key_blocks)
    # A block that is read turns the one pooled key of its coarse block into as many as there are others in it.
    width = min(key_blocks, num_blocks(key_blocks, coarse) + mask.indices.shape[-1] * max(coarse - 2, 0))
    counts = torch.empty_like(mask.counts, memory_format=torch.contiguous_format)
    indices = torch.empty((*counts.shape, width), dtype=torch.int32, device=counts.device)
    kept = mask.to_dense(key_blocks).contiguous().view(torch.uint8)
    list_tail_kernel[(counts.numel(),)](kept, indices, counts, key_blocks, width, **list_constants(coarse))
    return indices, counts


def pooled_keys(k: Tensor, v: Tensor, key_bias: Tensor | None, sizes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the blocks of both sizes, one behind the other, and the natural logarithm of what the keys of each weigh together.

    k, v `(batch, kv_heads, k_len, head_dim)`, key_bias `(batch, k_len)` -> float32 `(batch, kv_heads, pooled, head_dim)` twice, `(batch, pooled)`.
    """
    weights = torch.zeros((k.shape[0], k.shape[2]), device=k.device) if key_bias is None else key_bias
    keys, values = (torch.cat([block_mean(x, size, key_bias) for size in sizes], 2) for x in (k, v))
    return keys, values, torch.cat([block_bias(weights, size) for size in sizes], 1)
