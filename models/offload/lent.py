"""What stands in a module's tables while its block runs: tensors that lie in a slot of the device."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import Packing, plain_parts, same_bytes, set_data, table_of, with_parts


class LentTensor(Tensor):
    """A plain tensor that notes when somebody asks for `.data`: what is written there leaves no trace in its version."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    asked: bool

    @property
    def data(self) -> Tensor:
        self.asked = True
        return _data_of(self)

    @data.setter
    def data(self, data: Tensor) -> None:
        torch._C.TensorBase.data.__set__(self, data)  # type: ignore[attr-defined]


def _data_of(part: Tensor) -> Tensor:
    """`part.data`, without a note."""
    data: Tensor = torch._C.TensorBase.data.__get__(part)  # type: ignore[attr-defined]
    return data


class _Lend(torch.autograd.Function):
    """The lent tensor in a graph: its gradient goes to the module's own parameter, with that one's hooks, on that one's device."""

    @staticmethod
    def forward(ctx: Any, home: Tensor, lent: Tensor) -> Tensor:
        ctx.device = home.device
        return Tensor._make_subclass(type(lent), lent.data)  # no view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.device), None


@dataclass(frozen=True)
class _Part:
    """A plain tensor of the module, the one lent for it, and how that one was when it was put in."""

    home: Tensor
    lent: Tensor
    version: int
    address: int

    def written(self) -> bool:
        return self.lent._version != self.version or self.moved()

    def moved(self) -> bool:
        """Whether it was given other data."""
        return self.lent.data_ptr() != self.address or self.lent.shape != self.home.shape or self.lent.dtype != self.home.dtype


class Lent:
    """The lent tensors of a block. They live as long as the context, so that passes of one graph add up their gradients as one leaf does."""

    def __init__(self, packing: Packing, files: dict[int, Tensor]):
        self.packing = packing
        self._files = files  # id of each meta tensor -> its tensor in the file
        self._starts = [offset for offset, _ in packing.runs]
        self._plain: dict[int, Tensor] = {}  # id of the module's own plain tensor -> the one lent for it
        self._graph: dict[int, Any] = {}  # the same id -> where its gradient goes
        self._in: list[tuple[nn.Module, str, Tensor, Tensor]] | None = None
        self._parts: list[_Part] = []

    @property
    def is_in(self) -> bool:
        return self._in is not None

    def put_in(self, buffer: Tensor, graph: bool) -> None:
        """Into the module's tables, as views of `buffer`; for autograd where `graph` is."""
        made: dict[int, Tensor] = {}
        self._in, self._parts = [], []
        with torch.inference_mode(False):
            parts = self.packing.parts_on(buffer)
            for owner, name, old in self.packing.entries:
                if id(old) not in made:
                    made[id(old)] = self._lend(old, [parts[id(part)] for part in plain_parts(old)], graph and old.requires_grad)
                self._in.append((owner, name, old, made[id(old)]))
                dict.__setitem__(table_of(owner, name), name, made[id(old)])

    def _lend(self, old: Tensor, views: list[Tensor], graph: bool) -> Tensor:
        if plain_parts(old)[0] is not old:  # a wrapper subclass cannot be given data, so it is made anew
            lent = self._made(old, with_parts(old, iter(views)), graph)
            self._parts += [_Part(part, view, view._version, view.data_ptr()) for part, view in zip(plain_parts(old), views, strict=True)]
            return lent
        known = self._plain.get(id(old))
        if known is None or (known.requires_grad != graph and (graph or not old.requires_grad)):
            known = with_parts(old, iter([torch.empty((), dtype=old.dtype, device=views[0].device).expand(old.shape)]))
            known = self._made(old, known.as_subclass(LentTensor) if type(known) is Tensor else known, graph)
            self._plain[id(old)], self._graph[id(old)] = known, known.grad_fn
        set_data(known, views[0])
        known.asked = False  # type: ignore[attr-defined]
        self._parts.append(_Part(old, known, known._version, known.data_ptr()))
        return known

    def _made(self, old: Tensor, lent: Tensor, graph: bool) -> Tensor:
        if graph:
            with torch.enable_grad():
                lent = _Lend.apply(old, lent)  # type: ignore[no-untyped-call]
            # As soon as it is there, as with a leaf: gradients do not wait on the device for the end of the backward.
            lent.grad_fn._set_sequence_nr((1 << 64) - 1)  # type: ignore[union-attr]
        lent._is_param = isinstance(old, nn.Parameter)  # what isinstance asks for
        return lent

    def take_out(self, name_of: Callable[[nn.Module, str], str]) -> bool:
        """The module's own tensors again, with what the block wrote. True where the slot does not hold the same any more.

        Raises RuntimeError for what cannot be kept.
        """
        entries, self._in = self._in or [], None
        parts, self._parts = self._parts, []
        names = {id(old): (owner, name) for owner, name, old, _ in entries}
        stale = False
        refused: tuple[_Part, str] | None = None
        with torch.inference_mode(False), torch.no_grad():
            for owner, name, old, lent in entries:
                table = table_of(owner, name)
                now = dict.get(table, name)
                if now is lent:
                    dict.__setitem__(table, name, old)
                elif name in owner._buffers and isinstance(now, Tensor) and (now.shape, now.dtype) == (old.shape, old.dtype) and not old.is_meta:
                    old.data.copy_(now)  # a buffer that the block made anew
                    dict.__setitem__(table, name, old)
                    stale = True
                # Whatever else the block put there stays; the module is laid out again before its next run.
            for part in parts:
                if part.written() or getattr(part.lent, "asked", False):
                    what = self._refusal(part)
                    if what:
                        refused = part, what
                    if not part.home.is_meta:
                        stale |= _keep(part)
                if id(part.home) in self._plain:
                    # A graph may hold it, for its gradient. It must not hold the slot.
                    set_data(part.lent, torch.empty((), dtype=part.home.dtype, device=part.lent.device).expand(part.home.shape))
        if refused is not None:
            part, what = refused
            raise RuntimeError(f"{name_of(*names[id(part.home)])} {what}")
        return stale

    def _refusal(self, part: _Part) -> str:
        """Why what was written to a lent tensor cannot be kept; empty where it can. One that has left its graph is not lent again."""
        key, refusal = id(part.home), ""
        if key in self._graph and part.lent.grad_fn is not self._graph[key]:
            del self._plain[key], self._graph[key]
            if part.home.requires_grad:
                refusal = "requires a gradient and was written to in place while its block ran; do that under torch.no_grad()"
        if part.home.is_meta and (part.written() or not same_bytes(_data_of(part.lent), self._files[key])):
            refusal = "lies in a file and was written to while its block ran; load the module's weights first"
        return refusal

    # ---- what autograd keeps ------------------------------------------------------------------------------------------------------

    def run_at(self, offset: int) -> int:
        """The run of memory that a byte of the slot belongs to."""
        return bisect_right(self._starts, offset) - 1

    def state(self, run: int) -> tuple[int, ...]:
        """Grows whenever the tensors of a run are written to, in the module or while they are lent."""
        parts = self.packing.runs[run][1]
        return (*(part._version for part in parts), *(self._plain[id(part)]._version for part in parts if id(part) in self._plain))


def _keep(part: _Part) -> bool:
    """What was written to a lent tensor goes to the module's own, which gets no new version: a graph may hold it as it is now."""
    data = _data_of(part.lent)
    if (data.shape, data.dtype) != (part.home.shape, part.home.dtype):
        set_data(part.home, data.to(part.home.device))
    elif not same_bytes(data, part.home):
        part.home.data.copy_(data)
    return part.moved()
