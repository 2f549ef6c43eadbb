"""What this GPU can do: compute capability in, tensor-core types and limits out.

Facts from NVIDIA's CUDA C++ Programming Guide (compute capabilities) and the PTX ISA (mma, wgmma, tcgen05).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class GPU:
    """One device. `arch` is the name that users know; `capability` is None where there is no CUDA device."""

    arch: str  # "Ampere", "Ada", "Hopper", "Blackwell", "other" or "none"
    capability: tuple[int, int] | None = None
    precisions: frozenset[str] = frozenset()  # tensor-core operand types: fp16 bf16 int8 fp8 fp4
    wgmma: bool = False
    tma: bool = False
    shared_memory: int = 0  # bytes that one thread block may use

    @property
    def name(self) -> str:
        return "none" if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


_BASE = frozenset({"fp16", "bf16", "int8"})
_FP8 = _BASE | {"fp8"}
_FP4 = _FP8 | {"fp4"}
_KIB = 1024

_TABLE = {
    (8, 0): GPU("Ampere", (8, 0), _BASE, shared_memory=163 * _KIB),
    (8, 6): GPU("Ampere", (8, 6), _BASE, shared_memory=99 * _KIB),
    (8, 7): GPU("Ampere", (8, 7), _BASE, shared_memory=163 * _KIB),
    (8, 9): GPU("Ada", (8, 9), _FP8, shared_memory=99 * _KIB),
    (9, 0): GPU("Hopper", (9, 0), _FP8, wgmma=True, tma=True, shared_memory=227 * _KIB),
    (10, 0): GPU("Blackwell", (10, 0), _FP4, tma=True, shared_memory=227 * _KIB),
    (10, 3): GPU("Blackwell", (10, 3), _FP4, tma=True, shared_memory=227 * _KIB),
    (12, 0): GPU("Blackwell", (12, 0), _FP4, tma=True, shared_memory=99 * _KIB),
    (12, 1): GPU("Blackwell", (12, 1), _FP4, tma=True, shared_memory=99 * _KIB),
}


def from_capability(capability: tuple[int, int] | None) -> GPU:
    """The GPU of a compute capability. Turing (7.5) has fp16 and int8 tensor cores; older ones are "other" with none."""
    if capability is None:
        return GPU("none")
    known = _TABLE.get(capability)
    if known is not None:
        return known
    if capability >= (8, 0):  # newer than this table: what every architecture since Ampere has
        return GPU("other", capability, _BASE, shared_memory=99 * _KIB)
    turing = frozenset({"fp16", "int8"}) if capability == (7, 5) else frozenset()
    return GPU("other", capability, turing, shared_memory=48 * _KIB)


@cache
def _of_index(index: int) -> GPU:
    return from_capability(torch.cuda.get_device_capability(index))


def of(device: torch.device) -> GPU:
    """The GPU behind a torch device; `GPU("none")` for anything that is not an NVIDIA CUDA device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return from_capability(None)
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)
