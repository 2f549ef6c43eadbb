"""Which implementation computes an attention call, and why the others do not.

An implementation declares its limits as data. They are checked before anything runs, so a refusal is a sentence that a
user can read, never an exception from inside a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import gpu, registry

PRECISIONS = ("native", "fp16", "bf16", "int8")
"""native: operands stay in the dtype of q. fp16, bf16: operands are cast. int8: INT8 q.k with smoothed K, p.v in fp16/bf16."""


@dataclass(frozen=True)
class Problem:
    """All that a limit may look at. Lengths in tokens."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    blocks: tuple[int, int] | None = None  # (block_m, block_n) of the block mask, None for dense
    key_bias: bool = False
    requires_grad: bool = False

    @property
    def gpu(self) -> gpu.GPU:
        return gpu.of(self.device)


Limit = Callable[[Problem], "str | None"]
"""A limit returns None when the problem is within it, else the reason in words."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention: a backend at a precision.

    load: imports and returns `run(q, k, v, block_mask, key_bias, scale, return_lse) -> (out, lse or None)`. Called on first use.
    tolerance: the largest sum |out - float64| / sum |float64| that its self-test takes for right, on a problem of self_test_dtype.
    trusted: made of PyTorch operations, which PyTorch tests; it has no self-test.
    """

    backend: str
    precision: str
    limits: tuple[Limit, ...]
    load: Callable[[], Callable]
    tolerance: float = 0.03
    self_test_dtype: torch.dtype = torch.bfloat16
    trusted: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.precision}"

    def refuse(self, problem: Problem) -> str | None:
        reason = _disabled.get((self.name, problem.gpu.name))
        if reason is not None:
            return reason
        return next((r for limit in self.limits if (r := limit(problem)) is not None), None)


@dataclass(frozen=True)
class Choice:
    """The outcome of `choose` for `problem` at `precision`. `refusals`: the reason of each implementation that was asked before, by its name."""

    problem: Problem
    precision: str
    implementation: Implementation | None
    refusals: dict[str, str]

    def taken(self) -> Implementation:
        """The implementation. Raises NoBackendError with every reason where there is none."""
        if self.implementation is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items()) or "none is registered for it"
            raise NoBackendError(f"attention: no backend takes this call at precision {self.precision!r} ({reasons})")
        return self.implementation


class NoBackendError(RuntimeError):
    """No implementation takes the problem. The message lists each one's reason."""


_implementations: list[Implementation] = []
_disabled: dict[tuple[str, str], str] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation. Earlier registrations are preferred. Raises ValueError, naming both, where there is another of that name."""
    registry.add({known.name: known for known in _implementations}, "implementation", implementation.name, implementation)
    _implementations.append(implementation)


def implementations() -> tuple[Implementation, ...]:
    return tuple(_implementations)


def named(name: str) -> Implementation:
    """The registered implementation of a name."""
    return next(implementation for implementation in _implementations if implementation.name == name)


def disable(name: str, gpu_name: str, reason: str) -> None:
    """Never choose implementation `name` on GPU `gpu_name` again in this process; `reason` is what users read."""
    _disabled[name, gpu_name] = reason


def choose(problem: Problem, precision: str = "auto") -> Choice:
    """The first implementation that takes `problem`. "auto" asks all, in order of preference; a precision asks only its own."""
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"attention: precision is {precision!r}; use 'auto' or one of {', '.join(PRECISIONS)}")
    refusals: dict[str, str] = {}
    for implementation in _implementations:
        if precision not in ("auto", implementation.precision):
            continue
        reason = implementation.refuse(problem)
        if reason is None:
            return Choice(problem, precision, implementation, refusals)
        refusals[implementation.name] = reason
    return Choice(problem, precision, None, refusals)
