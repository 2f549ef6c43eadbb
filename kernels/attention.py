"""The one attention op: dense or block-sparse, at the precision that the GPU has.

    out = attention(q, k, v, block_mask=BlockMask.from_dense(mask, 128, 64))

Backends are chosen by `kernels.dispatch`; `explain` tells which and why. Under torch.compile the op is one opaque node; with gradients, for
which that node has no formula, it is a break in the graph, and as exact as without.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import backends, dispatch, selftest
from .block_mask import BlockMask, PooledTail, num_blocks
from .dispatch import describe


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None = ...,
    key_bias: Tensor | None = ...,
    precision: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    choice: dispatch.Choice | None = ...,
    tail: PooledTail | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None = ...,
    key_bias: Tensor | None = ...,
    precision: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    choice: dispatch.Choice | None = ...,
    tail: PooledTail | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_mask: BlockMask | None = None,
    key_bias: Tensor | None = None,
    precision: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    choice: dispatch.Choice | None = None,
    tail: PooledTail | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + key_bias) v over the kept key blocks.

    q: `(batch, heads, q_len, head_dim)`. k, v: `(batch, kv_heads, k_len, head_dim)`; kv_heads divides heads (GQA).
        Any strides whose last dimension is contiguous; float16, bfloat16 or float32, all the same.
    block_mask: which key blocks each query block reads; None for dense.
    key_bias: `(batch, k_len)`, added to every score of a key (-inf hides it), in float32 whatever its dtype and q's; or bool as in torch's
        own attention: False hides.
    precision: "auto", "native", "fp16", "bf16" or "int8" (see `dispatch.PRECISIONS`).
    scale: defaults to head_dim ** -0.5.
    choice: what `explain` answered for exactly this call (`describe`), in place of precision: the implementation that was named is the one
        that runs.
    tail: pooled keys in the place of the key blocks that block_mask leaves out (see `PooledTail`); None: those do not count at all.
    Returns `(batch, heads, q_len, head_dim)` in q's dtype, and with return_lse also the natural-log sum of exponentials,
    float32 `(batch, heads, q_len)`. A query that reads nothing yields zeros and an lse of -inf. With float64 operands, on the torch backend,
    bias and lse are float64. Gradients of both results flow to q, k, v and key_bias.
    Raises ValueError on malformed input or a choice made for another call, `dispatch.NoBackendError` when no implementation takes it.
    """
    problem = describe(q, k, v, block_mask=block_mask, key_bias=key_bias, tail=tail)
    if key_bias is not None:
        key_bias = as_bias(key_bias, q)
    if choice is not None and choice.problem != problem:
        raise ValueError(f"attention: choice was made for {choice.problem}, but this call is {problem}; ask `explain` about `describe` of it")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if torch.compiler.is_compiling() and not problem.requires_grad:
        indices, counts, block_m, block_n = (
            (None, None, 0, 0) if block_mask is None else (block_mask.indices, block_mask.counts, block_mask.block_m, block_mask.block_n)
        )
        coarse = 0 if tail is None else tail.coarse
        name = "" if choice is None else choice.taken().name
        out, lse = _attention_op(q, k, v, indices, counts, block_m, block_n, coarse, key_bias, precision, name, scale, return_lse)
    else:
        run = _run_beside_graph if torch.compiler.is_compiling() else _run
        out, lse = run(problem, precision, choice, q, k, v, block_mask, key_bias, scale, return_lse, *([] if tail is None else [tail]))
    return (out, lse) if return_lse else out


def _run(problem: dispatch.Problem, precision: str, choice: dispatch.Choice | None, *call: Any) -> tuple[Tensor, Tensor | None]:
    """call: the arguments of `Implementation.load`'s function."""
    return (choice or explain(problem, precision)).taken().load()(*call)


_run_beside_graph = torch.compiler.disable(_run)


def explain(problem: dispatch.Problem, precision: str = "auto") -> dispatch.Choice:
    """Which implementation `attention` uses for `problem`, and why each earlier one refuses.

    An implementation's numerical self-test runs the first time that it is chosen on a device; one that fails it refuses from then on.
    """
    backends.register_all()
    while True:
        choice = dispatch.choose(problem, precision)
        if choice.implementation is None or selftest.ensure(choice.implementation, problem.device):
            return choice


def as_bias(key_bias: Tensor, q: Tensor) -> Tensor:
    """key_bias as every backend takes it: float32, or float64 with a q of float64. Raises ValueError where one on the host has NaN or +inf."""
    if key_bias.dtype == torch.bool:
        return torch.zeros(key_bias.shape, device=key_bias.device).masked_fill(~key_bias, float("-inf")).to(_bias_dtype(q))
    bias = key_bias.to(_bias_dtype(q))
    if bias.device.type == "cpu" and not torch.compiler.is_compiling() and not (bias < float("inf")).all():
        raise ValueError("attention: key_bias has NaN or +inf; use finite numbers, and -inf to hide a key")
    return bias


def _bias_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.custom_op("tessera::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    block_m: int,
    block_n: int,
    coarse: int,  # of a tail, or 0
    key_bias: Tensor | None,
    precision: str,
    implementation: str,  # the name of one that was chosen before, or ""
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    mask = None
    if indices is not None and counts is not None:
        mask = BlockMask(indices, counts, block_m, block_n, num_blocks(k.shape[2], block_n))
    key_bias = None if key_bias is None else as_bias(key_bias, q)
    tail = PooledTail(coarse) if coarse else None
    if implementation:
        chosen = dispatch.named(implementation)
    else:
        chosen = explain(describe(q, k, v, block_mask=mask, key_bias=key_bias, tail=tail), precision).taken()
    out, lse = chosen.load()(q, k, v, mask, key_bias, scale, return_lse, *([] if tail is None else [tail]))
    return out.contiguous(), q.new_empty(0, dtype=_bias_dtype(q)) if lse is None else lse.contiguous()


@_attention_op.register_fake
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse_shape = q.shape[:3] if others[-1] else (0,)  # the last is return_lse
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse_shape, dtype=_bias_dtype(q))
