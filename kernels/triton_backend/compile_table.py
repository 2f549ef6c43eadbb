"""What is compiled: tile sizes, warps, pipeline stages and constants of each kernel variant, by architecture where that was measured.

Nothing here imports Triton. The launchers read it at run time, and the tests cross-compile every entry for every
architecture without a GPU, so a register spill or too much shared memory is found before anybody runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..quantize import K_BLOCK

MAX_STRIDE_UNIT = 16
"""Strides are passed in units of up to this many elements: twice the longest load of two-byte elements, 16 bytes."""

MAX_HEAD_DIM = 128
"""Longer rows would need tiles that spill registers or exceed shared memory."""

HOPPER = (9, 0)
ARCHITECTURES = ((8, 0), (8, 6), (8, 9), HOPPER, (10, 0), (12, 0))
"""Compute capabilities that the tests compile for. Others of the same generation take the nearest entry's code path."""


@dataclass(frozen=True)
class Config:
    """How one tile is computed. block_m, block_n: queries and keys in a tile; num_stages: depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int, qk: str) -> int:
    """The power of two that a row of q or k is padded to in registers. Tensor cores take 16 two-byte or 32 one-byte values."""
    return max(1 << (head_dim - 1).bit_length(), 32 if qk == "int8" else 16)


def config_for(
    head_dim: int,
    blocks: tuple[int, int] | None,
    *,
    qk: str = "native",
    extras: bool = False,
    tail: bool = False,
    capability: tuple[int, int] | None = None,
) -> Config:
    """The configuration of an attention call with `qk` operands; `blocks` is the block mask's (block_m, block_n), None for dense.

    128 x 64 tiles are FlashAttention-2's. With head_dim 128, or where rows are gathered (granules, shorter than a tile, and tails), such a tile
    needs 8 warps (4 spill registers); smaller ones keep 4 busy. Three stages of 64 keys fill 96 KiB of shared memory with K and V of head_dim
    128, and the smallest architecture of the table has 99. No entry depends on the length, and nothing is tuned at run time.

    Hopper has entries of its own for head_dim 65 to 128, measured on an H200 (`tiles` in bench/results/gpu_attention_nvidia_h200_*.json):
    tiles of 128 keys take 10 to 12 % less time than 64, and with INT8 sparse calls 4 warps take 21 % less than 8. extras: the call has a
    key bias or returns lse, with which 4 warps spill. Where rows are gathered nothing is measured, and the general entry is kept.
    """
    block_m, block_n = min(blocks[0], 128) if blocks else 128, K_BLOCK
    gathered = tail or (blocks is not None and blocks[1] < block_n)
    num_warps = 8 if block_m == 128 and (head_dim > 64 or gathered) else 4
    if capability == HOPPER and num_warps == 8 and not gathered:
        if qk != "int8":
            block_n = 128 if blocks is None or blocks[1] % 128 == 0 else block_n
        elif blocks is not None and not extras:
            num_warps = 4
    return Config(block_m, block_n, num_warps, num_stages=3)


def attention_constants(head_dim: int, blocks: tuple[int, int] | None, qk: str, config: Config, stride_unit: int) -> dict[str, int]:
    """The compile-time constants of `attention_kernel`. stride_unit: a power of two that divides every stride, in elements."""
    padded = padded_head_dim(head_dim, qk)
    return {
        "HEAD_DIM": head_dim,
        "D": padded,
        "QK_WIDTH": padded if qk == "int8" else head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "MASK_M": blocks[0] if blocks else config.block_m,
        "MASK_N": blocks[1] if blocks else config.block_n,
        "K_BLOCK": K_BLOCK,
        "STRIDE_UNIT": stride_unit,
    }


def quantize_constants(head_dim: int, stride_unit: int) -> dict[str, int]:
    """The compile-time constants of `quantize_q_kernel` and `quantize_k_kernel`; each program handles the rows of one K scale."""
    return {"HEAD_DIM": head_dim, "D": padded_head_dim(head_dim, "int8"), "ROWS": K_BLOCK, "STRIDE_UNIT": stride_unit}


def list_constants(coarse: int) -> dict[str, int]:
    """The compile-time constants of `list_tail_kernel` for coarse blocks of so many key blocks: it looks at 1024 blocks at a time."""
    padded = 1 << (coarse - 1).bit_length()
    return {"COARSE": coarse, "PADDED": padded, "GROUP": max(1024 // padded, 1)}


@dataclass(frozen=True)
class Entry:
    """One variant of the attention kernel that is dispatched. qk, pv: Triton's names of the types of its operands, or "int8"."""

    qk: str
    pv: str
    head_dim: int
    blocks: tuple[int, int] | None
    key_bias: bool = False
    lse: bool = False
    tail: bool = False

    @property
    def name(self) -> str:
        shape = "dense" if self.blocks is None else f"sparse{self.blocks[0]}x{self.blocks[1]}"
        extras = ("-bias" if self.key_bias else "") + ("-lse" if self.lse else "") + ("-tail" if self.tail else "")
        return f"{'-'.join(dict.fromkeys((self.qk, self.pv)))}-d{self.head_dim}-{shape}{extras}"

    def config(self, capability: tuple[int, int]) -> Config:
        extras = self.key_bias or self.lse
        return config_for(self.head_dim, self.blocks, qk=self.qk, extras=extras, tail=self.tail, capability=capability)


def entries() -> Iterator[Entry]:
    """The variants that models use: both head sizes, dense and sparse, each precision; granules and tails; then the smallest tiles and padding."""
    for head_dim in (64, 128):
        for blocks in (None, (128, 64), (128, 128)):
            yield Entry("bf16", "bf16", head_dim, blocks)
            yield Entry("int8", "bf16", head_dim, blocks)
        yield Entry("int8", "fp16", head_dim, (64, 64))
        yield Entry("fp16", "fp16", head_dim, None, key_bias=True, lse=True)
    yield Entry("int8", "bf16", 128, (128, 64), key_bias=True, lse=True)
    for head_dim in (64, 128):
        for qk in ("bf16", "int8"):
            for blocks in ((128, 8), (128, 32), (32, 8)):
                yield Entry(qk, "bf16", head_dim, blocks, tail=True)
            yield Entry(qk, "bf16", head_dim, (128, 32))
            yield Entry(qk, "bf16", head_dim, (128, 32), key_bias=True, lse=True, tail=True)
        yield Entry("fp16", "fp16", head_dim, (64, 16), tail=True)
    yield Entry("int8", "bf16", 128, (128, 64), tail=True)
    yield Entry("bf16", "bf16", 128, (128, 128), tail=True)
    yield Entry("bf16", "bf16", 128, (16, 16))
    yield Entry("int8", "bf16", 128, (32, 32))
    yield Entry("fp16", "fp16", 96, (128, 64))
    yield Entry("int8", "fp16", 40, None)
