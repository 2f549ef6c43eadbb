"""Block-sparse attention in plain torch. Blocks that a row does not read are neither copied nor multiplied.

Query blocks with the same number of key blocks are computed together: their key blocks are gathered into one contiguous batch
and handed to torch's own fused attention, in chunks small enough to stay in cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, num_blocks

CPU_CHUNK_BYTES = 32 << 20
"""Gathered keys and values of one chunk on a CPU: they should still be in the last-level cache when they are multiplied. Smaller
chunks gain a few percent on an idle machine and lose far more on a busy one, because every chunk ends with threads waiting."""

CUDA_CHUNK_BYTES = 256 << 20


def run(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, key_bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.attention.attention`. Reads the row lengths back from the device once."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    block_m, block_n = block_mask.block_m, block_mask.block_n
    query_blocks, key_blocks = num_blocks(q_len, block_m), num_blocks(k_len, block_n)

    # A row is one query block of one head: (batch * heads * query blocks) of them.
    queries, keys, values = _blocks(q, block_m), _blocks(k, block_n), _blocks(v, block_n)
    bias = _bias_blocks(key_bias, batch, k_len, block_n, q)
    counts = block_mask.counts.expand(batch, heads, query_blocks).reshape(-1)
    indices = block_mask.indices.expand(batch, heads, query_blocks, -1).flatten(0, 2)
    sample = torch.arange(batch, dtype=torch.int32, device=q.device).repeat_interleave(heads * query_blocks)[:, None]
    kv_head = torch.arange(kv_heads, dtype=torch.int32, device=q.device).repeat_interleave(heads // kv_heads * query_blocks).repeat(batch)[:, None]
    row_first_block = (sample * kv_heads + kv_head) * key_blocks
    row_first_bias = sample * key_blocks

    order, lengths, sizes = _groups(counts)
    if len(lengths) > 1:
        queries, indices, row_first_block, row_first_bias = (x.index_select(0, order) for x in (queries, indices, row_first_block, row_first_bias))

    nothing = queries[:0].sum() + keys[:0].sum() + values[:0].sum()  # 0, in the graph: where no row reads anything, gradients are 0
    outs, lses = [], []
    first = 0
    for length, size in zip(lengths, sizes, strict=True):
        if length == 0:
            outs.append(queries.new_zeros((size, block_m, head_dim)) + nothing)
            lses.append(torch.full((size, block_m), float("-inf"), dtype=_exact(q), device=q.device))
        else:
            chunk_bytes = CUDA_CHUNK_BYTES if q.is_cuda else CPU_CHUNK_BYTES
            chunk = max(1, chunk_bytes // (2 * length * block_n * head_dim * q.element_size()))
            for start in range(first, first + size, chunk):
                rows = slice(start, min(start + chunk, first + size))
                ids = indices[rows, :length]
                kept = (ids + row_first_block[rows]).flatten()
                row_bias = None if bias is None else bias.index_select(0, (ids + row_first_bias[rows]).flatten()).view(len(ids), 1, -1)
                out, lse = _attend(
                    queries[rows],
                    keys.index_select(0, kept).view(len(ids), -1, head_dim),
                    values.index_select(0, kept).view(len(ids), -1, head_dim),
                    row_bias,
                    scale,
                    return_lse,
                )
                outs.append(out)
                lses.append(lse)
        first += size

    def restore(rows: list[Tensor]) -> Tensor:
        x = torch.cat(rows)
        if len(lengths) > 1:
            x = x.index_select(0, order.argsort())
        return x.view(batch, heads, query_blocks * block_m, *x.shape[2:])[:, :, :q_len]

    return restore(outs), restore(lses) if return_lse else None


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Dense attention of `(rows, block_m, head_dim)` on `(rows, keys, head_dim)` with bias `(rows, 1, keys)`; the lse is empty unless asked for."""
    mask = peak = hidden = None
    if bias is not None:
        bias, peak, hidden = shifted(bias)
        mask = as_attn_mask(bias, queries)[:, None]
    if return_lse:  # torch's fused op keeps the lse to itself
        exact = _exact(queries)
        scores = torch.bmm(queries.to(exact), keys.to(exact).transpose(1, 2)) * scale
        if bias is not None:
            scores = scores + bias
        top = scores.detach().amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top.isneginf(), 0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)  # torch's own logsumexp has NaN for gradient where every score is -inf
        lse = (total.log() + top).masked_fill(empty, float("-inf"))[..., 0]
        out = torch.bmm(weights / total, values.to(exact)).to(values.dtype)
        return out, lse if peak is None else lse + peak[..., 0]
    out = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=scale)[:, 0]
    if hidden is not None:
        out = out.masked_fill(hidden, 0.0)  # every key is hidden: the row reads nothing
    return out, queries.new_empty(0)


def shifted(bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(bias `(..., keys)` less its largest, that `(..., 1)` or 0 where every key is hidden, and bool `(..., 1)`, where that is so).

    The softmax does not see a number that is common to a row. With its largest at 0, a bias swallows no score however low all of it is.
    """
    peak = bias.detach().amax(-1, keepdim=True)
    hidden = peak.isneginf()
    peak = peak.masked_fill(hidden, 0.0)
    return bias - peak, peak, hidden


def as_attn_mask(bias: Tensor, q: Tensor) -> Tensor:
    """A shifted bias as torch's op takes it: on CUDA only in q's dtype, which rounds what is far below the row's largest."""
    return bias.to(q.dtype) if q.is_cuda else bias


def _exact(q: Tensor) -> torch.dtype:
    """The dtype of scores and lse."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor, block: int) -> Tensor:
    """`(batch, heads, tokens, head_dim)` -> contiguous `(batch * heads * blocks, block, head_dim)`, the ragged end filled with zeros."""
    spare = -x.shape[2] % block
    return (F.pad(x, (0, 0, 0, spare)) if spare else x).reshape(-1, block, x.shape[3])


def _bias_blocks(key_bias: Tensor | None, batch: int, k_len: int, block_n: int, q: Tensor) -> Tensor | None:
    """`(batch * key blocks, block_n)`, -inf behind the last key; None where nothing is hidden or weighed."""
    spare = -k_len % block_n
    if key_bias is None and not spare:
        return None
    bias = torch.zeros((batch, k_len), dtype=_exact(q), device=q.device) if key_bias is None else key_bias
    return F.pad(bias, (0, spare), value=float("-inf")).reshape(-1, block_n)


def _groups(counts: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """(rows sorted by length, the distinct lengths ascending, the number of rows of each)."""
    ordered, order = counts.sort(stable=True)
    lengths, sizes = ordered.unique_consecutive(return_counts=True)
    return order, lengths.tolist(), sizes.tolist()
