"""How many blocks stay, how many slots stream: the numbers of a policy for a budget, and what they will cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .devices import VirtualDevice
from .schedule import BACKWARD, FORWARD, Plan, Scheduler, resident, superpipeline

GB = 1 << 30  # as graphics cards are sold and as ComfyUI counts
SLOTS = (2, 3, 4)


@dataclass(frozen=True)
class Prediction:
    """One steady pass over the blocks, in virtual time.

    step_seconds: the pass. bound_seconds: the least any schedule with these residents could take, max(compute, transfer).
    copy_seconds: time the link was busy. hidden_share: part of that during which the device computed. peak_bytes: of blocks and slots.
    """

    step_seconds: float
    bound_seconds: float
    compute_seconds: float
    copy_seconds: float
    hidden_share: float
    peak_bytes: int
    copied_bytes: int


def predict(
    plan: Plan, nbytes: Sequence[int], seconds: Sequence[float], bytes_per_second: float | Sequence[float], *, backward: float = 0.0, passes: int = 4
) -> Prediction:
    """Run the scheduler in virtual time. backward: seconds of a block's backward for one of its forward; 0 for inference."""
    device = VirtualDevice(nbytes, seconds, bytes_per_second)
    scheduler = Scheduler(device, plan, nbytes)
    scheduler.set_backward(backward > 0)
    scheduler.start()
    start, before = 0.0, 0
    for index in range(passes):
        if index == passes - 2:  # the first passes fill the slots
            start, before = device.now, scheduler.copied_bytes
        run_pass(scheduler, device, backward)
    steady = 2
    compute = sum(seconds) * (1 + backward)
    copied = (scheduler.copied_bytes - before) // steady
    step = (device.now - start) / steady
    copying = sum(device.copy_seconds[block] for block in plan.streamed) * copied / max(sum(nbytes[block] for block in plan.streamed), 1)
    hidden = 1.0 if copying <= 0 else min(max(1 - (step - compute) / copying, 0.0), 1.0)
    residents = sum(nbytes[block] for block in plan.resident)
    return Prediction(step, max(compute, copying), compute, copying, hidden, residents + device.peak_bytes, copied)


def run_pass(scheduler: Scheduler, device: VirtualDevice, backward: float = 0.0) -> None:
    """One pass of a module's blocks over a virtual device, with its backward when asked."""
    blocks = range(scheduler.plan.blocks)
    for block in blocks:
        scheduler.acquire(block, FORWARD)
        device.compute(block)
        scheduler.release(block)
    for block in reversed(blocks) if backward else ():
        scheduler.acquire(block, BACKWARD)
        device.compute(block, backward)
        scheduler.release(block)


@dataclass(frozen=True, slots=True)
class Copy:
    """A predicted copy on the link, in seconds. waited: from here to `end` the compute stream stood still for it."""

    start: float
    waited: float
    end: float
    early: bool  # its module was measured to end before the link could have brought all of it: `end` is when the module ended


def replay(nbytes: Sequence[int], begins: Sequence[float], ends: Sequence[float], bytes_per_second: float, streams: int) -> list[Copy]:
    """When a host that streams module by module must have copied, from the measured times of the modules on the compute stream.

    One entry for each run of a streamed module, in order: bytes of its weights, and seconds at which the compute stream reached it and was
    done with it, the wait for the weights included. `streams` copy streams are used in turn, as ComfyUI does (comfy.model_management's
    get_offload_stream): whenever a module is reached, the stream of the one before is told to wait for the compute queued so far. So a copy
    begins once compute has reached the module `streams` - 1 before, and with one stream, or none, nothing overlaps. The link makes one copy
    at a time; the host is taken to queue ahead of the device.
    """
    copies: list[Copy] = []
    free, ahead = -math.inf, max(streams, 1) - 1
    for index, (size, begin, end) in enumerate(zip(nbytes, begins, ends, strict=True)):
        start = max(free, begins[max(index - ahead, 0)])
        arrived = start + size / bytes_per_second
        free = min(arrived, end)
        copies.append(Copy(start, min(max(start, begin), free), free, arrived > end))
    return copies


def device_bytes(plan: Plan, nbytes: Sequence[int]) -> int:
    """Most bytes that residents and slots can take: every slot is as large as the largest streamed block."""
    return sum(nbytes[block] for block in plan.resident) + plan.slots * max((nbytes[block] for block in plan.streamed), default=0)


def smallest_budget(nbytes: Sequence[int]) -> int:
    """Bytes without which nothing overlaps: two of the largest block, one that computes and one that arrives."""
    return 2 * max(nbytes)


def choose(nbytes: Sequence[int], room: int, seconds: Sequence[float] | None = None, bytes_per_second: float | Sequence[float] | None = None) -> Plan:
    """The resident policy that fits `room` bytes of blocks and slots, fastest in virtual time where times are known.

    Raises ValueError below `smallest_budget`.
    """
    if room < smallest_budget(nbytes):
        raise ValueError(f"{room} bytes are less than two blocks, {smallest_budget(nbytes)}")
    plans = [plan for slots in SLOTS if (plan := _fitting(nbytes, room, slots)) is not None]
    if seconds is None or bytes_per_second is None:
        return plans[0]
    return min(plans, key=lambda plan: predict(plan, nbytes, seconds, bytes_per_second).step_seconds)


def _fitting(nbytes: Sequence[int], room: int, slots: int) -> Plan | None:
    """With this many slots the most residents that fit."""
    for residents in range(len(nbytes), -1, -1):
        plan = resident(len(nbytes), residents, slots)
        if device_bytes(plan, nbytes) <= room:
            return plan
    return None


def window(nbytes: Sequence[int], fixed: int, budget: int | None, k: int | None, k_prime: int, *, batch: bool) -> Plan:
    """The superpipeline of k blocks; None: of as many as fit `budget`, which is bytes of these blocks and of `fixed` ones.

    Raises ValueError where k blocks take more.
    """
    if k is None:
        assert budget is not None
        k = len(nbytes) if sum(nbytes) <= budget - fixed else (budget - fixed) // max(nbytes)
    plan = superpipeline(len(nbytes), k, k_prime, batch=batch)
    smallest = fixed + device_bytes(plan, nbytes)
    if budget is not None and smallest > budget:
        raise ValueError(f"superpipeline with k={k} takes {gigabytes(smallest, up=True)} GB and budget_gb is {gigabytes(budget)}; use a smaller k")
    return plan


def checked_budget(budget_gb: float | None, fixed: int, nbytes: Sequence[int], available: int, *, device: object, name: str) -> int | None:
    """The budget in bytes. fixed: bytes outside the blocks; available: those that the device can give.

    Raises ValueError, which names the smallest one.
    """
    smallest = fixed + smallest_budget(nbytes)
    remedy = f"the smallest workable budget for {name} is {gigabytes(smallest, up=True)} GB"
    if budget_gb is not None:
        if not isinstance(budget_gb, (int, float)) or not math.isfinite(budget_gb):
            raise ValueError(f"budget_gb is {budget_gb!r}, not a number of gigabytes; {remedy}")
        if budget_gb * GB < smallest:
            raise ValueError(
                f"budget_gb is {budget_gb:g}: too small for two blocks ({gigabytes(max(nbytes))} GB each) and what is outside the blocks "
                f"({gigabytes(fixed)} GB); {remedy}"
            )
        if budget_gb * GB > available:
            raise ValueError(f"budget_gb is {budget_gb:g} and {device} has {gigabytes(available)} GB to give; use less: {remedy}")
    if smallest > available:
        raise ValueError(f"{device} has {gigabytes(available)} GB to give; {remedy}")
    return None if budget_gb is None else int(budget_gb * GB)


def gigabytes(nbytes: float, *, up: bool = False) -> str:
    """Bytes as GB with three digits after the point; rounded up where the number is a minimum."""
    value = nbytes / GB * 1000
    return f"{(math.ceil(value) if up else round(value)) / 1000:g}" if value >= 1 else f"{nbytes / GB:.2g}"
