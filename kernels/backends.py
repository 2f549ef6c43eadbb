"""The table of implementations, in order of preference. Each backend's package declares its own rows."""

from __future__ import annotations

from . import dispatch
from .torch_backend import IMPLEMENTATIONS as TORCH
from .triton_backend import IMPLEMENTATIONS as TRITON


def register_all() -> None:
    """Fill the registry on first use."""
    if not dispatch.implementations():
        for implementation in (*TRITON, *TORCH):
            dispatch.register(implementation)
