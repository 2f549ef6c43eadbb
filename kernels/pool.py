"""Blocks of tokens as one: their means, and what their biases weigh together. Both biases and results are logarithms of weights."""

from __future__ import annotations

import torch
from torch import Tensor


def block_mean(x: Tensor, block: int, bias: Tensor | None = None) -> Tensor:
    """Means of blocks of tokens: `(batch, heads, tokens, head_dim)` -> float32 `(batch, heads, blocks, head_dim)`; the last may be ragged.

    bias: float32 `(batch or 1, tokens)`, the logarithms of the tokens' weights. A block that is hidden as a whole has a mean of 0.
    Of a float64 x the means are float64.
    """
    if bias is not None:
        weights, _ = block_weights(bias, block)
        # Equal biases have weights of exactly 1, so that x may keep its precision.
        return block_mean(x * weights.to(x.dtype), block) / block_mean(weights, block).clamp(min=0.5 / block)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = x.shape[2] - x.shape[2] % block
    means: Tensor = x[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=exact)
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=exact)], 2)


def block_weights(bias: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """exp(bias) over its largest in the block, `(batch, 1, tokens, 1)`, and the logarithm of that, `(batch, 1, blocks, 1)`."""
    blocks = torch.nn.functional.pad(bias, (0, -bias.shape[1] % block), value=float("-inf")).unflatten(1, (-1, block))
    peak = blocks.amax(-1, keepdim=True)
    weights: Tensor = (blocks - peak.masked_fill(peak.isneginf(), 0.0)).exp().flatten(1)[:, : bias.shape[1]]
    return weights[:, None, :, None], peak[:, None]


def hidden_blocks(bias: Tensor, block: int) -> Tensor:
    """Bool `(batch, blocks)`: every token of the block has a bias of -inf. bias: `(batch, tokens)`."""
    return block_weights(bias, block)[1][:, 0, :, 0].isneginf()


def block_bias(bias: Tensor, block: int) -> Tensor:
    """What the tokens of a block weigh together, log of the sum of exp(bias): `(batch, tokens)` -> `(batch, blocks)`, -inf where all are hidden."""
    blocks = torch.nn.functional.pad(bias, (0, -bias.shape[1] % block), value=float("-inf")).unflatten(1, (-1, block))
    hidden = blocks.detach().amax(-1).isneginf()
    # A gradient goes through what is visible only: torch's own logsumexp has NaN for it where every number is -inf.
    total: Tensor = blocks.masked_fill(hidden[..., None], 0.0).logsumexp(-1).masked_fill(hidden, float("-inf"))
    return total
