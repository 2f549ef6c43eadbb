"""BlockMask: which key blocks each query block reads. PooledTail: what stands for those that it does not."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor


def num_blocks(tokens: int, block: int) -> int:
    """Number of blocks of `block` tokens that cover `tokens` tokens; the last one may be ragged."""
    return -(-tokens // block)


CHECK_ON_DEVICE = False
"""Look at the ids of masks on a device, too, which waits for it. Tests set it; a mask on the host is always looked at."""


@dataclass(frozen=True)
class BlockMask:
    """For every (batch, head, query block) the ascending list of key blocks that it reads.

    indices: int32 `(batch, heads, query blocks, width)`. The first `counts` entries of a row are key-block ids in ascending
        order, the rest is padding that no kernel reads. `batch` and `heads` may be 1, which stands for "the same for all".
    counts: int32 `(batch, heads, query blocks)`. 0 is allowed: such a row's output is zero and its lse is -inf.
    block_m, block_n: tokens in a query block and in a key block. The last block of either side may be ragged.
    key_blocks: how many key blocks there are; None where the maker does not say, then the ids tell the least number.
    trusted: the maker vouches for counts and ids, which are not looked at.
    Raises ValueError on anything else, because a kernel would read other heads' keys or beyond them.
    """

    indices: Tensor
    counts: Tensor
    block_m: int
    block_n: int
    key_blocks: int | None = None
    trusted: InitVar[bool] = False
    last: int | None = field(init=False, default=None, repr=False, compare=False)  # the largest id, where ids were looked at

    def __post_init__(self, trusted: bool) -> None:
        indices, counts = self.indices, self.counts
        if not all(isinstance(size, int) and size >= 1 for size in (self.block_m, self.block_n)):
            raise ValueError(f"BlockMask: block_m is {self.block_m}, block_n {self.block_n}; both must be whole numbers, 1 or more")
        if indices.ndim != 4 or indices.shape[:3] != counts.shape:
            raise ValueError(
                f"BlockMask: indices has shape {tuple(indices.shape)}, counts {tuple(counts.shape)}; "
                "expected (batch, heads, query blocks, width) and (batch, heads, query blocks)"
            )
        if indices.dtype != torch.int32 or counts.dtype != torch.int32:
            raise ValueError(f"BlockMask: indices is {indices.dtype}, counts {counts.dtype}; both must be torch.int32")
        if indices.device != counts.device:
            raise ValueError(f"BlockMask: indices is on {indices.device}, counts on {counts.device}; move one of them")
        # Nothing on a device is looked at unless a test wants it, and nothing while torch.compile traces.
        looked_at = not trusted and not torch.compiler.is_compiling() and (indices.device.type == "cpu" or CHECK_ON_DEVICE)
        object.__setattr__(self, "last", self._check() if looked_at else None)

    def _check(self) -> int:
        """The largest id. Raises ValueError unless counts and ids are in range and ids ascend."""
        counts, width = self.counts, self.indices.shape[-1]
        if ((counts < 0) | (counts > width)).any():
            raise ValueError(f"BlockMask: counts go from {int(counts.min())} to {int(counts.max())}; expected 0 to the width of indices, {width}")
        used = torch.arange(width, device=counts.device) < counts[..., None]
        ids = self.indices.masked_fill(~used, 0)
        first, last = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
        if first < 0 or (self.key_blocks is not None and last >= self.key_blocks):
            which = "" if self.key_blocks is None else f", {self.key_blocks - 1}"
            raise ValueError(f"BlockMask: ids go from {first} to {last}; expected 0 to the last key block{which}")
        if ((ids.diff(dim=-1) <= 0) & used[..., 1:]).any():
            raise ValueError("BlockMask: the ids of a row do not ascend, or one occurs twice; sort them, and list each once")
        return last

    def check_fit(self, q: Tensor, k: Tensor) -> None:
        """Raises ValueError unless this mask is for a q `(batch, heads, q_len, head_dim)` and k `(batch, kv_heads, k_len, head_dim)` like these."""
        (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
        query_blocks, key_blocks = num_blocks(q_len, self.block_m), num_blocks(k_len, self.block_n)
        if self.indices.device != q.device:
            raise ValueError(f"attention: block_mask is on {self.indices.device} but q is on {q.device}; move one of them")
        if self.key_blocks not in (None, key_blocks) or (self.last or 0) >= key_blocks:
            covered = self.key_blocks or f"{self.last} and more"
            raise ValueError(f"attention: block_mask covers {covered} key blocks; expected {key_blocks} for k_len {k_len} and block_n {self.block_n}")
        covers = tuple(self.counts.shape)
        if covers[0] not in (1, batch) or covers[1] not in (1, heads) or covers[2] != query_blocks:
            raise ValueError(
                f"attention: block_mask covers (batch, heads, query blocks) = {covers}; expected "
                f"({batch} or 1, {heads} or 1, {query_blocks}) for q_len {q_len} and block_m {self.block_m}"
            )

    @classmethod
    def from_dense(cls, mask: Tensor, block_m: int, block_n: int, *, width: int | None = None) -> BlockMask:
        """Build from a boolean `(batch, heads, query blocks, key blocks)` mask.

        width: an upper bound of the longest row, where the caller knows one and vouches for it. Without it the longest row is read back from
        the device, so build a mask once and use it often. Raises ValueError on anything but a boolean mask of four dimensions.
        """
        if mask.dtype != torch.bool or mask.ndim != 4 or 0 in mask.shape:
            raise ValueError(
                f"BlockMask.from_dense: mask is {mask.dtype} with shape {tuple(mask.shape)}; "
                "pass a boolean (batch, heads, query blocks, key blocks) tensor, none of them 0"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        if width is None:
            width = max(int(counts.amax()), 1)
        # A stable descending sort of booleans lists the kept ids first and keeps them ascending.
        indices = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
        return cls(indices.to(torch.int32).contiguous(), counts.contiguous(), block_m, block_n, mask.shape[-1], trusted=True)

    @classmethod
    def from_indices(cls, indices: Tensor, block_m: int, block_n: int) -> BlockMask:
        """Build from key-block ids `(batch, heads, query blocks, kept)`, integers, the same number in every row. Never reads the device."""
        if indices.ndim != 4 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(
                f"BlockMask.from_indices: indices is {indices.dtype} with shape {tuple(indices.shape)}; "
                "pass an integer (batch, heads, query blocks, kept) tensor"
            )
        counts = torch.full(indices.shape[:-1], indices.shape[-1], dtype=torch.int32, device=indices.device)
        bounds = torch.iinfo(torch.int32)  # a larger id must not come round as a small one
        return cls(indices.clamp(bounds.min, bounds.max).sort(dim=-1).values.to(torch.int32), counts, block_m, block_n)

    def to_dense(self, key_blocks: int) -> Tensor:
        """Boolean `(batch, heads, query blocks, key_blocks)`, the inverse of `from_dense`."""
        kept = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        target = torch.where(kept, self.indices.long(), key_blocks)
        mask = torch.zeros((*self.counts.shape, key_blocks + 1), dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, target, True)[..., :key_blocks]

    def to_bits(self, key_blocks: int) -> Tensor:
        """uint8 `(batch, heads, query blocks, ceil(key_blocks / 8))`, key block j in bit j % 8 of byte j // 8: small enough to keep for a run."""
        dense = torch.nn.functional.pad(self.to_dense(key_blocks), (0, -key_blocks % 8)).unflatten(-1, (-1, 8))
        bits: Tensor = (dense << torch.arange(8, dtype=torch.uint8, device=dense.device)).sum(-1, dtype=torch.uint8)
        return bits

    @classmethod
    def from_bits(cls, bits: Tensor, block_m: int, block_n: int, key_blocks: int, width: int) -> BlockMask:
        """The inverse of `to_bits`, for the width that the mask had. Never reads the device."""
        dense = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten(-2)[..., :key_blocks]
        return cls.from_dense(dense.bool(), block_m, block_n, width=width)

    def token_mask(self, q_len: int, k_len: int) -> Tensor:
        """Boolean `(batch, heads, q_len, k_len)`: the mask token by token, for references and small tests."""
        dense = self.to_dense(num_blocks(k_len, self.block_n))
        dense = dense.repeat_interleave(self.block_m, 2).repeat_interleave(self.block_n, 3)
        return dense[:, :, :q_len, :k_len]

    def density(self, k_len: int) -> Tensor:
        """Kept / all real (query block, key block) pairs, as a float32 scalar on the mask's device."""
        return self.counts.float().mean() / num_blocks(k_len, self.block_n)


@dataclass(frozen=True)
class PooledTail:
    """What a query block does not read stands in its softmax as pooled keys, in the numerator and the denominator, a query at a time.

    A pooled key is the mean of the keys of a block with the mean of their values; its score counts as often as the block has keys. Keys that a
    bias weighs or hides count as much as they weigh. Inside a coarse block of which something is read, each key block that is not read has a
    pooled key of its own; a coarse block of which nothing is read has one for all of it.

    coarse: key blocks of the mask in a coarse block, from the first on; the last coarse block may be ragged. 1: every key block its own pooled key.
    Raises ValueError on less.
    """

    coarse: int

    def __post_init__(self) -> None:
        if not isinstance(self.coarse, int) or self.coarse < 1:
            raise ValueError(f"PooledTail: coarse is {self.coarse}; use a whole number of key blocks, 1 or more")

    def sizes(self, block_n: int) -> tuple[int, int]:
        """Keys of the two kinds of blocks that are pooled."""
        return block_n, block_n * self.coarse

    def terms(self, kept: Tensor) -> Tensor:
        """Which pooled keys a row has, of its kept key blocks: bool `(..., key blocks)` -> `(..., key blocks + coarse blocks)`."""
        coarse = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % self.coarse)).unflatten(-1, (-1, self.coarse)).any(-1)
        fine = coarse.repeat_interleave(self.coarse, -1)[..., : kept.shape[-1]] & ~kept
        return torch.cat([fine, ~coarse], -1)

    def density(self, mask: BlockMask, k_len: int) -> Tensor:
        """Pooled keys / all keys, the mean over the rows of a mask: what the tail adds to `BlockMask.density`. A float32 scalar."""
        return self.terms(mask.to_dense(num_blocks(k_len, mask.block_n))).sum(-1).float().mean() / k_len
