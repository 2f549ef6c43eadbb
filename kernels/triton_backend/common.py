"""What every kernel here shares: how a program finds its rows, and how strides are passed."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .compile_table import MAX_STRIDE_UNIT


@triton.jit
def locate(tokens, num_heads, ROWS: tl.constexpr):  # noqa: N803
    """The tile of ROWS tokens that this program handles: its first token, its head, its batch, and its head counted over all batches.

    One grid dimension, because the others stop at 65535. Neighbours share a head, so they find its keys in the L2 cache.
    All but the token are 64-bit: tensors may have more than 2^31 elements.
    """
    tiles = tl.cdiv(tokens, ROWS)
    first = tl.program_id(0) % tiles * ROWS
    head_of_all = (tl.program_id(0) // tiles).to(tl.int64)
    return first, head_of_all % num_heads, head_of_all // num_heads, head_of_all


def stride_units(*tensors: Tensor) -> tuple[int, list[int]]:
    """The strides of all dimensions but the last of each tensor, and the power of two, in elements, that they are counted in.

    A kernel multiplies by the unit, a constant, and so knows how far rows are aligned without being compiled for one size.
    Where there is one element, torch leaves the stride arbitrary; it is 0 here.
    """
    strides = [stride if size > 1 else 0 for x in tensors for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    unit = math.gcd(MAX_STRIDE_UNIT, *strides)
    return unit, [stride // unit for stride in strides]
