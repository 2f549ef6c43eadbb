"""Attention in plain torch: block-sparse on any device without a compiler, and torch's own dense attention."""

from __future__ import annotations

from functools import cache

from ..dispatch import Implementation, Problem, Run

__all__ = ["IMPLEMENTATIONS"]


@cache
def _load_block_sparse() -> Run:
    from .block_sparse import run

    return run


@cache
def _load_dense() -> Run:
    from .dense import run

    return run


def _only_dense(problem: Problem) -> str | None:
    return None if problem.blocks is None else "torch's scaled_dot_product_attention cannot skip blocks"


def _only_sparse(problem: Problem) -> str | None:
    return "no block mask: torch's own dense attention is faster" if problem.blocks is None else None


IMPLEMENTATIONS = (
    Implementation("torch", "native", (_only_sparse,), _load_block_sparse, trusted=True),
    Implementation("sdpa", "native", (_only_dense,), _load_dense, trusted=True),
)
