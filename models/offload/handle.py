"""`offload`: a module whose blocks come to the device one after another, while it runs or trains."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..weight_files import read_safetensors
from .backward import ONE_THREAD, Active, Backward
from .blocks import find_blocks
from .devices import CpuArena, device_of
from .edits import HeldMemory, Hook, NotingTables, Structure, offloaded_part, places, storages_of
from .lent import Lent
from .memory import Packing, Segment, plain_parts, tensors_of
from .placed import Placed
from .planner import GB, Prediction, checked_budget, choose, device_bytes, gigabytes, predict
from .schedule import BACKWARD, FORWARD, Plan, Scheduler, superpipeline
from .units import Unit, divide, source_of, tensors_in

POLICIES = ("auto", "resident", "superpipeline")
# A plan is made anew when the measured compute of a pass has changed by this factor: attention was made sparse, the resolution changed.
REPLAN = 1.2


def offload(
    module: nn.Module,
    budget_gb: float | None = None,
    *,
    policy: str = "auto",
    k: int | None = None,
    k_prime: int = 1,
    batch: bool = True,
    device: torch.device | str | CpuArena | None = None,
    weights: str | Path | None = None,
    pin_gb: float | None = None,
) -> Offload:
    """Run `module` on `device` with at most `budget_gb` GB (2**30 bytes) of weights there; outputs and gradients are bitwise the same.

        with tessera.offload(model, budget_gb=6) as handle:
            out = model(x)            # or forward, backward and an optimizer step
            print(handle.report())

    Repeated blocks are found by structure; everything else stays on the device and counts. Inside, `module` is called with inputs on
    the device. Outside it is as it was. Activations are not counted.

    policy: "resident" keeps as many blocks as fit, spread evenly, and streams the others through two to four slots (the default, "auto");
    "superpipeline" keeps a window of `k` blocks and exchanges `k_prime` at a time, `batch` or one by one (Abbasi and Lim 2024); without
    `k` the budget decides it. device: a CUDA device, or "cpu" for an arena of real memory that poisons what it evicts (for tests);
    default: CUDA where there is one. weights: a safetensors file that holds the parameters that `module` has on the meta device; they are
    read from disk, block by block. pin_gb: most host memory to pin, default 40 % of the machine's.

    Training: gradients of streamed blocks accumulate on their host parameters, where any torch optimizer steps; residents and the rest
    of the module are ordinary device parameters for as long as the context lasts, so make the optimizer, or at least its state, inside.
    A backward that is itself differentiated (create_graph) keeps copies of the weights that it used, beyond the budget.

    Inside, the module may be edited as outside: weights written to (also through `.data` or NumPy), replaced, loaded, cast; adapters,
    parametrizations, blocks added and taken away. It is laid out again where that is needed, and what was done is there after the
    context. A weight that is taken from a block while the block runs lies in a slot: copy it. Copies and pickles of the module are
    free of the context. One thread runs the module at a time; another gets a RuntimeError.

    Raises ValueError that names the smallest workable budget when the budget is not a number, too small for two blocks, or more than
    the device has; also for a module without repeated blocks, an unknown policy, or parameters on the meta device without a file. Inside,
    a forward raises ValueError when the edited module no longer fits, and RuntimeError, which names the weight, for writes that cannot be
    kept: to memory that somebody has held since before the context, to weights that lie in a file, between a forward and its backward.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; use one of {', '.join(POLICIES)}")
    if budget_gb is None and (policy != "superpipeline" or k is None):
        raise ValueError("budget_gb is missing; give gigabytes, or policy='superpipeline' with k")
    return Offload(module, budget_gb, policy, k, k_prime, batch, device, weights, pin_gb)


class Offload:
    """The handle of `offload`; a context manager that can be entered again."""

    def __init__(self, module: nn.Module, budget_gb: float | None, policy: str, k: int | None, k_prime: int, batch: bool, device, weights, pin_gb):
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
        self._structure: Structure | None = None
        self._lay_out()
        self._forget()
        self.scheduler: Scheduler | None = None
        self.prediction: Prediction | None = None
        self._rates: list[float] = []
        self.pinned_bytes = 0
        self.passes = 0
        self.plans = 0
        self._planned_seconds = 0.0
        self._saving: Any = None  # the saved-tensor hooks of the block that runs
        self._active: Active | None = None
        self._lock = threading.Lock()  # around a change of `_active`
        self._thread = -1  # of the latest forward
        self._final: dict[str, Any] = {}

    def _lay_out(self) -> None:
        """Divide the module, as it is now, into blocks and the rest, and make a plan for them."""
        self._file_of = tensors_in(self.module, self._files, self._path)
        self._units, fixed = divide(self.module, find_blocks(self.module), self._file_of)
        order = {name: index for index, name in enumerate(self._learnt)}
        self._units.sort(key=lambda unit: order.get(unit.block.name, len(order)))
        self._fixed = Packing(fixed)
        self._fixed_source = source_of(self._fixed, self._file_of)
        before, self.nbytes = self.nbytes, [unit.packing.nbytes for unit in self._units]
        there = (part for _, _, tensor in tensors_of(self.module) for part in plain_parts(tensor) if part.is_cuda)
        room = self.device.room() + sum(part.nbytes for part in there)
        self.budget = checked_budget(
            self._budget_gb, self._fixed.nbytes, self.nbytes, room, device=self.device.device, name=type(self.module).__name__
        )
        if self.nbytes != before:
            self.plan = self._first_plan()

    def _forget(self) -> None:
        """Nothing of the layout outside the context: the module may become another, and its tensors be its own."""
        self._learnt = [unit.block.name for unit in self._units]
        self._units, self._fixed, self._file_of = [], Packing([]), {}
        self._fixed_source, self._structure = self._fixed.segments, None

    def _note_places(self) -> None:
        """Where everything is as long as nobody edits the module."""
        self._structure = Structure(self.module)
        self._fixed_places = places(self._fixed.parts)
        for unit in self._units:
            unit.note_places()
        self._storages = storages_of(self.module)

    # ---- numbers ------------------------------------------------------------------------------------------------------------------

    def _first_plan(self) -> Plan:
        blocks = len(self._units)
        room = None if self.budget is None else self.budget - self._fixed.nbytes
        if self.policy != "superpipeline":
            assert room is not None
            return choose(self.nbytes, room)
        k = self.k
        if k is None:
            assert room is not None
            k = blocks if sum(self.nbytes) <= room else room // max(self.nbytes)
        plan = superpipeline(blocks, k, self.k_prime, batch=self.batch)
        if room is not None and device_bytes(plan, self.nbytes) > room:
            smallest = self._fixed.nbytes + device_bytes(plan, self.nbytes)
            raise ValueError(
                f"superpipeline with k={k} takes {gigabytes(smallest, up=True)} GB and budget_gb is {gigabytes(self.budget or 0)}; use a smaller k"
            )
        return plan

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
                self._refuse_unreached(unseen=True)
        finally:
            self._leave()

    def _arrive(self) -> None:
        """Bring the module, as it was laid out, to the device."""
        self._hooks: list[Any] = []
        self._moved: list[tuple[Unit, Tensor, torch.device]] = []
        self._resident: dict[Unit, Placed] = {}
        self._rest: Placed | None = None
        self._tables = NotingTables()
        self._order: list[Unit] | None = []
        self._backward = Backward(partial(self._fetch, direction=BACKWARD), self._release, lambda: self._active, self._lock)
        self._last = -1
        self._held = HeldMemory(storages_of(self.module))
        try:
            self._move_home()
            self._rates = self._measured_rates()
            users = {id(owner): unit for unit in self._units for owner, _, _ in unit.packing.entries}
            for owner in list(self.module.modules()):
                self._tables.put(owner, users.get(id(owner), self))
            self._rest = Placed(self.device, self._fixed, self._fixed_source, self._file_of, self._held)
            self._start(self.plan)
            self._hooks.append(self.module.register_forward_pre_hook(Hook(self._before_all), prepend=True))
            for unit in self._units:
                block = unit.block.module
                unit.lent = Lent(unit.packing, self._file_of)
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
        if self._active is not None and self._active.unit is not None:
            self._restore(self._active.unit)
            self._active = None
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
        for unit, packed, origin in self._moved:
            home = torch.empty_like(packed, device=origin, pin_memory=False)
            unit.packing.attach(home.copy_(packed), instead_of=packed)
        self._moved.clear()
        self.device.close()
        self._forget()

    # ---- edits --------------------------------------------------------------------------------------------------------------------

    touched = False  # who reaches for what stays on the device does not matter: it is compared when it leaves

    def _edited(self) -> bool:
        """Whether the module has other modules or parameters than it was laid out with, or its tensors lie elsewhere."""
        assert self._structure is not None
        if self._structure.changed() or self._fixed_places != places(self._fixed.parts):
            return True
        return not all(unit.intact() for unit in self._units)

    def _refuse_unreached(self, *, unseen: bool = False) -> None:
        part = self._held.written(unseen=unseen)
        if part is not None:
            tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
            name = next((name for name, tensor in tensors if any(each is part for each in plain_parts(tensor))), "a weight that was replaced")
            raise RuntimeError(
                f"{name} was written to through a reference from before the offload context (a state dict, an array, .data), which did not "
                "reach the device; edit it before the context, or by a reference that is taken inside"
            )

    def _arrive_again(self) -> None:
        """Lay the edited module out anew."""
        assert self.scheduler is not None
        self._refuse_unreached(unseen=True)
        if self._backward.unit is not None:
            raise RuntimeError("the module was edited during a backward pass; edit it before the forward or after the backward")
        copied, misses = self.scheduler.copied_bytes, self.scheduler.misses
        self._leave("the module was edited between forward and backward; edit it before the forward or after the backward")
        try:
            self._lay_out()
        except ValueError as error:
            raise ValueError(
                f"{type(self.module).__name__} was edited inside the offload context and cannot go on there: {error}. "
                "Its weights are as edited; leave the context, and enter another that suits them"
            ) from error
        self._arrive()
        assert self.scheduler is not None
        self.scheduler.copied_bytes += copied
        self.scheduler.misses += misses

    def _to_copy(self, unit: Unit) -> list[Segment]:
        unit.held = unit.held_elsewhere(self._storages)
        return unit.to_copy()

    def _stale(self, unit: Unit) -> bool:
        """Whether the module may have other weights by now than those that were copied."""
        return unit.touched or unit.copied != unit.versions()

    def _start(self, plan: Plan) -> None:
        """Bring the residents of `plan`, send away those of the plan before, and fill the slots."""
        self.plan = plan
        self.plans += 1
        for index, unit in enumerate(self._units):
            unit.index = index
        keep = {self._units[index] for index in plan.resident}
        for unit in [unit for unit in self._resident if unit not in keep]:
            self._resident.pop(unit).take_back()
        for unit in self._units:
            if unit in keep and unit not in self._resident:
                self._resident[unit] = Placed(self.device, unit.packing, unit.host, self._file_of, self._held)
            self.device.sources[unit.index] = partial(self._to_copy, unit)
        self._note_places()
        self.device.reset(max((self.nbytes[index] for index in plan.streamed), default=0))
        self.scheduler = Scheduler(self.device, plan, self.nbytes)
        self.scheduler.start()

    def _move_home(self) -> None:
        """Put the blocks where copies start from: pinned memory up to the cap on a GPU machine, else wherever they are."""
        if self.device.kind != "cuda":
            return
        cap = CpuArena().room() * 2 // 5 if self.pin_bytes is None else self.pin_bytes
        for unit in self._units:
            origin = unit.packing.parts[0].device
            pin = self.pinned_bytes + unit.packing.nbytes <= cap and not any(id(part) in self._file_of for part in unit.packing.parts)
            if not pin and not origin.type == "cuda":
                continue
            packed = torch.empty(unit.packing.nbytes, dtype=torch.uint8, pin_memory=pin)
            self.pinned_bytes += unit.packing.nbytes if pin else 0
            for segment in unit.packing.segments():
                packed[segment.offset : segment.offset + segment.source.numel()].copy_(segment.source)
            for part in unit.packing.parts:
                self._held.note(part)
            unit.packing.attach(packed)
            self._moved.append((unit, packed, origin))
            unit.host = partial(list, [Segment(packed, 0)])

    def _measured_rates(self) -> list[float]:
        """Bytes per second of each block's copies."""
        pinned = {id(unit) for unit, packed, _ in self._moved if packed.is_pinned()}
        kinds = {id(unit) in pinned for unit in self._units}
        rates = {kind: self.device.bandwidth(pinned=kind) for kind in kinds}
        return [rates[id(unit) in pinned] for unit in self._units]

    # ---- around a block -----------------------------------------------------------------------------------------------------------

    def _claim(self, *, in_backward: bool = False) -> Active | None:
        """Begin to run something; what ran already in this thread. Raises RuntimeError where another thread does."""
        thread = threading.get_ident()
        with self._lock:
            running = self._active
            if (running is not None and running.thread != thread) or (not in_backward and self._backward.busy(thread)):
                raise RuntimeError(ONE_THREAD)
            self._active = Active(None, thread)
        return running

    def _before_all(self, module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        running = self._claim()
        try:
            if running is None:
                self._backward.end()
                if self._edited():
                    self._arrive_again()
                self._refuse_unreached()
        finally:
            self._active = running

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        running = self._claim(in_backward=in_backward)
        try:
            if running is not None and running.unit is not None:  # an interrupt (no Exception) got past torch's promise to call hooks always
                self._restore(running.unit)
            self._bring(module, args, in_backward)
        except BaseException:
            self._active = None
            raise

    def _bring(self, module: nn.Module, args: tuple[Any, ...], in_backward: bool) -> None:
        unit = self._unit_of(module)
        if torch.jit.is_tracing():
            raise RuntimeError("a trace would keep weights that move; trace the module outside of the offload context")
        if torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("transforms of torch.func do not go through an offloaded block with gradients; use autograd, or leave the context")
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
        self._active = Active(unit, threading.get_ident(), buffer)
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
        if unit.index in self.scheduler.loaded and self._stale(unit):
            self.scheduler.reload(unit.index)
        return self.scheduler.acquire(unit.index, direction)

    def _release(self, block: int) -> None:
        assert self.scheduler is not None
        self.scheduler.release(block)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        active, unit = self._active, None if self._active is None else self._active.unit
        if active is None or unit is None or unit.block.module is not module or active.thread != threading.get_ident():
            return  # the block never started
        self._active = Active(None, active.thread)  # without the buffer, which would be kept while the next one is allocated
        del active
        try:
            self._restore(unit)
        finally:
            if self._backward.unit is not unit:
                self._release(unit.index)
            self._active = None

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
        assert self.scheduler is not None
        if self._order is not None:
            if unit not in self._order:
                self._order.append(unit)
            elif not self._backward.waits():
                order, self._order = self._order, None
                order += [other for other in self._units if other not in order]
                if order != self._units:
                    self._units = order
                    self.nbytes = [other.packing.nbytes for other in order]
                    self._restart(self._remade())
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
                if self._stale(other) or other.held or other.held_elsewhere(self._storages):
                    self.scheduler.reload(index)
        self._last = unit.index

    def _remade(self) -> Plan:
        return self._first_plan()

    def _restart(self, plan: Plan) -> None:
        assert self.scheduler is not None
        if self._edited():
            return self._arrive_again()
        copied, misses = self.scheduler.copied_bytes, self.scheduler.misses
        self.scheduler.close()
        self._start(plan)
        self.scheduler.copied_bytes += copied
        self.scheduler.misses += misses

    def _replan(self) -> None:
        assert self.scheduler is not None
        if self.scheduler.backward or not self.plan.streamed or self._backward.waits():
            return
        seconds = self._seconds()
        if seconds is None or 1 / REPLAN < sum(seconds) / (self._planned_seconds or 1e-12) < REPLAN:
            return
        self._planned_seconds = sum(seconds)
        plan = self.plan
        if self.policy != "superpipeline":
            assert self.budget is not None
            plan = choose(self.nbytes, self.budget - self._fixed.nbytes, seconds, self._rates)
        self.prediction = predict(plan, self.nbytes, seconds, self._rates)
        if plan != self.plan:
            self._restart(plan)

    def _seconds(self) -> list[float] | None:
        """Measured compute of each block, from its latest pass; None until every block has one."""
        assert self.scheduler is not None
        found: dict[int, float] = {}
        for record in reversed(self.scheduler.records):
            if record.kind == "compute" and record.block not in found and self.device.happened(record.end):
                found[record.block] = self.device.seconds(record.start, record.end)
        return [found[index] for index in range(len(self._units))] if len(found) == len(self._units) else None

    # ---- report -------------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What happened so far, or, after the context, until its end. Bytes and seconds.

        peak_bytes: most device bytes of weights and slots. copied_bytes: host to device, slots only. compute_seconds, copy_seconds and
        wait_seconds: of the last passes that `events` holds; hidden_seconds: copy_seconds without the waits. events: (kind, block,
        start, end), seconds since the first of them.
        """
        if self.scheduler is None:
            return dict(self._final)
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        assert self.scheduler is not None
        self.device.synchronize()
        records = list(self.scheduler.records)
        first = records[0].start if records else None
        events = [(r.kind, self._units[r.block].block.name, self.device.seconds(first, r.start), self.device.seconds(first, r.end)) for r in records]
        total = {kind: sum(end - start for what, _, start, end in events if what == kind) for kind in ("compute", "copy", "wait")}
        return {
            "policy": self.plan.policy,
            "device": str(self.device.device),
            "blocks": len(self._units),
            "resident_blocks": len(self.plan.resident),
            "slots": self.plan.slots,
            "exchange": self.plan.exchange,
            "budget_bytes": self.budget,
            "fixed_bytes": self._fixed.nbytes,
            "peak_bytes": self.device.peak_bytes,
            "pinned_bytes": self.pinned_bytes,
            "copied_bytes": self.scheduler.copied_bytes,
            "misses": self.scheduler.misses,
            "passes": self.passes,
            "plans": self.plans,
            "bytes_per_second": sum(self._rates) / max(len(self._rates), 1),
            "compute_seconds": total["compute"],
            "copy_seconds": total["copy"],
            "wait_seconds": total["wait"],
            "hidden_seconds": max(total["copy"] - total["wait"], 0.0) if self.device.kind == "cuda" else 0.0,
            "predicted": None if self.prediction is None else vars(self.prediction),
            "events": events,
        }
