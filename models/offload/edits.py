"""How edits of an offloaded module are noticed: tables that note who reaches into them, where tensors lie, who else holds them.

A tensor's version counter tells of most writes; `weight.data += x` and NumPy leave no trace in it. But whoever writes so must first get
hold of the weight: through its module's table, now, or from a reference that he still has.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .memory import bytes_of, plain_parts

KINDS = ("_parameters", "_buffers")


class Reached(Protocol):
    touched: bool


class NotingTable(dict[str, Any]):
    """A module's table of parameters or buffers that notes when somebody reads it. Copies and pickles of it are ordinary dicts."""

    def __init__(self, table: dict[str, Any], user: Reached):
        super().__init__(table)
        self.user = user

    # Written out, as torch.compile follows it when a compiled block reads its weights.
    def __getitem__(self, name: str) -> Any:
        self.user.touched = True
        return dict.__getitem__(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        self.user.touched = True
        return dict.get(self, name, default)

    def items(self) -> Any:
        self.user.touched = True
        return dict.items(self)

    def values(self) -> Any:
        self.user.touched = True
        return dict.values(self)

    def __iter__(self) -> Iterator[str]:  # also for dict(table) and {**table}
        self.user.touched = True
        return dict.__iter__(self)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def pop(self, *args: Any) -> Any:
        self.user.touched = True
        return dict.pop(self, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


class NotingTables:
    """Puts noting tables into modules, and the ordinary ones back."""

    def __init__(self) -> None:
        self._noted: list[tuple[nn.Module, str, dict[str, Any]]] = []

    def put(self, owner: nn.Module, user: Reached) -> None:
        for kind in KINDS:
            table = owner.__dict__[kind]
            owner.__dict__[kind] = NotingTable(table, user)
            table.clear()  # one place less that holds the tensors
            self._noted.append((owner, kind, table))

    def take_back(self) -> None:
        for owner, kind, table in self._noted:
            table.update(dict.items(owner.__dict__[kind]))
            owner.__dict__[kind] = table
        self._noted.clear()


class Hook:
    """A hook of an offload context. A copy of the module, or its pickle, gets one that does nothing."""

    def __init__(self, function: Callable[..., None]):
        self._run = torch.compiler.disable(function)

    def __call__(self, *args: Any) -> None:
        self._run(*args)

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


def offloaded_part(module: nn.Module) -> str | None:
    """The name of a part of `module` that an offload context uses now."""
    for name, part in module.named_modules():
        if isinstance(part._parameters, NotingTable) or any(isinstance(hook, Hook) for hook in part._forward_pre_hooks.values()):
            return name or type(module).__name__
    return None


def refuse_transforms() -> None:
    """Raise RuntimeError inside what keeps, or wraps, the weights of a block that runs."""
    if torch._C._is_tracing():
        raise RuntimeError("a trace would keep weights that move; trace the module outside of the offload context")
    if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError("transforms of torch.func do not go through an offloaded block with gradients; use autograd, or leave the context")


def places(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Where plain tensors lie, and as what. Changes when `.data` is given, not when it is written to."""
    return [(id(part), part.data_ptr(), part.device, part.dtype, part.shape, part.stride()) for part in tensors]


def _values(table: dict[str, Any]) -> list[Any]:
    """Of a table, without a note."""
    return list(dict.values(table))


class Structure:
    """Which modules and parameters a module has. Buffers are not looked at: blocks put new ones into their tables as they run."""

    def __init__(self, module: nn.Module):
        self._tables = [(table, _values(table)) for part in module.modules() for table in (part._parameters, part._modules)]

    def changed(self) -> bool:
        return any(
            len(table) != len(values) or any(now is not then for now, then in zip(_values(table), values, strict=True))
            for table, values in self._tables
        )


def storages_of(module: nn.Module) -> Counter[int]:
    """How many tensors of the module lie in each storage (by its address)."""
    tables = (_values(owner.__dict__[kind]) for owner in module.modules() for kind in KINDS)
    parts = {id(part): part for table in tables for tensor in table if tensor is not None for part in plain_parts(tensor)}
    return Counter(part.untyped_storage()._cdata for part in parts.values())


def storage_users(parts: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """(address, how many tensors lie in it) of the storages of plain tensors."""
    for part in parts:
        storage = part.untyped_storage()
        yield storage._cdata, torch._C._storage_Use_Count(storage._cdata) - 1  # `storage` itself


def references(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """(id, how many places hold it) of each tensor, without the list that is given."""
    ours = object()  # held by this name alone: tells what the counting itself adds
    *found, extra = [sys.getrefcount(each) for each in [*tensors, ours]]
    return [(id(tensor), count - extra) for tensor, count in zip(tensors, found, strict=True)]


class HeldMemory:
    """Memory that somebody else holds, too (a state dict, an array), while the module's tensor lies elsewhere: writing there does not reach it."""

    def __init__(self, storages: Counter[int]):
        self._storages = storages
        self._entries: dict[int, tuple[Tensor, Tensor, int]] = {}  # id of a plain tensor -> it, what it had, that one's fingerprint
        self._versions: dict[int, int] = {}

    def note(self, part: Tensor) -> None:
        """Before a plain tensor of the module gets its data elsewhere."""
        if any(users > self._storages[storage] for storage, users in storage_users([part])):
            home = part.data
            self._entries[id(part)] = part, home, fingerprint(home)
            self._versions[id(part)] = part._version

    def forget(self, parts: Iterable[Tensor]) -> None:
        for part in parts:
            self._entries.pop(id(part), None)

    def written(self, *, unseen: bool = False) -> Tensor | None:
        """A tensor whose former memory was written to. unseen: look also where no version counter tells."""
        for key, (part, home, mark) in self._entries.items():
            if unseen or part._version != self._versions[key]:
                if fingerprint(home) != mark:
                    return part
                self._versions[key] = part._version  # it was written to where it lies now
        return None

    def refuse_written(self, module: nn.Module, *, unseen: bool = False) -> None:
        """Raises RuntimeError that names a tensor of `module` whose former memory was written to. unseen: as of `written`."""
        part = self.written(unseen=unseen)
        if part is not None:
            tensors = [*module.named_parameters(), *module.named_buffers()]
            name = next((name for name, tensor in tensors if any(each is part for each in plain_parts(tensor))), "a weight that was replaced")
            raise RuntimeError(
                f"{name} was written to through a reference from before the offload context (a state dict, an array, .data), which did not "
                "reach the device; edit it before the context, or by a reference that is taken inside"
            )

    def only_there(self, part: Tensor) -> bool:
        """Whether the former memory of a tensor was written to, and the tensor was not."""
        entry = self._entries.get(id(part))
        return entry is not None and fingerprint(entry[1]) != entry[2] == fingerprint(part)


def fingerprint(part: Tensor) -> int:
    """A number that tells whether the bytes of a plain tensor have changed: each word times its odd place, summed modulo 2**64."""
    total = 0
    for chunk in bytes_of(part).split(1 << 23):
        words = torch.nn.functional.pad(chunk, (0, -len(chunk) % 8)).view(torch.int64)
        total = total * 31 + int((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    return total
