"""What every block pair does in exact attention: how much of it, and how far off the output is where a pooled key stands for the block.

Both look at all rows: every fourth row only finds blocks half as well. All in float32, a piece of the score matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import as_bias
from .tokens import Tokens

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of the score matrix at a time; a few tensors of that size are alive at once, on a CPU in its cache."""


def mass(tokens: Tokens) -> Tensor:
    """The attention that each key block gets: float32 `(batch, heads, query blocks, key blocks)`, a row sums to the number of its queries."""
    found = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.q.device)
    for head in _heads(tokens):
        for piece in head.pieces():
            piece.store(found, piece.p.unflatten(0, (-1, tokens.granule)).sum(1))
    return found


def error(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(what it costs to leave a key block to its pooled key, |o|^2 of all queries): float32 `(batch, heads, query blocks, key blocks)`, `(batch,)`.

    The cost is the sum over the queries of |r|^2, r the change of a query's output o to first order: r = N - T w - (D - T) o, with N = sum p v
    and D = sum p over the block, p the exact weights, w the mean of its values and T the weight of its pooled key. About the mean N is
    D w + sum p (v - w), so that r = sum p (v - w) + (D - T) (w - o): |r|^2 needs a small product with the Gram matrix of v - w, and no N.
    """
    found = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.q.device)
    energy = torch.zeros(tokens.q.shape[0], device=tokens.q.device)
    for head in _heads(tokens):
        means = head.pooled_values
        around = head.values.unflatten(0, (-1, tokens.granule)) - means[:, None]  # (blocks, keys, head_dim)
        gram = around @ around.mT
        lean = around @ means[..., None]  # (blocks, keys, 1)
        for piece in head.pieces():
            out = head.values.T @ piece.p  # (head_dim, rows)
            length = out.square().sum(0, keepdim=True)
            p = piece.p.unflatten(0, (-1, tokens.granule))
            pooled = torch.addmm(head.pooled_bias - piece.lse, head.pooled_keys, piece.queries).exp_()
            over = p.sum(1).sub_(pooled)
            far = torch.addmm(means.square().sum(1, keepdim=True) + length, means, out, alpha=-2)
            slope = (around.flatten(0, 1) @ out).view_as(p).neg_().add_(lean).mul_(2 * over[:, None]).baddbmm_(gram, p)
            piece.store(found, slope.mul_(p).sum(1).add_(over.square_().mul_(far)).clamp_(min=0.0))
            energy[head.sample] += (length * piece.shown).sum()
    return found, energy


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, key_bias: Tensor | None, scale: float | None) -> Tensor:
    """|out - exact| / |exact| of some queries, rows int64 `(rows,)`, over all samples and heads: a float32 scalar.

    out, q `(batch, heads, tokens, head_dim)`; k, v with as many heads or fewer; key_bias `(batch, tokens)` or None.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
    mask = None if key_bias is None else as_bias(key_bias, q).to(q.dtype)[:, None, None]
    exact = F.scaled_dot_product_attention(q.index_select(2, rows), k, v, attn_mask=mask, scale=scale).float()
    error: Tensor = (out.index_select(2, rows).float() - exact).norm() / exact.norm()
    return error


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some queries of one head. Keys come first, so that the sums over a block's keys run along memory."""

    where: tuple[int, int, slice]  # sample, head, query blocks
    queries: Tensor  # (head_dim, rows), scaled
    p: Tensor  # (tokens, rows), exact
    lse: Tensor  # (1, rows)
    shown: Tensor  # (1, rows): 1, or 0 for what only fills a block
    block: int

    def store(self, found: Tensor, rows: Tensor) -> None:
        """Put the sums over the rows of each query block into `found`; rows: `(key blocks, rows)`."""
        found[self.where] = (rows * self.shown).unflatten(1, (-1, self.block)).sum(2).T


@dataclass(frozen=True, eq=False)
class _Head:
    """Keys and values of one head, float32, the ragged last block filled up with hidden keys, and the queries that read them."""

    sample: int
    heads: range
    tokens: Tokens
    keys: Tensor  # (tokens, head_dim)
    values: Tensor
    bias: Tensor  # (tokens, 1)
    pooled_keys: Tensor  # (key blocks, head_dim)
    pooled_values: Tensor
    pooled_bias: Tensor  # (key blocks, 1)

    def pieces(self) -> Iterator[_Piece]:
        tokens, block = self.tokens, self.tokens.block
        spare = -tokens.q.shape[2] % block
        rows = max(1, PIECE_BYTES[tokens.q.device.type] // (4 * len(self.keys)) // block) * block
        shown = torch.ones(1, tokens.q.shape[2], device=tokens.q.device) if tokens.query_bias is None else tokens.query_bias.exp()
        shown = F.pad(shown, (0, spare))
        for number in self.heads:
            queries = F.pad(tokens.q[self.sample, number].float() * tokens.scale, (0, 0, 0, spare)).T
            for first in range(0, queries.shape[1], rows):
                part = queries[:, first : first + rows]
                p = torch.addmm(self.bias, self.keys, part)
                lse = p.logsumexp(0, keepdim=True)
                lse.masked_fill_(lse.isneginf(), 0.0)  # every key is hidden: p is 0
                where = self.sample, number, slice(first // block, (first + part.shape[1]) // block)
                yield _Piece(where, part, p.sub_(lse).exp_(), lse, shown[:, first : first + rows], block)


def _heads(tokens: Tokens) -> Iterator[_Head]:
    spare = -tokens.k.shape[2] % tokens.granule
    groups = tokens.q.shape[1] // tokens.k.shape[1]
    means, mean_values, weights = tokens.pooled_keys()
    bias = torch.zeros(1, tokens.k.shape[2], device=tokens.k.device) if tokens.key_bias is None else tokens.key_bias
    bias = F.pad(bias, (0, spare), value=float("-inf"))
    for sample in range(tokens.k.shape[0]):
        own = min(sample, len(bias) - 1)
        for head in range(tokens.k.shape[1]):
            k, v = (F.pad(x[sample, head].float(), (0, 0, 0, spare)) for x in (tokens.k, tokens.v))
            heads = range(head * groups, (head + 1) * groups)
            yield _Head(sample, heads, tokens, k, v, bias[own, :, None], means[sample, head], mean_values[sample, head], weights[own, :, None])
