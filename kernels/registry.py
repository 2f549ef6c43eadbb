"""Tables of named things, in which a name stands for one thing only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T")
N = TypeVar("N", bound=Named)


def add(table: dict[str, T], kind: str, name: str, thing: T) -> None:
    """Enter `thing` into `table`. Raises ValueError, naming both, where there is another of that name."""
    if name in table:
        raise ValueError(f"there are two of {kind} {name!r}: {_called(table[name])} and {_called(thing)}; rename one")
    table[name] = thing


def by_name(kind: str, things: Iterable[N]) -> dict[str, N]:
    """A table of things that have a name. Raises ValueError where two have the same."""
    table: dict[str, N] = {}
    for thing in things:
        add(table, kind, thing.name, thing)
    return table


def _called(thing: object) -> str:
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else repr(thing)
