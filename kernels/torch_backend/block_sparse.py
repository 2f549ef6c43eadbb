"""Block-sparse attention in plain torch. Blocks that a row does not read are neither copied nor multiplied.

Query blocks with the same number of key blocks are computed together: their key blocks are gathered into one contiguous batch
and handed to torch's own fused attention, in chunks small enough to stay in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, PooledTail, num_blocks
from ..pool import block_bias, block_mean

CPU_CHUNK_BYTES = 32 << 20
"""Gathered keys and values of one chunk on a CPU: they should still be in the last-level cache when they are multiplied. Smaller
chunks gain a few percent on an idle machine and lose far more on a busy one, because every chunk ends with threads waiting."""

CUDA_CHUNK_BYTES = 256 << 20


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
    tail: PooledTail | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.attention.attention`. Reads the row lengths back from the device once, and with a tail once more a chunk."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    block_m, block_n = block_mask.block_m, block_mask.block_n
    query_blocks, key_blocks = num_blocks(q_len, block_m), num_blocks(k_len, block_n)

    # A row is one query block of one head: (batch * heads * query blocks) of them.
    queries, keys, values = _blocks(q, block_m), _blocks(k, block_n), _blocks(v, block_n)
    if tail is not None and key_bias is None:
        key_bias = torch.zeros((batch, k_len), dtype=_exact(q), device=q.device)
    bias = _bias_blocks(key_bias, batch, k_len, block_n, q)
    pooled = None if tail is None or key_bias is None else _Pooled.of(k, v, key_bias, block_n, tail)
    counts = block_mask.counts.expand(batch, heads, query_blocks).reshape(-1)
    indices = block_mask.indices.expand(batch, heads, query_blocks, -1).flatten(0, 2)
    sample = torch.arange(batch, dtype=torch.int32, device=q.device).repeat_interleave(heads * query_blocks)[:, None]
    kv_head = torch.arange(kv_heads, dtype=torch.int32, device=q.device).repeat_interleave(heads // kv_heads * query_blocks).repeat(batch)[:, None]
    row_head = sample * kv_heads + kv_head
    sample = sample.expand_as(row_head)

    order, lengths, sizes = _groups(counts)
    if len(lengths) > 1:
        queries, indices, row_head, sample = (x.index_select(0, order) for x in (queries, indices, row_head, sample))

    nothing = queries[:0].sum() + keys[:0].sum() + values[:0].sum()  # 0, in the graph: where no row reads anything, gradients are 0
    outs, lses = [], []
    first = 0
    for length, size in zip(lengths, sizes, strict=True):
        if length == 0 and pooled is None:
            outs.append(queries.new_zeros((size, block_m, head_dim)) + nothing)
            lses.append(torch.full((size, block_m), float("-inf"), dtype=_exact(q), device=q.device))
        else:
            chunk_bytes = CUDA_CHUNK_BYTES if q.is_cuda else CPU_CHUNK_BYTES
            gathered = length * block_n + (0 if pooled is None else pooled.most(length))
            chunk = max(1, chunk_bytes // (2 * gathered * head_dim * q.element_size()))
            for start in range(first, first + size, chunk):
                rows = slice(start, min(start + chunk, first + size))
                ids = indices[rows, :length]
                row_keys, row_values = (_gather(x, ids, row_head[rows], key_blocks) for x in (keys, values))
                row_bias = None if bias is None else _gather(bias, ids, sample[rows], key_blocks)
                if pooled is not None and row_bias is not None:
                    row_keys, row_values, row_bias = pooled.behind(row_keys, row_values, row_bias, ids, row_head[rows], sample[rows])
                out, lse = _attend(queries[rows], row_keys, row_values, None if row_bias is None else row_bias[:, None], scale, return_lse)
                outs.append(out)
                lses.append(lse)
        first += size

    def restore(rows: list[Tensor]) -> Tensor:
        x = torch.cat(rows)
        if len(lengths) > 1:
            x = x.index_select(0, order.argsort())
        return x.view(batch, heads, query_blocks * block_m, *x.shape[2:])[:, :, :q_len]

    return restore(outs), restore(lses) if return_lse else None


@dataclass(frozen=True, eq=False)
class _Pooled:
    """All pooled keys of a call, for its rows to choose from."""

    tail: PooledTail
    key_blocks: int
    keys: Tensor  # (batch * kv_heads * pooled keys, 1, head_dim)
    values: Tensor
    bias: Tensor  # (batch * pooled keys, 1)
    each: int  # pooled keys of a head

    @classmethod
    def of(cls, k: Tensor, v: Tensor, key_bias: Tensor, block_n: int, tail: PooledTail) -> _Pooled:
        sizes = tail.sizes(block_n)
        keys, values = (torch.cat([block_mean(x, size, key_bias) for size in sizes], 2).to(x.dtype) for x in (k, v))
        bias = torch.cat([block_bias(key_bias, size) for size in sizes], 1)
        keys, values = (x.flatten(0, 2)[:, None] for x in (keys, values))
        return cls(tail, num_blocks(k.shape[2], block_n), keys, values, bias.flatten()[:, None], bias.shape[1])

    def most(self, length: int) -> int:
        """An upper bound of what a row of that many key blocks has."""
        return min(num_blocks(self.key_blocks, self.tail.coarse) + length * self.tail.coarse, self.each)

    def behind(self, keys: Tensor, values: Tensor, bias: Tensor, ids: Tensor, head: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gathered keys and values `(rows, keys, head_dim)`, bias `(rows, keys)`; with the pooled keys of rows that read blocks `ids` behind."""
        kept = torch.zeros((len(ids), self.key_blocks), dtype=torch.bool, device=ids.device).scatter_(1, ids.long(), True)
        terms = self.tail.terms(kept)
        counts = terms.sum(1, keepdim=True)
        width = int(counts.amax())
        which = terms.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        fill = torch.arange(width, device=ids.device) >= counts
        keys, values = (torch.cat([x, _gather(pooled, which, head, self.each)], 1) for x, pooled in ((keys, self.keys), (values, self.values)))
        return keys, values, torch.cat([bias, _gather(self.bias, which, sample, self.each).masked_fill(fill, float("-inf"))], 1)


def _gather(blocks: Tensor, ids: Tensor, owner: Tensor, each: int) -> Tensor:
    """What rows read, `(rows, ids * block, ...)`, of blocks `(owners * each, block, ...)`. ids: `(rows, ids)` of its owner's; owner: `(rows, 1)`."""
    return blocks.index_select(0, (ids + owner * each).flatten()).view(len(ids), ids.shape[1] * blocks.shape[1], *blocks.shape[2:])


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
