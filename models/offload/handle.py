"""`offload`: a module whose blocks come to the device one after another, while it runs or trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..weight_files import read_safetensors
from .blocks import find_blocks
from .devices import CpuArena, CudaDevice
from .memory import Packing, Segment, plain_parts, set_data, tensors_of
from .planner import GB, Prediction, choose, device_bytes, predict, smallest_budget
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

    Raises ValueError that names the smallest workable budget when the budget is not a number, too small for two blocks, or more than
    the device has; also for a module without repeated blocks, an unknown policy, or parameters on the meta device without a file.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; use one of {', '.join(POLICIES)}")
    if budget_gb is None and (policy != "superpipeline" or k is None):
        raise ValueError("budget_gb is missing; give gigabytes, or policy='superpipeline' with k")
    return Offload(module, budget_gb, policy, k, k_prime, batch, device, weights, pin_gb)


@dataclass(eq=False)
class _Placed:
    """Tensors that live on the device while the context lasts."""

    packing: Packing
    buffer: Tensor | None = None
    homes: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # (plain part, the data it had, its version since)
    replaced: list[tuple[dict[str, Any], str, Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Ref:
    """What autograd keeps instead of a weight that will have left the device: where to find it again."""

    unit: Unit
    offset: int  # in elements of dtype
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class _Outer:
    """What other saved-tensor hooks made of a tensor."""

    unpack: Callable[[Any], Tensor]
    packed: Any


class Offload:
    """The handle of `offload`; a context manager that can be entered again."""

    def __init__(self, module: nn.Module, budget_gb: float | None, policy: str, k: int | None, k_prime: int, batch: bool, device, weights, pin_gb):
        self.module = module
        self.policy, self.k, self.k_prime, self.batch = policy, k, k_prime, batch
        self.pin_bytes = None if pin_gb is None else int(pin_gb * GB)
        blocks = find_blocks(module)
        files = None if weights is None else read_safetensors(weights)[0]
        self._file_of = tensors_in(module, files, weights)
        self._units, fixed = divide(module, blocks, self._file_of)
        self._fixed = Packing(fixed)
        self._fixed_source = source_of(self._fixed, self._file_of)
        self.nbytes = [unit.packing.nbytes for unit in self._units]
        self.device = _device(device)
        self.budget = self._checked(budget_gb)
        self.plan = self._first_plan()
        self.scheduler: Scheduler | None = None
        self.prediction: Prediction | None = None
        self._rates: list[float] = []
        self.pinned_bytes = 0
        self.passes = 0
        self.plans = 0
        self._planned_seconds = 0.0
        self._saving: Any = None  # the saved-tensor hooks of the block that runs
        self._active: Unit | None = None
        self._final: dict[str, Any] = {}

    # ---- numbers ------------------------------------------------------------------------------------------------------------------

    def _checked(self, budget_gb: float | None) -> int | None:
        smallest = self._fixed.nbytes + smallest_budget(self.nbytes)
        remedy = f"the smallest workable budget for {type(self.module).__name__} is {_gb(smallest, up=True)} GB"
        room = self.device.room() + sum(part.nbytes for _, _, tensor in tensors_of(self.module) for part in plain_parts(tensor) if part.is_cuda)
        if budget_gb is not None:
            if not isinstance(budget_gb, (int, float)) or not math.isfinite(budget_gb):
                raise ValueError(f"budget_gb is {budget_gb!r}, not a number of gigabytes; {remedy}")
            if budget_gb * GB < smallest:
                raise ValueError(
                    f"budget_gb is {budget_gb:g}: too small for two blocks ({_gb(max(self.nbytes))} GB each) and what is outside the blocks "
                    f"({_gb(self._fixed.nbytes)} GB); {remedy}"
                )
            if budget_gb * GB > room:
                raise ValueError(f"budget_gb is {budget_gb:g} and {self.device.device} has {_gb(room)} GB to give; use less: {remedy}")
        if smallest > room:
            raise ValueError(f"{self.device.device} has {_gb(room)} GB to give; {remedy}")
        return None if budget_gb is None else int(budget_gb * GB)

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
            raise ValueError(f"superpipeline with k={k} takes {_gb(smallest, up=True)} GB and budget_gb is {_gb(self.budget or 0)}; use a smaller k")
        return plan

    # ---- life cycle ---------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Offload:
        if self.scheduler is not None:
            raise RuntimeError("this handle is in use; leave it before you enter it again, or make another")
        self._hooks: list[Any] = []
        self._moved: list[tuple[Unit, Tensor, torch.device]] = []
        self._resident: dict[Unit, _Placed] = {}
        self._rest: _Placed | None = None
        self._order: list[Unit] | None = []
        self._in_backward: Unit | None = None
        self._backward_buffer: Any = None
        self._last = -1
        try:
            self._move_home()
            self._rates = self._measured_rates()
            self._rest = self._place(self._fixed, self._fixed_source)
            self._start(self.plan)
            for unit in self._units:
                before, after = self._hooks_of(unit)
                self._hooks.append(unit.block.module.register_forward_pre_hook(before, prepend=True))
                self._hooks.append(unit.block.module.register_forward_hook(after, always_call=True))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._end_backward()
        for unit in self._units:
            self._restore(unit)
        if self.scheduler is not None:
            self._final = self._figures()
            self.scheduler.close()
            self.scheduler = None
        self.device.synchronize()
        for placed in [*self._resident.values(), *([self._rest] if self._rest is not None else [])]:
            self._unplace(placed)
        self._resident.clear()
        self._rest = None
        for unit, packed, origin in self._moved:
            home = torch.empty_like(packed, device=origin, pin_memory=False)
            unit.packing.attach(home.copy_(packed))
            unit.host = source_of(unit.packing, self._file_of)
        self._moved.clear()
        self.device.close()

    def _start(self, plan: Plan) -> None:
        """Bring the residents of `plan`, send away those of the plan before, and fill the slots."""
        self.plan = plan
        self.plans += 1
        for index, unit in enumerate(self._units):
            unit.index = index
        keep = {self._units[index] for index in plan.resident}
        for unit in [unit for unit in self._resident if unit not in keep]:
            self._unplace(self._resident.pop(unit))
        for unit in self._units:
            if unit in keep and unit not in self._resident:
                self._resident[unit] = self._place(unit.packing, unit.host)
            self.device.sources[unit.index] = unit.to_copy
        self.device.reset(max((self.nbytes[index] for index in plan.streamed), default=0))
        self.scheduler = Scheduler(self.device, plan, self.nbytes)
        self.scheduler.start()

    def _move_home(self) -> None:
        """Put the blocks where copies start from: pinned memory up to the cap on a GPU machine, else wherever they are."""
        if self.device.kind != "cuda":
            return
        cap = _machine_bytes() * 2 // 5 if self.pin_bytes is None else self.pin_bytes
        for unit in self._units:
            origin = unit.packing.parts[0].device
            pin = self.pinned_bytes + unit.packing.nbytes <= cap and not any(id(part) in self._file_of for part in unit.packing.parts)
            if not pin and not origin.type == "cuda":
                continue
            packed = torch.empty(unit.packing.nbytes, dtype=torch.uint8, pin_memory=pin)
            self.pinned_bytes += unit.packing.nbytes if pin else 0
            for segment in unit.packing.segments():
                packed[segment.offset : segment.offset + segment.source.numel()].copy_(segment.source)
            unit.packing.attach(packed)
            self._moved.append((unit, packed, origin))
            unit.host = partial(list, [Segment(packed, 0)])

    def _measured_rates(self) -> list[float]:
        """Bytes per second of each block's copies."""
        pinned = {id(unit) for unit, packed, _ in self._moved if packed.is_pinned()}
        kinds = {id(unit) in pinned for unit in self._units}
        rates = {kind: self.device.bandwidth(pinned=kind) for kind in kinds}
        return [rates[id(unit) in pinned] for unit in self._units]

    # ---- tensors that stay --------------------------------------------------------------------------------------------------------

    def _place(self, packing: Packing, source: Callable[[], list[Segment]]) -> _Placed:
        placed = _Placed(packing)
        if self.device.kind == "cuda" and packing.parts and all(part.is_cuda for part in packing.parts):
            return placed  # it is there already
        placed.buffer = self.device.place(packing.nbytes, source)
        for owner, name, old, new in packing.views(placed.buffer):
            if plain_parts(old)[0] is old and not old.is_meta:
                if not any(part is old for part, _, _ in placed.homes):
                    home = old.data
                    set_data(old, packing.pieces[id(old)].view(placed.buffer))
                    placed.homes.append((old, home, old._version))
            else:  # a wrapper subclass knows its device itself, and a meta tensor cannot be given data
                table = _table(owner, name)
                placed.replaced.append((table, name, old, new))
                table[name] = new
        return placed

    def _unplace(self, placed: _Placed) -> None:
        for table, name, old, new in placed.replaced:
            if table.get(name) is new:
                table[name] = old
        with torch.no_grad():
            for part, home, version in placed.homes:
                # Untouched weights are not written back: they may be a read-only map of a file.
                set_data(part, home if part._version == version else home.copy_(part))
                if part.grad is not None and part.grad.device != part.device:
                    part.grad = part.grad.to(part.device)
        placed.homes.clear()
        if placed.buffer is not None:
            self.device.unplace(placed.buffer)

    # ---- around a block -----------------------------------------------------------------------------------------------------------

    def _hooks_of(self, unit: Unit) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any) -> None:
            self._before(unit, args)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._after(unit)

        return torch.compiler.disable(before), torch.compiler.disable(after)

    def _before(self, unit: Unit, args: tuple[Any, ...]) -> None:
        if self._active is not None:  # an interrupt (no Exception) got past torch's promise to call hooks always
            self._restore(self._active)
        in_backward = torch._C._current_graph_task_id() != -1
        if not in_backward:
            self._end_backward()
            self._new_pass(unit, args)
        assert self.scheduler is not None
        if in_backward:  # a checkpointed block is computed again: its weights stay for the gradients that follow
            buffer = self._for_backward(unit)
        else:
            buffer = self.scheduler.acquire(unit.index, FORWARD)
        self._active, unit.swapped = unit, []
        if buffer is None:
            return
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False):  # inference tensors would not tell when a buffer is written
            views = list(unit.packing.views(buffer))
        for owner, name, old, new in views:
            table = _table(owner, name)
            if graph and new.requires_grad:
                new.register_post_accumulate_grad_hook(_gradient_to(old))
            unit.swapped.append((table, name, old, new, new._version))
            table[name] = new
        if graph:
            outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
            self._saving = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, unit, buffer.data_ptr(), outer), self._unpack)
            self._saving.__enter__()

    def _after(self, unit: Unit) -> None:
        if unit.swapped is None:  # the block never started
            return
        self._restore(unit)
        assert self.scheduler is not None
        if self._in_backward is not unit:
            self.scheduler.release(unit.index)

    def _restore(self, unit: Unit) -> None:
        """The module's own tensors again. Buffers that the block wrote are kept."""
        if self._saving is not None:
            self._saving.__exit__(None, None, None)
            self._saving = None
        self._active = None
        swapped, unit.swapped = unit.swapped or [], None
        for table, name, old, new, version in swapped:
            if table.get(name) is not new:
                continue  # the block put something else there
            table[name] = old
            if not isinstance(old, nn.Parameter):
                if new._version != version:
                    with torch.no_grad():
                        old.copy_(new)
            elif new.requires_grad:
                # The graph still holds this leaf, for its gradient. It must not hold the slot.
                new.data = torch.full((), math.nan, dtype=new.dtype, device=new.device).expand(new.shape)

    def _new_pass(self, unit: Unit, args: tuple[Any, ...]) -> None:
        """Learn the order of the blocks from the first pass; plan again when a pass begins and its compute has changed."""
        assert self.scheduler is not None
        if self._order is not None:
            if unit in self._order:
                order, self._order = self._order, None
                order += [other for other in self._units if other not in order]
                if order != self._units:
                    self._units = order
                    self.nbytes = [other.packing.nbytes for other in order]
                    self._restart(self._remade())
            else:
                self._order.append(unit)
        if unit.index <= self._last:
            self.passes += 1
            self._replan()
        if unit.index <= self._last or self._last < 0:
            training = torch.is_grad_enabled() and any(
                tensor.requires_grad for _, _, tensor in [*unit.packing.entries, *((None, "", arg) for arg in args if isinstance(arg, Tensor))]
            )
            if training != self.scheduler.backward:
                self.scheduler.set_backward(training)
            # An optimizer has stepped since these were fetched. All at once, so that the copies run ahead of the blocks.
            for index in [index for index in self.scheduler.loaded if self._units[index].copied != self._units[index].versions()]:
                self.scheduler.reload(index)
        self._last = unit.index

    def _remade(self) -> Plan:
        return self._first_plan()

    def _restart(self, plan: Plan) -> None:
        assert self.scheduler is not None
        copied, misses = self.scheduler.copied_bytes, self.scheduler.misses
        self.scheduler.close()
        self._start(plan)
        self.scheduler.copied_bytes += copied
        self.scheduler.misses += misses

    def _replan(self) -> None:
        assert self.scheduler is not None
        if self.scheduler.backward or not self.plan.streamed:
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

    # ---- backward -----------------------------------------------------------------------------------------------------------------

    def _pack(self, unit: Unit, address: int, outer: Any, tensor: Tensor) -> Any:
        # By address: autograd keeps this function with every saved tensor, and with it anything that it refers to.
        if tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() != address:
            # Only the innermost hooks are asked: hand on to those that were there before (checkpointing, save_on_cpu).
            return tensor if outer is None else _Outer(outer[1], outer[0](tensor))
        return _Ref(unit, int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride(), unit.versions())

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Outer):
            return saved.unpack(saved.packed)
        if not isinstance(saved, _Ref):
            return saved
        if self.scheduler is None:
            raise RuntimeError("backward was called outside the offload context of its forward; call it inside")
        if saved.versions != saved.unit.versions():
            raise RuntimeError(f"weights of {saved.unit.block.name} were changed between forward and backward; step the optimizer after backward")
        buffer = self._for_backward(saved.unit)
        return (
            buffer[: buffer.numel() // saved.dtype.itemsize * saved.dtype.itemsize]
            .view(saved.dtype)
            .as_strided(saved.size, saved.stride, saved.offset)
        )

    def _for_backward(self, unit: Unit) -> Any:
        if self._in_backward is not unit:
            assert self.scheduler is not None
            if self._in_backward is None:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            else:
                self._backward_buffer = None  # before the slot is filled again
                self.scheduler.release(self._in_backward.index)
            self._backward_buffer = self.scheduler.acquire(unit.index, BACKWARD)
            self._in_backward = unit
        return self._backward_buffer

    def _end_backward(self) -> None:
        unit, self._in_backward, self._backward_buffer = self._in_backward, None, None
        if unit is not None and self.scheduler is not None:
            self.scheduler.release(unit.index)

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


def _gradient_to(home: Tensor) -> Callable[[Tensor], None]:
    """Move a finished gradient to the host parameter, as autograd would have accumulated it there."""

    def move(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient = leaf.grad.detach().to(home.device)
        leaf.grad = None
        with torch.no_grad():
            if home.grad is None:
                home.grad = gradient
            else:
                home.grad += gradient

    return move


def _table(owner: nn.Module, name: str) -> dict[str, Any]:
    return owner._parameters if name in owner._parameters else owner._buffers


def _device(device: Any) -> Any:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, (str, torch.device)):
        device = torch.device(device)
        if device.type == "cpu":
            return CpuArena()
        if device.type != "cuda":
            raise ValueError(f"device is {device}; use a CUDA device, or 'cpu' for the arena")
        return CudaDevice(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
    return device


def _machine_bytes() -> int:
    return CpuArena().room()


def _gb(nbytes: float, *, up: bool = False) -> str:
    """Bytes as GB with three digits after the point; rounded up where the number is a minimum."""
    value = nbytes / GB * 1000
    return f"{(math.ceil(value) if up else round(value)) / 1000:g}" if value >= 1 else f"{nbytes / GB:.2g}"
