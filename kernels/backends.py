"""The table of implementations, in order of preference, as data, and by force. Each backend's package declares its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from . import dispatch, selftest
from .torch_backend import IMPLEMENTATIONS as TORCH
from .triton_backend import IMPLEMENTATIONS as TRITON

VIDEO_TOKENS = 32_760
"""Of Wan 2.1 at 480p, 81 frames."""


def register_all() -> None:
    """Fill the registry on first use."""
    if not dispatch.implementations():
        for implementation in (*TRITON, *TORCH):
            dispatch.register(implementation)


@dataclass(frozen=True)
class Backend:
    """What one implementation says to a call. name: as `use_backend` takes it; status: "usable" or "refused"; reason: why it is refused."""

    name: str
    status: str
    reason: str | None


def backends(problem: dispatch.Problem | None = None) -> list[Backend]:
    """All implementations in order of preference: the first usable one is what `attention` takes.

    problem: the call, as `kernels.attention.describe` describes one; else `video_problem`. Those that would run are tested on their device.
    """
    register_all()
    problem = problem or video_problem()
    for implementation in dispatch.implementations():
        if implementation.refuse(problem) is None:
            selftest.ensure(implementation, problem.device)
    reasons = {implementation.name: implementation.refuse(problem) for implementation in dispatch.implementations()}
    return [Backend(name, "usable" if reason is None else "refused", reason) for name, reason in reasons.items()]


def video_problem() -> dispatch.Problem:
    """A block-sparse call of a video model, on the GPU if there is one."""
    device, dtype = (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)
    q = torch.empty(1, 12, VIDEO_TOKENS, 128, dtype=dtype, device="meta")
    return replace(dispatch.describe(q, q, q, blocks=(128, 128)), device=device)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Attention calls in the `with` block are computed by implementation `name`, such as "triton/native", or by none.

    A call that it refuses, or that asks for another precision, raises NoBackendError with the reason. Blocks nest, the innermost counts;
    other threads and asyncio tasks are not concerned. Raises ValueError for a name that `backends` does not list.
    """
    register_all()
    known = [implementation.name for implementation in dispatch.implementations()]
    if name not in known:
        raise ValueError(f"use_backend: {name!r} is not known; use one of {', '.join(known)}")
    token = dispatch.forced.set(name)
    try:
        yield
    finally:
        dispatch.forced.reset(token)
