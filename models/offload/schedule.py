"""Which block is on the device when. The scheduler knows blocks by their number and a device by seven verbs; it never sees a weight.

The same scheduler runs a GPU, a CPU arena and a simulation in virtual time (`devices`), so what the simulation predicts is what runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FORWARD, BACKWARD = "forward", "backward"


class Device(Protocol):
    """What the scheduler needs of a device. Buffers and events are the device's own objects.

    There is one compute stream and one copy stream; each runs in order, the two run side by side.
    """

    def alloc(self, nbytes: int) -> tuple[Any, Any]:
        """(buffer, event after which it may be written). Raises MemoryError, or the framework's own, when there is no room."""
        ...

    def free(self, buffer: Any, after: Any) -> None:
        """Give a buffer back; its memory may be used again once the event `after` has happened."""
        ...

    def copy(self, buffer: Any, block: int, after: Any) -> tuple[Any, Any]:
        """Queue the copy of a block's weights into `buffer`, not before the event `after`. Returns events (started, done)."""
        ...

    def record(self) -> Any:
        """The event that all compute queued so far is done."""
        ...

    def wait(self, event: Any) -> None:
        """Compute that is queued from now on starts after the event."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two events that have happened."""
        ...

    def happened(self, event: Any) -> bool:
        """Whether an event has."""
        ...


@dataclass(frozen=True)
class Plan:
    """A policy with its numbers, for n blocks in the order of execution.

    resident: blocks that stay on the device. slots: how many of the others can be there at once. exchange: how many are replaced at a
    time. batch: the blocks of an exchange become usable together, when the last of them has arrived; else one by one.
    """

    policy: str
    blocks: int
    resident: frozenset[int]
    slots: int
    exchange: int = 1
    batch: bool = False

    def __post_init__(self) -> None:
        if self.streamed and not 1 <= self.exchange <= self.slots:
            raise ValueError(f"exchange of {self.exchange} blocks with room for {self.slots}: use 1 to {self.slots}")

    @property
    def streamed(self) -> list[int]:
        return [block for block in range(self.blocks) if block not in self.resident]


def resident(blocks: int, residents: int, slots: int = 2) -> Plan:
    """Fixed residents, spread evenly through the depth so that slots refill while they compute, and streaming slots for the rest."""
    residents = min(max(residents, 0), blocks)
    streamed = blocks - residents
    if streamed <= slots:
        return Plan("resident", blocks, frozenset(range(blocks)), 0)
    # Bresenham's rule over the depth: gaps between streamed blocks differ by at most one.
    moved = {index * blocks // streamed for index in range(streamed)}
    return Plan("resident", blocks, frozenset(range(blocks)) - moved, slots)


def superpipeline(blocks: int, k: int, k_prime: int, *, batch: bool = True) -> Plan:
    """Superpipeline (Abbasi and Lim 2024, arXiv:2410.08791): a window of k blocks on the device, k' of them exchanged at a time, as a ring."""
    if not 1 <= k_prime <= k:
        raise ValueError(f"superpipeline: k' is {k_prime} and k is {k}; use 1 <= k' <= k <= {blocks}, the number of blocks")
    if k >= blocks:
        return Plan("superpipeline", blocks, frozenset(range(blocks)), 0)
    return Plan("superpipeline", blocks, frozenset(), k, k_prime, batch)


@dataclass
class _Slot:
    buffer: Any
    ready: Any  # event: the weights have arrived
    readers: Any = None  # event: the last compute that reads them is done; None while the block is in use or unused


@dataclass(frozen=True)
class Record:
    """Something that took time on the device: a copy, a wait for one, or the compute of a block."""

    kind: str  # "copy" | "wait" | "compute"
    block: int
    start: Any
    end: Any


class Scheduler:
    """Brings streamed blocks to a device ahead of their use and takes them away after it.

    acquire(block) before a block computes, release(block) after. Calls may come in any order: the expected one (forward again and again,
    or forward and backward in turn) is prefetched, any other is served with a wait and counted in `misses`.
    """

    def __init__(self, device: Device, plan: Plan, nbytes: Sequence[int], *, history: int = 4):
        self.device = device
        self.plan = plan
        self.nbytes = list(nbytes)
        self.loaded: dict[int, _Slot] = {}
        self.free_slots = plan.slots
        self.pending: list[int] = []  # released, waiting for the exchange to be full
        self.backward = False
        self.sequence: list[int] = []
        self.set_backward(False)
        self.position = 0
        self.misses = 0
        self.copied_bytes = 0
        self.records: deque[Record] = deque(maxlen=3 * history * max(plan.blocks, 1))
        self._began: dict[int, Any] = {}

    def count_on(self, before: Scheduler) -> None:
        """Add what the scheduler before this one copied and missed."""
        self.copied_bytes += before.copied_bytes
        self.misses += before.misses

    def set_backward(self, backward: bool) -> None:
        """Whether each forward pass is followed by a backward pass."""
        forward = list(range(self.plan.blocks))
        self.backward = backward
        self.sequence = forward + forward[::-1] if backward else forward
        self.position = 0

    def start(self) -> None:
        """Fill the slots with the first blocks of the sequence."""
        self._exchange(self.plan.exchange)

    def acquire(self, block: int, direction: str = FORWARD) -> Any:
        """The buffer that holds a streamed block's weights once the compute stream gets here; None for a resident block."""
        self.position = len(self.sequence) - 1 - block if direction == BACKWARD and self.backward else block
        if block in self.plan.resident:
            self._began[block] = self.device.record()
            return None
        if block not in self.loaded:
            self.misses += 1
            self._flush()
            if block not in self.loaded:
                if not self.free_slots:
                    self._evict(self._victim())
                self._load([block])
        slot = self.loaded[block]
        slot.readers = None
        if block in self.pending:
            self.pending.remove(block)
        before = self.device.record()
        self.device.wait(slot.ready)
        self._began[block] = self.device.record()
        self.records.append(Record("wait", block, before, self._began[block]))
        return slot.buffer

    def release(self, block: int) -> None:
        """The compute of `block` has been queued. Its slot is refilled, when the exchange is full, with the block needed next."""
        done = self.device.record()
        self.records.append(Record("compute", block, self._began.pop(block, done), done))
        self.position = (self.position + 1) % len(self.sequence)
        if block not in self.loaded:
            return
        self.loaded[block].readers = done  # no name for the slot here: it would keep the buffer while the next one is allocated
        self.pending.append(block)
        if len(self.pending) >= self.plan.exchange:
            self._flush()

    def reload(self, block: int) -> None:
        """Copy a loaded block again: its weights on the host have changed."""
        slot = self.loaded[block]
        start, slot.ready = self.device.copy(slot.buffer, block, slot.readers if slot.readers is not None else slot.ready)
        self.copied_bytes += self.nbytes[block]
        self.records.append(Record("copy", block, start, slot.ready))

    def compute_seconds(self) -> list[float] | None:
        """Measured compute of each block, from its latest pass; None until every block has one."""
        found: dict[int, float] = {}
        for record in reversed(self.records):
            if record.kind == "compute" and record.block not in found and self.device.happened(record.end):
                found[record.block] = self.device.seconds(record.start, record.end)
        return [found[block] for block in range(self.plan.blocks)] if len(found) == self.plan.blocks else None

    def close(self) -> None:
        """Give every buffer back."""
        self.pending.clear()
        for block in list(self.loaded):
            self._evict(block)

    def _flush(self) -> None:
        """Replace released blocks by those needed sooner."""
        pending, self.pending = self.pending, []
        distance = self._distances()
        fetch = [block for block in sorted(distance, key=distance.__getitem__) if block not in self.loaded and block not in self.plan.resident]
        out = sorted(pending, key=lambda block: -distance[block])
        pairs = [(gone, come) for gone, come in zip(out, fetch, strict=False) if distance[come] < distance[gone]]
        for gone, _ in pairs:
            self._evict(gone)
        self._load([come for _, come in pairs])

    def _exchange(self, size: int) -> None:
        fetch = self.plan.streamed[: self.free_slots]
        for first in range(0, len(fetch), size):
            self._load(fetch[first : first + size])

    def _load(self, blocks: list[int]) -> None:
        slots = []
        for block in blocks:
            buffer, writable = self.device.alloc(self.nbytes[block])
            self.free_slots -= 1
            start, done = self.device.copy(buffer, block, writable)
            self.copied_bytes += self.nbytes[block]
            self.records.append(Record("copy", block, start, done))
            slots.append(_Slot(buffer, done))
            self.loaded[block] = slots[-1]
        if self.plan.batch:
            for slot in slots:
                slot.ready = slots[-1].ready

    def _evict(self, block: int) -> None:
        slot = self.loaded.pop(block)
        self.device.free(slot.buffer, slot.readers if slot.readers is not None else slot.ready)
        self.free_slots += 1

    def _victim(self) -> int:
        """The loaded block, not in use, whose next use is furthest away (Belady)."""
        distance = self._distances()
        idle = [block for block in self.loaded if block not in self._began]
        if not idle:
            raise RuntimeError(
                f"{len(self.loaded)} blocks are in use at once; blocks that call one another cannot be offloaded with {self.plan.slots} slots"
            )
        return max(idle, key=distance.__getitem__)

    def _distances(self) -> dict[int, int]:
        """How many blocks come before the next use of each block."""
        distance: dict[int, int] = {}
        length = len(self.sequence)
        for step in range(length):
            distance.setdefault(self.sequence[(self.position + step) % length], step)
        return distance
