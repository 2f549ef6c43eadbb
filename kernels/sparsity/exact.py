"""What every block pair does in exact attention: how much of it, and how far off the output is where a pooled key stands for the block.

Both look at all rows: every fourth row only finds blocks half as well. All in float32, a piece of the score matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, triton_backend
from ..attention import as_bias, attention
from .tokens import Tokens

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of the score matrix at a time; a few tensors of that size are alive at once, on a CPU in its cache."""

KERNEL_TOLERANCE = 0.02
"""Of costs on a GPU, as a share of all: operands are halves there. The interpreter's are 0.0003 off in float16, 0.01 in bfloat16."""


def mass(tokens: Tokens) -> Tensor:
    """The attention that each key block gets: float32 `(batch, heads, query blocks, key blocks)`, a row sums to the number of its queries."""
    found = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.q.device)
    for head in _heads(tokens):
        for piece in head.pieces():
            piece.store(found, piece.p.unflatten(0, (-1, tokens.granule)).sum(1)[: found.shape[-1]] / piece.total)
    return found


def affordable(device: torch.device) -> bool:
    """Whether `error` costs a few dense calls there: on a CPU, and on a GPU by its kernel alone, because torch would write out every score."""
    return device.type == "cpu" or _kernel_works(device)


@cache
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel is there, and on a GPU, where it is compiled, computes what plain torch does: tried once a process."""
    if not triton_backend.runs_on(device) or device.type == "cpu":
        return triton_backend.runs_on(device)
    try:
        return all(_agrees(device, head_dim) for head_dim in (64, 128))
    except Exception:  # a compiler, a driver, a kernel: whatever fails must not take the user's run with it
        return False


def _agrees(device: torch.device, head_dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, head_dim, generator=generator, dtype=torch.float16)
    bias = torch.randn(1, 300, generator=generator)
    bias[:, 5:80] = -torch.inf
    expected = error(Tokens(q, k[:, :1], v[:, :1], None, bias, 128, 32, head_dim**-0.5))
    q, k, v = (x.to(device) for x in (q, k, v))
    found = _error_by_kernel(Tokens(q, k[:, :1], v[:, :1], None, bias.to(device), 128, 32, head_dim**-0.5))
    return all(((costs.cpu() - right).norm() / right.norm()).item() < KERNEL_TOLERANCE for costs, right in zip(found, expected, strict=True))


def error(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What it costs to leave key blocks to a pooled key, those of a granule and those of a block's size, and |o|^2 of all queries.

    float32 `(batch, heads, query blocks, granules)`, `(batch, heads, query blocks, coarse blocks)` and `(batch,)`. A cost is the sum over the
    queries of |r|^2, r the change of a query's output o to first order: r = N - T w - (D - T) o, with N = sum p v and D = sum p over the key
    block, p the exact weights, w the mean of its values and T the weight of its pooled key.
    """
    shape, device = tokens.shape, tokens.q.device
    if _kernel_works(device) and tokens.q.shape[-1] <= triton_backend.MAX_HEAD_DIM:
        return _error_by_kernel(tokens)
    fine_means, coarse_means = tokens.pooled_keys(tokens.granule), tokens.pooled_keys(tokens.block)
    fine = torch.empty(shape, dtype=torch.float32, device=device)
    coarse = torch.empty(*shape[:3], coarse_means[0].shape[2], dtype=torch.float32, device=device)
    energy = torch.zeros(shape[0], device=device)
    for head in _heads(tokens):
        small, large = _Pooled.of(head, *fine_means), _Pooled.of(head, *coarse_means)
        around = _Around.of(head, small)
        values = head.values.unflatten(0, (-1, tokens.block)).mT
        for piece in head.pieces():
            sums = values @ piece.p.unflatten(0, (-1, tokens.block))  # N: (blocks, head_dim, rows)
            out = sums.sum(0) / piece.total
            length = out.square().sum(0, keepdim=True)
            energy[head.sample] += (length * piece.shown).sum()
            share = piece.total.square().reciprocal_()
            piece.store(fine, around.costs(piece, small, out, length) * share)
            pooled = large.weights(piece)
            over = piece.p.unflatten(0, (-1, tokens.block)).sum(1).sub_(pooled)
            piece.store(coarse, sums.sub_(large.values[..., None] * pooled[:, None]).sub_(over[:, None] * out).square_().sum(1) * share)
    return fine, coarse, energy


def _error_by_kernel(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    precision = "auto" if dispatch.forced.get() else "native"  # one that is forced is the only one that can be asked
    out, lse = attention(tokens.q, tokens.k, tokens.v, key_bias=tokens.key_bias, scale=tokens.scale, precision=precision, return_lse=True)
    shown = torch.ones(tokens.q.shape[2], device=out.device) if tokens.query_bias is None else tokens.query_bias[0].exp()
    call = tokens.q, tokens.k, tokens.v, out, lse, shown, tokens.key_bias, tokens.scale, tokens.block
    energy = (out.float().square().sum(-1) * shown).sum((1, 2))
    fine, coarse = triton_backend.tail_error(*call, tokens.granule)
    return fine, coarse, energy


def two_level(fine: Tensor, coarse: Tensor, ratio: int) -> Tensor:
    """What each granule adds to the error when it is dropped, where all of its coarse block dropped has one pooled key in place of its own each.

    fine `(..., granules)`, coarse `(..., coarse blocks)` of `ratio` granules, as `error` gives them; the result is like fine. Of a coarse block one
    may drop all, at its coarse cost, or all but the dearest, at their fine costs. The first to be kept is worth what it takes off the coarse
    cost; where the next ones are worth more, they can only come together, and each counts as their mean. So costs of what is dropped add up, and
    a threshold over them is the best choice at every level of it (the lower convex hull of cost over pairs).
    """
    groups = F.pad(fine, (0, coarse.shape[-1] * ratio - fine.shape[-1])).unflatten(-1, (-1, ratio))
    costs, order = groups.sort(-1, descending=True)
    worth = torch.cat([(coarse[..., None] - costs[..., 1:].sum(-1, keepdim=True)), costs[..., 1:]], -1)
    means = worth.cumsum(-1) / torch.arange(1, ratio + 1, device=fine.device)
    best, length = means.max(-1, keepdim=True)
    worth = torch.where(torch.arange(ratio, device=fine.device) <= length, best, worth)
    return torch.empty_like(worth).scatter_(-1, order, worth).flatten(-2)[..., : fine.shape[-1]]


@dataclass(frozen=True, eq=False)
class _Pooled:
    """The pooled keys of one size of a head."""

    keys: Tensor  # (blocks, head_dim)
    values: Tensor
    bias: Tensor  # (blocks, 1)

    @classmethod
    def of(cls, head: _Head, keys: Tensor, values: Tensor, bias: Tensor) -> _Pooled:
        own = bias[min(head.sample, len(bias) - 1), :, None]
        return cls(keys[head.sample, head.kv_head], values[head.sample, head.kv_head], own)

    def weights(self, piece: _Piece) -> Tensor:
        """T in units of p, `(blocks, rows)`."""
        return torch.addmm(self.bias - piece.peak, self.keys, piece.queries).exp_()


@dataclass(frozen=True, eq=False)
class _Around:
    """Values of a head about the means of their granules: N would be as long as the values there are, of so few keys.

    N is D w + sum p (v - w), so that r = sum p (v - w) + (D - T) (w - o), and |r|^2 takes small products with the Gram matrix of v - w.
    """

    values: Tensor  # v - w, (granules, keys, head_dim)
    gram: Tensor  # (granules, keys, keys)
    lean: Tensor  # (v - w) w, (granules, keys, 1)

    @classmethod
    def of(cls, head: _Head, pooled: _Pooled) -> _Around:
        granule = head.tokens.granule
        values = head.values[: len(pooled.values) * granule].unflatten(0, (-1, granule)) - pooled.values[:, None]
        return cls(values, values @ values.mT, values @ pooled.values[..., None])

    def costs(self, piece: _Piece, pooled: _Pooled, out: Tensor, length: Tensor) -> Tensor:
        """|r|^2 in units of p squared, `(granules, rows)`. out `(head_dim, rows)`, length `(1, rows)` its squared norms."""
        granules, keys, head_dim = self.values.shape
        p = piece.p[: granules * keys].view(granules, keys, -1)
        over = p.sum(1).sub_(pooled.weights(piece))
        far = torch.addmm(pooled.values.square().sum(1, keepdim=True) + length, pooled.values, out, alpha=-2)
        slope = (self.values.view(-1, head_dim) @ out).view_as(p).neg_().add_(self.lean).mul_(2 * over[:, None]).baddbmm_(self.gram, p)
        return slope.mul_(p).sum(1).add_(over.square_().mul_(far)).clamp_(min=0.0)


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
    """Some queries of one head. Keys come first, so that the sums over a block's keys run along memory. p is yet to be divided by its total."""

    where: tuple[int, int, slice]  # sample, head, query blocks
    queries: Tensor  # (head_dim, rows), scaled
    p: Tensor  # exp(score - peak), (tokens, rows)
    peak: Tensor  # (1, rows)
    total: Tensor  # (1, rows)
    shown: Tensor  # (1, rows): 1, or 0 for what only fills a block
    block: int

    def store(self, found: Tensor, rows: Tensor) -> None:
        """Put the sums over the rows of each query block into `found`; rows: `(key blocks, rows)`."""
        found[self.where] = (rows * self.shown).unflatten(1, (-1, self.block)).sum(2).T


@dataclass(frozen=True, eq=False)
class _Head:
    """Keys and values of one head, float32, the ragged last block filled up with hidden keys, and the queries that read them."""

    sample: int
    kv_head: int
    heads: range
    tokens: Tokens
    keys: Tensor  # (tokens, head_dim)
    values: Tensor
    bias: Tensor  # (tokens, 1)

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
                peak = p.amax(0, keepdim=True)
                peak.masked_fill_(peak.isneginf(), 0.0)  # every key is hidden: p is 0
                p.sub_(peak).exp_()
                total = p.sum(0, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny)
                where = self.sample, number, slice(first // block, (first + part.shape[1]) // block)
                yield _Piece(where, part, p, peak, total, shown[:, first : first + rows], block)


def _heads(tokens: Tokens) -> Iterator[_Head]:
    spare = -tokens.k.shape[2] % tokens.block
    groups = tokens.q.shape[1] // tokens.k.shape[1]
    bias = torch.zeros(1, tokens.k.shape[2], device=tokens.k.device) if tokens.key_bias is None else tokens.key_bias
    bias = F.pad(bias, (0, spare), value=float("-inf"))
    for sample in range(tokens.k.shape[0]):
        for head in range(tokens.k.shape[1]):
            k, v = (F.pad(x[sample, head].float(), (0, 0, 0, spare)) for x in (tokens.k, tokens.v))
            yield _Head(sample, head, range(head * groups, (head + 1) * groups), tokens, k, v, bias[min(sample, len(bias) - 1), :, None])
