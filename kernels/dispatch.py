"""Which implementation computes an attention call, and why the others do not.

An implementation declares its limits as data. They are checked before anything runs, so a refusal is a sentence that a
user can read, never an exception from inside a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gpu, registry
from .block_mask import BlockMask, PooledTail

PRECISIONS = ("native", "fp16", "bf16", "int8")
"""native: operands stay in the dtype of q. fp16, bf16: operands are cast. int8: INT8 q.k with smoothed K, p.v in fp16/bf16.

What users ask for; the qk and pv of an implementation say what its two products are made of.
"""


@dataclass(frozen=True)
class Problem:
    """All that a limit may look at. Lengths in tokens. Made by `describe`."""

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
    tail: PooledTail | None = None

    @property
    def gpu(self) -> gpu.GPU:
        return gpu.of(self.device)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None = None,
    blocks: tuple[int, int] | None = None,
    key_bias: Tensor | None = None,
    tail: PooledTail | None = None,
) -> Problem:
    """The `Problem` of a call. Raises ValueError, naming the input, when shapes or dtypes do not fit together.

    blocks: (block_m, block_n) of a mask that is yet to be chosen, in place of block_mask.
    """
    _check_tensors(q, k, v)
    if key_bias is not None:
        _check_bias(key_bias, q, k)
    if block_mask is not None:
        if not isinstance(block_mask, BlockMask):
            raise ValueError(f"attention: block_mask is a {type(block_mask).__name__}; make one with BlockMask.from_dense")
        block_mask.check_fit(q, k)
        blocks = (block_mask.block_m, block_mask.block_n)
    if tail is not None and blocks is None:
        raise ValueError("attention: a tail stands for what a block mask leaves out; pass block_mask, or no tail")
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, key_bias) if x is not None)
    _, heads, q_len, head_dim = q.shape
    return Problem(q.device, q.dtype, heads, k.shape[1], q_len, k.shape[2], head_dim, blocks, key_bias is not None, requires_grad, tail)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}; expected (batch, heads, tokens, head_dim)")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"attention: {name} is {tensor.dtype} on {tensor.device} but q is {q.dtype} on {q.device}; convert one of them")
    if not q.is_floating_point() or 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention: q is {q.dtype} {tuple(q.shape)}, k is {tuple(k.shape)}; expected non-empty floating-point tensors")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "k and v must share one shape, batch and head_dim must match q, and kv_heads must divide heads"
        )


def _check_bias(key_bias: Tensor, q: Tensor, k: Tensor) -> None:
    expected = (q.shape[0], k.shape[2])
    if key_bias.shape != expected:
        raise ValueError(f"attention: key_bias has shape {tuple(key_bias.shape)}; expected (batch, k_len) = {expected}")
    if not (key_bias.is_floating_point() or key_bias.dtype == torch.bool) or key_bias.device != q.device:
        raise ValueError(f"attention: key_bias is {key_bias.dtype} on {key_bias.device}; expected floating point or bool on {q.device}, as q")


Limit = Callable[[Problem], "str | None"]
"""A limit returns None when the problem is within it, else the reason in words."""


Run = Callable[..., tuple[Tensor, "Tensor | None"]]
"""`run(q, k, v, block_mask, key_bias, scale, return_lse) -> (out, lse or None)`, arguments as `kernels.attention.attention` checked them.

Those that take a `Problem` with a tail are given it as one more argument."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention: a backend at a precision.

    load: imports and returns what runs. Called on first use.
    qk, pv: the operands of q.k and of p.v: "fp16", "bf16", "int8", or "native", which is q's dtype.
    tolerance: the largest sum |out - float64| / sum |float64| that its self-test takes for right, on a problem of self_test_dtype.
    trusted: made of PyTorch operations, which PyTorch tests; it has no self-test.
    """

    backend: str
    precision: str
    limits: tuple[Limit, ...]
    load: Callable[[], Run]
    tolerance: float = 0.03
    self_test_dtype: torch.dtype = torch.bfloat16
    trusted: bool = False
    qk: str = "native"
    pv: str = "native"

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


forced: ContextVar[str | None] = ContextVar("tessera_backend", default=None)
"""The name of the only implementation that may be chosen here; None: all may. Set by `backends.use_backend`."""

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
    """The first implementation that takes `problem`. "auto" asks all, in order of preference; a precision asks only its own.

    One that is `forced` is the only one that is asked.
    """
    if precision != "auto" and precision not in PRECISIONS:
        raise ValueError(f"attention: precision is {precision!r}; use 'auto' or one of {', '.join(PRECISIONS)}")
    refusals: dict[str, str] = {}
    only = forced.get()
    for implementation in _implementations:
        wrong_precision = precision not in ("auto", implementation.precision)
        if implementation.name != only if only else wrong_precision:
            continue
        reason = f"its precision is {implementation.precision!r}" if wrong_precision else implementation.refuse(problem)
        if reason is None:
            return Choice(problem, precision, implementation, refusals)
        refusals[implementation.name] = reason
    return Choice(problem, precision, None, refusals)
