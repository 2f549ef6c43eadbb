"""Tensors that live on the device while a context lasts, and their way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .edits import HeldMemory, places
from .memory import Packing, Segment, as_parameter, plain_parts, same_bytes, set_data, table_of


class Placed:
    """The tensors of `packing`, copied from `source` into one buffer of `device`. files: id of each meta tensor -> its tensor in the file."""

    def __init__(self, device: Any, packing: Packing, source: Callable[[], list[Segment]], files: dict[int, Tensor], held: HeldMemory):
        self._files = files
        self._held = held
        self._homes: list[tuple[Tensor, Tensor, int]] = []  # (plain part, the data it had, its version since)
        self._replaced: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._buffer: Tensor | None = None
        if device.kind == "cuda" and packing.parts and all(part.is_cuda for part in packing.parts):
            self.places = places(packing.parts)
            return  # they are there already
        self._buffer = device.place(packing.nbytes, source)
        for owner, name, old, new in packing.views(self._buffer):
            if plain_parts(old)[0] is old and not old.is_meta:
                if not any(part is old for part, _, _ in self._homes):
                    held.note(old)
                    home = old.data
                    set_data(old, new.data)
                    self._homes.append((old, home, old._version))
            else:  # a wrapper subclass knows its device itself, and a meta tensor cannot be given data
                self._replaced.append((owner, name, old, new))
                dict.__setitem__(table_of(owner, name), name, new)
        self.places = places(packing.parts)

    def take_back(self) -> None:
        """The module's tensors as they were, with what was written to them."""
        now = {place[0]: place for place in places([part for part, _, _ in self._homes])}
        then = {place[0]: place for place in self.places}
        with torch.no_grad():
            for owner, name, old, new in self._replaced:
                table = table_of(owner, name)
                if dict.get(table, name) is new and (kept := self._kept(old, new)) is not None:
                    dict.__setitem__(table, name, kept)
            for part, home, version in self._homes:
                if now[id(part)] != then[id(part)]:  # it was given other data
                    set_data(part, part.data.to(home.device))
                # Untouched weights are not written back: they may be a read-only map of a file. `.data` is written to without a new version.
                elif (part._version == version and same_bytes(part, home)) or self._held.only_there(part):
                    set_data(part, home)
                else:
                    set_data(part, home.copy_(part))
                if part.grad is not None and part.grad.device != part.device:
                    part.grad = part.grad.to(part.device)
        self._held.forget(part for part, _, _ in self._homes)
        self._homes.clear()
        self._replaced.clear()
        self._buffer = None

    def _kept(self, old: Tensor, new: Tensor) -> Tensor | None:
        """What takes the place of `new`; None: it stays."""
        if old.is_meta:  # the file does not have what was edited, so the module keeps it
            return old if same_bytes(new, self._files[id(old)]) else as_parameter(new.detach().cpu(), old)
        for mine, part in zip(plain_parts(new), plain_parts(old), strict=True):
            if (mine.shape, mine.dtype) != (part.shape, part.dtype):
                return None
            if not same_bytes(mine, part):
                part.copy_(mine)
        return old
