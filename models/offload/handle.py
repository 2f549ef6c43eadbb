"""The handle of `offload`: a module whose blocks come to the device one after another, while it runs or trains."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..weight_files import read_safetensors
from .backward import Active, Backward, Running
from .devices import device_of
from .edits import HeldMemory, Hook, NotingTables, offloaded_part, refuse_transforms, storages_of
from .lent import Lent
from .memory import plain_parts, tensors_of
from .pinned import Pinned
from .placed import Placed
from .planner import GB, Prediction, checked_budget, choose, predict, window
from .report import stream_figures
from .schedule import BACKWARD, FORWARD, Plan, Scheduler
from .units import Division, Unit, tensors_in

# A plan is made anew when the measured compute of a pass has changed by this factor: attention was made sparse, the resolution changed.
REPLAN = 1.2


class Offload:
    """The handle of `offload`; a context manager that can be entered again."""

    def __init__(
        self,
        module: nn.Module,
        budget_gb: float | None,
        policy: str,
        k: int | None,
        k_prime: int,
        batch: bool,
        device: Any,
        weights: str | Path | None,
        pin_gb: float | None,
    ):
        self.module = module
        self.policy, self.k, self.k_prime, self.batch = policy, k, k_prime, batch
        self.pin_bytes = None if pin_gb is None else int(pin_gb * GB)
        self._budget_gb = budget_gb
        self._files = None if weights is None else read_safetensors(weights)[0]
        self._path = weights
        self.device = device_of(device)
        self._learnt: list[str] = []  # the blocks in the order in which they ran
        self.nbytes: list[int] = []
        self.plan: Plan
        self._division: Division | None = None
        self._lay_out()
        self._forget()
        self.scheduler: Scheduler | None = None
        self.prediction: Prediction | None = None
        self._rates: list[float] = []
        self.pinned_bytes = 0
        self.passes = self.plans = 0
        self._planned_seconds = 0.0
        self._saving: Any = None  # the saved-tensor hooks of the block that runs
        self._running = Running()
        self._thread = -1  # of the latest forward
        self._final: dict[str, Any] = {}

    @property
    def _units(self) -> list[Unit]:
        return [] if self._division is None else self._division.units

    def _lay_out(self) -> None:
        """Divide the module, as it is now, into blocks and the rest, and make a plan for them."""
        division = self._division = Division(self.module, tensors_in(self.module, self._files, self._path), self._learnt)
        before, self.nbytes = self.nbytes, division.nbytes
        there = (part for _, _, tensor in tensors_of(self.module) for part in plain_parts(tensor) if part.is_cuda)
        available = self.device.available() + sum(part.nbytes for part in there)
        self.budget = checked_budget(
            self._budget_gb, division.fixed.nbytes, self.nbytes, available, device=self.device.device, name=type(self.module).__name__
        )
        if self.nbytes != before:
            self.plan = self._first_plan()

    def _forget(self) -> None:
        """Nothing of the division outside the context: the module may become another, and its tensors be its own."""
        self._learnt = [unit.block.name for unit in self._units]
        self._division = None

    def _first_plan(self) -> Plan:
        assert self._division is not None
        if self.policy == "superpipeline":
            return window(self.nbytes, self._division.fixed.nbytes, self.budget, self.k, self.k_prime, batch=self.batch)
        assert self.budget is not None
        return choose(self.nbytes, self.budget - self._division.fixed.nbytes)

    # ---- life cycle ---------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Offload:
        if self.scheduler is not None:
            raise RuntimeError("this handle is in use; leave it before you enter it again, or make another")
        used = offloaded_part(self.module)
        if used is not None:
            raise RuntimeError(f"{used} is offloaded already; leave that context before this module is offloaded again")
        self._lay_out()
        self._arrive()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self.scheduler is not None and error[0] is None:
                self._held.refuse_written(self.module, unseen=True)
        finally:
            self._leave()

    def _arrive(self) -> None:
        """Bring the module, as it was laid out, to the device."""
        self._hooks: list[Any] = []
        self._resident: dict[Unit, Placed] = {}
        self._rest: Placed | None = None
        self._tables = NotingTables()
        self._order: list[Unit] | None = []
        self._backward = Backward(partial(self._fetch, direction=BACKWARD), self._release, self._running)
        self._last = -1
        self._held = HeldMemory(storages_of(self.module))
        division = self._division
        assert division is not None
        self._pinned = Pinned(self.device)
        try:
            self._pinned.move(division, self.pin_bytes, self._held)
            self.pinned_bytes = self._pinned.nbytes
            self._rates = self._pinned.rates(division.units)
            users = {id(owner): unit for unit in self._units for owner, _, _ in unit.packing.entries}
            for owner in list(self.module.modules()):
                self._tables.put(owner, users.get(id(owner), self))
            self._rest = Placed(self.device, division.fixed, division.fixed_source, division.file_of, self._held)
            self._start(self.plan)
            self._hooks.append(self.module.register_forward_pre_hook(Hook(self._before_all), prepend=True))
            for unit in self._units:
                block = unit.block.module
                unit.lent = Lent(unit.packing, division.file_of)
                self._hooks.append(block.register_forward_pre_hook(Hook(self._before), prepend=True))
                self._hooks.append(block.register_forward_hook(Hook(self._after), always_call=True))
        except BaseException:
            self._leave()
            raise

    def _leave(self, why: str = "backward was called outside the offload context of its forward; call it inside") -> None:
        """The module as it was outside. why: what is said to a backward that comes later."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._backward.end()
        if self._running.active is not None and self._running.active.unit is not None:
            self._restore(self._running.active.unit)
            self._running.active = None
        if self.scheduler is not None:
            self._final = self._figures()
            self.scheduler.close()
            self.scheduler = None
        self.device.synchronize()
        for unit in self._units:
            unit.retired = why
        for placed in [*self._resident.values(), *([self._rest] if self._rest is not None else [])]:
            placed.take_back()
        self._resident.clear()
        self._rest = None
        self._tables.take_back()
        self._pinned.take_back()
        self.device.close()
        self._forget()

    # ---- edits --------------------------------------------------------------------------------------------------------------------

    touched = False  # who reaches for what stays on the device does not matter: it is compared when it leaves

    def _arrive_again(self) -> None:
        """Lay the edited module out anew."""
        assert self.scheduler is not None
        self._held.refuse_written(self.module, unseen=True)
        if self._backward.unit is not None:
            raise RuntimeError("the module was edited during a backward pass; edit it before the forward or after the backward")
        before = self.scheduler
        self._leave("the module was edited between forward and backward; edit it before the forward or after the backward")
        try:
            self._lay_out()
        except ValueError as error:
            raise ValueError(
                f"{type(self.module).__name__} was edited inside the offload context and cannot go on there: {error}. "
                "Its weights are as edited; leave the context, and enter another that suits them"
            ) from error
        self._arrive()
        self.scheduler.count_on(before)

    def _start(self, plan: Plan) -> None:
        """Bring the residents of `plan`, send away those of the plan before, and fill the slots."""
        division = self._division
        assert division is not None
        self.plan = plan
        self.plans += 1
        for index, unit in enumerate(self._units):
            unit.index = index
        keep = {self._units[index] for index in plan.resident}
        for unit in [unit for unit in self._resident if unit not in keep]:
            self._resident.pop(unit).take_back()
        for unit in self._units:
            if unit in keep and unit not in self._resident:
                self._resident[unit] = Placed(self.device, unit.packing, unit.host, division.file_of, self._held)
            self.device.sources[unit.index] = partial(division.to_copy, unit)
        division.note_places()
        self.device.reset(max((self.nbytes[index] for index in plan.streamed), default=0))
        self.scheduler = Scheduler(self.device, plan, self.nbytes)
        self.scheduler.start()

    # ---- around a block -----------------------------------------------------------------------------------------------------------

    def _before_all(self, module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        running = self._running.claim(self._backward.busy)
        try:
            if running is None:
                self._backward.end()
                if self._division is not None and self._division.edited():
                    self._arrive_again()
                self._held.refuse_written(self.module)
        finally:
            self._running.active = running

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        running = self._running.claim(None if in_backward else self._backward.busy)
        try:
            if running is not None and running.unit is not None:  # an interrupt (no Exception) got past torch's promise to call hooks always
                self._restore(running.unit)
            self._bring(module, args, in_backward)
        except BaseException:
            self._running.active = None
            raise

    def _bring(self, module: nn.Module, args: tuple[Any, ...], in_backward: bool) -> None:
        unit = self._unit_of(module)
        refuse_transforms()
        written = unit.written_in_a_file()
        if written is not None:
            raise RuntimeError(
                f"{self._name_of(*written)} lies in a file and was written to; load the module's weights first, or replace the parameter"
            )
        if not in_backward:
            self._thread = threading.get_ident()
            self._backward.end()
            if not unit.intact():  # edited since the module's forward began, or the block is called by itself
                self._arrive_again()
                unit = self._unit_of(module)
            self._new_pass(unit, args)
            unit = self._unit_of(module)  # it may have been laid out again
        elif not unit.intact():
            raise RuntimeError(f"{unit.block.name} was edited between forward and backward; edit it before the forward or after the backward")
        assert self.scheduler is not None and unit.lent is not None
        # A checkpointed block is computed again in the backward: its weights stay for the gradients that follow.
        buffer = self._backward.bring(unit, self._thread) if in_backward else self._fetch(unit, FORWARD)
        self._running.active = Active(unit, threading.get_ident(), buffer)
        if buffer is None:
            return
        graph = torch.is_grad_enabled()
        unit.lent.put_in(buffer, graph)
        if graph:
            self._saving = self._backward.hooks(unit, buffer)
            self._saving.__enter__()

    def _unit_of(self, module: nn.Module) -> Unit:
        unit = next((unit for unit in self._units if unit.block.module is module), None)
        if unit is None:
            raise RuntimeError(f"this {type(module).__name__} was no block any more when it ran; edit the module between its runs")
        return unit

    def _fetch(self, unit: Unit, direction: str) -> Any:
        assert self.scheduler is not None
        if unit.index in self.scheduler.loaded and unit.stale():
            self.scheduler.reload(unit.index)
        return self.scheduler.acquire(unit.index, direction)

    def _release(self, block: int) -> None:
        assert self.scheduler is not None
        self.scheduler.release(block)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        active, unit = self._running.active, None if self._running.active is None else self._running.active.unit
        if active is None or unit is None or unit.block.module is not module or active.thread != threading.get_ident():
            return  # the block never started
        self._running.active = Active(None, active.thread)  # without the buffer, which would be kept while the next one is allocated
        del active
        try:
            self._restore(unit)
        finally:
            if self._backward.unit is not unit:
                self._release(unit.index)
            self._running.active = None

    def _restore(self, unit: Unit) -> None:
        """The module's own tensors again, with what the block that ran wrote to them."""
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        if unit.lent is not None and unit.lent.is_in:
            unit.touched = unit.lent.take_out(self._name_of)

    def _name_of(self, owner: nn.Module, name: str) -> str:
        return next((f"{prefix}.{name}" for prefix, part in self.module.named_modules() if part is owner), name)

    def _new_pass(self, unit: Unit, args: tuple[Any, ...]) -> None:
        """Learn the order of the blocks from the first pass; plan again when a pass begins and its compute has changed.

        Not while a graph waits for its backward: the blocks that it saw as streamed stay so.
        """
        division = self._division
        assert self.scheduler is not None and division is not None
        if self._order is not None:
            if unit not in self._order:
                self._order.append(unit)
            elif not self._backward.waits():
                order, self._order = self._order, None
                order += [other for other in division.units if other not in order]
                if order != division.units:
                    division.units = order
                    self.nbytes = division.nbytes
                    self._restart(self._first_plan())
        if unit.index <= self._last:
            self.passes += 1
            self._replan()
        if unit.index <= self._last or self._last < 0:
            training = torch.is_grad_enabled() and any(
                tensor.requires_grad for _, _, tensor in [*unit.packing.entries, *((None, "", arg) for arg in args if isinstance(arg, Tensor))]
            )
            if training != self.scheduler.backward:
                self.scheduler.set_backward(training)
            # They may have been written to since they were fetched. All at once, so that the copies run ahead of the blocks.
            for index, other in [(index, self._units[index]) for index in self.scheduler.loaded]:
                if other.stale() or other.held or other.held_elsewhere(division.storages):
                    self.scheduler.reload(index)
        self._last = unit.index

    def _restart(self, plan: Plan) -> None:
        assert self.scheduler is not None
        if self._division is not None and self._division.edited():
            return self._arrive_again()
        before = self.scheduler
        before.close()
        self._start(plan)
        self.scheduler.count_on(before)

    def _replan(self) -> None:
        assert self.scheduler is not None
        if self.scheduler.backward or not self.plan.streamed or self._backward.waits():
            return
        seconds = self.scheduler.compute_seconds()
        if seconds is None or 1 / REPLAN < sum(seconds) / (self._planned_seconds or 1e-12) < REPLAN:
            return
        self._planned_seconds = sum(seconds)
        plan = self.plan
        if self.policy != "superpipeline":
            assert self.budget is not None and self._division is not None
            plan = choose(self.nbytes, self.budget - self._division.fixed.nbytes, seconds, self._rates)
        self.prediction = predict(plan, self.nbytes, seconds, self._rates)
        if plan != self.plan:
            self._restart(plan)

    # ---- report -------------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What happened so far, or, after the context, until its end. Bytes and seconds.

        peak_bytes: most device bytes of weights and slots. copied_bytes: host to device, slots only. compute_seconds, copy_seconds and
        wait_seconds: of the last passes that `events` holds; hidden_seconds: copy_seconds without the waits. events: (kind, block,
        start, end), seconds since the first of them.
        """
        return dict(self._final) if self.scheduler is None else self._figures()

    def _figures(self) -> dict[str, Any]:
        assert self.scheduler is not None and self._division is not None
        self.device.synchronize()
        streams = stream_figures(self.scheduler, [unit.block.name for unit in self._units])
        return {
            "policy": self.plan.policy,
            "device": str(self.device.device),
            "blocks": len(self._units),
            "resident_blocks": len(self.plan.resident),
            "slots": self.plan.slots,
            "exchange": self.plan.exchange,
            "budget_bytes": self.budget,
            "fixed_bytes": self._division.fixed.nbytes,
            "peak_bytes": self.device.peak_bytes,
            "pinned_bytes": self.pinned_bytes,
            "passes": self.passes,
            "plans": self.plans,
            "bytes_per_second": sum(self._rates) / max(len(self._rates), 1),
            "hidden_seconds": max(streams["copy_seconds"] - streams["wait_seconds"], 0.0) if self.device.kind == "cuda" else 0.0,
            "predicted": None if self.prediction is None else vars(self.prediction),
            **streams,
        }
