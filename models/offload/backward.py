"""Backward through streamed blocks: what autograd keeps instead of their weights, and the weights' return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .units import Unit

ONE_THREAD = "an offloaded module runs in one thread at a time, and another runs this one now; put a lock around the calls"


@dataclass(frozen=True)
class Active:
    """The block that runs now; None while its weights are brought."""

    unit: Unit | None
    thread: int
    buffer: Any = None


class Running:
    """What runs now, in one thread at a time."""

    def __init__(self) -> None:
        self.active: Active | None = None
        self.lock = threading.Lock()  # around a change of `active`

    def claim(self, busy: Callable[[int], bool] | None) -> Active | None:
        """Begin to run something; what ran already in this thread. Raises RuntimeError where another thread does, or `busy` says that one does."""
        thread = threading.get_ident()
        with self.lock:
            before = self.active
            if (before is not None and before.thread != thread) or (busy is not None and busy(thread)):
                raise RuntimeError(ONE_THREAD)
            self.active = Active(None, thread)
        return before


@dataclass(frozen=True, eq=False)
class _Ref:
    """What autograd keeps instead of a weight that will have left the device: where to find it again."""

    unit: Unit
    offset: int  # in elements of dtype
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    run: int  # of the unit's memory
    state: tuple[int, ...]  # of the run
    thread: int  # of the forward


@dataclass(frozen=True)
class _Outer:
    """What other saved-tensor hooks made of a tensor."""

    unpack: Callable[[Any], Tensor]
    packed: Any


class Backward:
    """The block whose weights the backward needs now.

    fetch: brings a block's weights; release: of that block number. `owner` changes under the lock of `running`.
    """

    def __init__(self, fetch: Callable[[Unit], Any], release: Callable[[int], None], running: Running):
        self._fetch, self._release, self._running = fetch, release, running
        self.owner: int | None = None  # the thread that goes backward
        self.unit: Unit | None = None
        self._buffer: Any = None
        self._refs: WeakSet[_Ref] = WeakSet()  # those that graphs hold

    def waits(self) -> bool:
        """Whether a graph is there that has still to come back for streamed weights."""
        return len(self._refs) > 0

    def busy(self, thread: int) -> bool:
        """Whether another thread goes backward. One whose backward failed does so until it comes again, or ends."""
        return self.owner not in (None, thread) and any(each.ident == self.owner for each in threading.enumerate())

    def hooks(self, unit: Unit, buffer: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Saved-tensor hooks for a block that runs with its weights in `buffer`."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return torch.autograd.graph.saved_tensors_hooks(partial(self._pack, unit, buffer.data_ptr(), buffer.nbytes, outer), self._unpack)

    def _pack(self, unit: Unit, address: int, nbytes: int, outer: Any, tensor: Tensor) -> Any:
        # By address: autograd keeps this function with every saved tensor, and with it anything that it refers to.
        start = tensor.untyped_storage().data_ptr() - address if tensor.layout == torch.strided else -1
        if not 0 <= start < nbytes:
            # Only the innermost hooks are asked: hand on to those that were there before (checkpointing, save_on_cpu).
            # Detached, as an output that its own node keeps would never go.
            return tensor.detach() if outer is None else _Outer(outer[1], outer[0](tensor))
        assert unit.lent is not None
        run = unit.lent.run_at(start)
        offset = start // tensor.element_size() + int(tensor.storage_offset())
        ref = _Ref(unit, offset, tensor.dtype, tensor.shape, tensor.stride(), run, unit.lent.state(run), threading.get_ident())
        self._refs.add(ref)
        return ref

    def _unpack(self, saved: _Outer | _Ref | Tensor) -> Tensor:
        if isinstance(saved, _Outer):
            return saved.unpack(saved.packed)
        if not isinstance(saved, _Ref):
            return saved
        unit, active = saved.unit, self._running.active
        if unit.retired:
            raise RuntimeError(unit.retired)
        assert unit.lent is not None
        if not unit.in_place() or saved.state != unit.lent.state(saved.run):
            raise RuntimeError(f"weights of {unit.block.name} were changed between forward and backward; step the optimizer after backward")
        if active is not None and active.unit is unit:  # a block that differentiates itself
            buffer = active.buffer
        else:
            buffer = self.bring(unit, saved.thread)
        whole = buffer[: buffer.numel() // saved.dtype.itemsize * saved.dtype.itemsize].view(saved.dtype)
        weight: Tensor = whole.as_strided(saved.size, saved.stride, saved.offset)
        # A backward that will itself be differentiated keeps what it is given for longer than the slot has it.
        return weight.clone() if torch.is_grad_enabled() else weight

    def bring(self, unit: Unit, thread: int) -> Any:
        """The slot of a block, until the backward gets to another one. thread: of the forward."""
        if not isinstance(threading.current_thread(), threading._DummyThread):  # else it is one of autograd's own, which work for that one
            thread = threading.get_ident()
        with self._running.lock:
            active = self._running.active
            if (active is not None and active.thread not in (thread, threading.get_ident())) or self.busy(thread):
                raise RuntimeError(ONE_THREAD)
            self.owner = thread
        if self.unit is not unit:
            if self.unit is None:
                torch.autograd.Variable._execution_engine.queue_callback(self.end)
            else:
                self._buffer = None  # before the slot is filled again
                self._release(self.unit.index)
            self._buffer = self._fetch(unit)
            self.unit = unit
        return self._buffer

    def end(self) -> None:
        unit, self.unit, self._buffer = self.unit, None, None
        if unit is not None and not unit.retired:
            self._release(unit.index)
        self.owner = None
