"""BlockMask: which key blocks each query block reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def num_blocks(tokens: int, block: int) -> int:
    """Number of blocks of `block` tokens that cover `tokens` tokens; the last one may be ragged."""
    return -(-tokens // block)


@dataclass(frozen=True)
class BlockMask:
    """For every (batch, head, query block) the ascending list of key blocks that it reads.

    indices: int32 `(batch, heads, query blocks, width)`. The first `counts` entries of a row are key-block ids in ascending
        order, the rest is padding that no kernel reads. `batch` and `heads` may be 1, which stands for "the same for all".
    counts: int32 `(batch, heads, query blocks)`. 0 is allowed: such a row's output is zero and its lse is -inf.
    block_m, block_n: tokens in a query block and in a key block. The last block of either side may be ragged.
    """

    indices: Tensor
    counts: Tensor
    block_m: int
    block_n: int

    @classmethod
    def from_dense(cls, mask: Tensor, block_m: int, block_n: int, *, width: int | None = None) -> BlockMask:
        """Build from a boolean `(batch, heads, query blocks, key blocks)` mask.

        width: an upper bound of the longest row, where the caller knows one. Without it the longest row is read back from the device,
        so build a mask once and use it often. Raises ValueError on anything but a boolean mask of four dimensions.
        """
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise ValueError(
                f"BlockMask.from_dense: mask is {mask.dtype} with shape {tuple(mask.shape)}; "
                "pass a boolean (batch, heads, query blocks, key blocks) tensor"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        if width is None:
            width = max(int(counts.amax()), 1)
        # A stable descending sort of booleans lists the kept ids first and keeps them ascending.
        indices = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
        return cls(indices.to(torch.int32).contiguous(), counts.contiguous(), block_m, block_n)

    @classmethod
    def from_indices(cls, indices: Tensor, block_m: int, block_n: int) -> BlockMask:
        """Build from key-block ids `(batch, heads, query blocks, kept)`, the same number in every row. Never reads the device."""
        counts = torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32, device=indices.device)
        return cls(indices.sort(dim=-1).values.to(torch.int32), counts, block_m, block_n)

    def to_dense(self, key_blocks: int) -> Tensor:
        """Boolean `(batch, heads, query blocks, key_blocks)`, the inverse of `from_dense`."""
        kept = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        target = torch.where(kept, self.indices.long(), key_blocks)
        mask = torch.zeros((*self.counts.shape, key_blocks + 1), dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, target, True)[..., :key_blocks]

    def token_mask(self, q_len: int, k_len: int) -> Tensor:
        """Boolean `(batch, heads, q_len, k_len)`: the mask token by token, for references and small tests."""
        dense = self.to_dense(num_blocks(k_len, self.block_n))
        dense = dense.repeat_interleave(self.block_m, 2).repeat_interleave(self.block_n, 3)
        return dense[:, :, :q_len, :k_len]

    def density(self, k_len: int) -> Tensor:
        """Kept / all real (query block, key block) pairs, as a float32 scalar on the mask's device."""
        return self.counts.float().mean() / num_blocks(k_len, self.block_n)
