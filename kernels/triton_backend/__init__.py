"""Block-sparse flash attention in Triton: one kernel for every mask, dense or sparse, at each precision.

Triton is imported when a call on a GPU asks for it, never when this package is.
"""

from __future__ import annotations

import os
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .. import gpu
from ..dispatch import Implementation, Problem, Run
from .compile_table import MAX_HEAD_DIM

__all__ = ["IMPLEMENTATIONS", "MAX_HEAD_DIM", "interpreting", "runs_on", "tail_error"]

MIN_BLOCK_M = 16
"""Tensor cores take no fewer queries at a time."""

MIN_BLOCK_N = 8
"""The finest granule that is tested. Shorter ones are gathered as well as any, but each costs an id and a row address."""


def interpreting() -> bool:
    """True where Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1): slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device(problem: Problem) -> str | None:
    found = problem.gpu
    if found.capability is None:
        return None if interpreting() else f"needs an NVIDIA GPU with CUDA; the tensors are on {problem.device.type}"
    return None if found.capability >= (8, 0) else f"GPU is {found.name}: Triton's tensor-core code needs sm_80 (Ampere) or newer"


def _forward_only(problem: Problem) -> str | None:
    return "the kernels compute no gradients; use torch.no_grad or the torch backend" if problem.requires_grad else None


def _dtype(problem: Problem, taken: tuple[torch.dtype, ...], advice: str) -> str | None:
    return None if problem.dtype in taken else f"{problem.dtype} is not taken: {advice}"


def _head_dim(problem: Problem) -> str | None:
    return None if problem.head_dim <= MAX_HEAD_DIM else f"head_dim {problem.head_dim} > {MAX_HEAD_DIM}"


def _blocks(problem: Problem) -> str | None:
    for side, block, least in zip(("block_m", "block_n"), problem.blocks or (), (MIN_BLOCK_M, MIN_BLOCK_N), strict=False):
        if block < least or block & (block - 1):
            return f"{side} {block} is not a power of two >= {least}"
    return None


@cache
def _triton_problem() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton (on Windows: triton-windows)"
    try:
        _module()
    except Exception as error:  # whatever a broken installation raises, attention must go on without it
        return f"triton is installed but unusable: {type(error).__name__}: {error}"
    return None


def _triton(problem: Problem) -> str | None:
    return _triton_problem()


def _module() -> Any:
    return import_module(".attention", __package__)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HALVES = _FLOATS[:2]


def tail_error(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `tail_costs.tail_error`, for devices that `runs_on`."""
    costs: tuple[torch.Tensor, torch.Tensor] = import_module(".tail_costs", __package__).tail_error(*call)
    return costs


def runs_on(device: torch.device) -> bool:
    """Whether this backend's kernels run there, attention or not."""
    capability = gpu.of(device).capability
    return (interpreting() if capability is None else capability >= (8, 0)) and _triton_problem() is None


@cache
def _load(qk: str, pv: str) -> Run:
    return partial(_module().attention, qk=qk, pv=pv)


def _implementation(
    precision: str,
    dtypes: tuple[torch.dtype, ...],
    advice: str,
    tolerance: float,
    qk: str = "native",
    pv: str = "native",
) -> Implementation:
    limits = (_device, _forward_only, partial(_dtype, taken=dtypes, advice=advice), _head_dim, _blocks, _triton)
    # Those that cast are tested on what they cast.
    dtype = torch.bfloat16 if pv == "native" else torch.float32
    return Implementation("triton", precision, limits, partial(_load, qk, pv), tolerance, dtype, qk=qk, pv=pv)


# INT8 first: it is what "auto" is for. float16 last: of the casts, the one that can overflow.
# Tolerances: bfloat16 rounds p and v to 8 bits, 0.2 % each; the bf16 row rounds float32 q and k as well, and scores are exponentiated. INT8
# with smoothed K: 1-2 % (SageAttention, arXiv:2410.02367).
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    _implementation("int8", _FLOATS, "use float16, bfloat16 or float32", 0.03, qk="int8"),
    _implementation("native", _HALVES, "tensor cores have no such type; use precision bf16, fp16 or int8", 0.01),
    _implementation("bf16", _FLOATS, "use float16, bfloat16 or float32", 0.02, "bf16", "bf16"),
    _implementation("fp16", (torch.float16, torch.float32), "its values may overflow in float16; use native, bf16 or int8", 0.01, "fp16", "fp16"),
)
