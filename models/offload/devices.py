"""Devices for the scheduler: a GPU, a CPU arena with real memory, and virtual time."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import Segment


class VirtualDevice:
    """Time without a device: blocks of known size and compute time, a link of known speed. All times in seconds, sizes in bytes.

    The host is taken to be infinitely fast, as it nearly is when it runs ahead of a GPU. bytes_per_second: one number, or one a block
    (pageable or disk-backed blocks are slower).
    """

    def __init__(self, nbytes: Sequence[int], compute_seconds: Sequence[float], bytes_per_second: float | Sequence[float]):
        self.nbytes = list(nbytes)
        self.compute_seconds = list(compute_seconds)
        rates = [bytes_per_second] * len(self.nbytes) if isinstance(bytes_per_second, (int, float)) else list(bytes_per_second)
        self.copy_seconds = [size / rate for size, rate in zip(self.nbytes, rates, strict=True)]
        self.now = 0.0  # of the compute stream
        self.copy_now = 0.0
        self.bytes = self.peak_bytes = 0
        self._freed: deque[float] = deque()

    def alloc(self, nbytes: int) -> tuple[_VirtualBuffer, float]:
        freed = self._freed.popleft() if self._freed else 0.0
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return _VirtualBuffer(nbytes), freed

    def free(self, buffer: _VirtualBuffer, after: float) -> None:
        self.bytes -= buffer.nbytes
        self._freed.append(after)

    def copy(self, buffer: _VirtualBuffer, block: int, after: float) -> tuple[float, float]:
        start = max(self.copy_now, after)
        self.copy_now = start + self.copy_seconds[block]
        return start, self.copy_now

    def compute(self, block: int, times: float = 1.0) -> None:
        """Queue the compute of a block."""
        self.now += self.compute_seconds[block] * times

    def record(self) -> float:
        return self.now

    def wait(self, event: float) -> None:
        self.now = max(self.now, event)

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def happened(self, event: float) -> bool:
        return True


@dataclass
class _VirtualBuffer:
    nbytes: int


class CpuArena:
    """Real memory on the CPU that behaves like a small device: what is given back is poisoned with NaN, and every live byte is counted.

    capacity: bytes; an allocation beyond it raises MemoryError. Copies are made at once.
    """

    kind = "cpu"

    def __init__(self, capacity: int | None = None):
        self.device = torch.device("cpu")
        self.capacity = capacity
        self.bytes = self.peak_bytes = 0
        self.sources: dict[int, Callable[[], list[Segment]]] = {}

    def place(self, nbytes: int, source: Callable[[], list[Segment]]) -> Tensor:
        """A packed copy that stays: the bytes of `source` in a buffer of its own."""
        buffer, _ = self.alloc(nbytes)
        return _gather(buffer, source())

    def reset(self, slot_bytes: int) -> None:
        pass

    def alloc(self, nbytes: int) -> tuple[Tensor, float]:
        if self.capacity is not None and self.bytes + nbytes > self.capacity:
            raise MemoryError(f"the arena has {self.capacity} bytes, {self.bytes} are in use, {nbytes} more were asked for")
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._count(buffer)
        return buffer, time.perf_counter()

    def free(self, buffer: Tensor, after: float) -> None:
        buffer.fill_(0xFF)  # NaN in every float format

    def copy(self, buffer: Tensor, block: int, after: float) -> tuple[float, float]:
        start = time.perf_counter()
        _gather(buffer, self.sources[block]())
        return start, time.perf_counter()

    def record(self) -> float:
        return time.perf_counter()

    def wait(self, event: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def happened(self, event: float) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.sources.clear()

    def available(self) -> int:
        """Bytes that this device can give."""
        return self.capacity if self.capacity is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def bandwidth(self, *, pinned: bool) -> float:
        """Bytes per second of a copy, measured."""
        source, target = torch.zeros(1 << 25, dtype=torch.uint8), torch.zeros(1 << 25, dtype=torch.uint8)
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        return 4 * source.numel() / (time.perf_counter() - start)

    def _count(self, tensor: Tensor) -> None:
        """Count a tensor's bytes until nobody, not even a view or an autograd graph, holds them."""
        nbytes = tensor.untyped_storage().nbytes()
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(tensor.untyped_storage(), self._uncount, nbytes)

    def _uncount(self, nbytes: int) -> None:
        self.bytes -= nbytes


def _gather(buffer: Tensor, segments: list[Segment]) -> Tensor:
    for segment in segments:
        buffer[segment.offset : segment.offset + segment.source.numel()].copy_(segment.source)
    return buffer


class CudaDevice:
    """A CUDA GPU: a copy stream beside the compute stream, events between them, equal slots that are reused.

    Blocks whose bytes lie in pinned memory are copied straight from there; the others go through a ring of
    two pinned staging buffers that a thread of its own fills, so that neither the host nor the compute stream waits for a pageable copy.
    """

    kind = "cuda"

    def __init__(self, device: torch.device):
        self.device = device
        self.slot_bytes = 0
        self.stream = torch.cuda.Stream(device)
        self.bytes = self.peak_bytes = 0
        self.sources: dict[int, Callable[[], list[Segment]]] = {}
        self._free: deque[tuple[Tensor, Any]] = deque()
        self._staging: _Staging | None = None

    def place(self, nbytes: int, source: Callable[[], list[Segment]]) -> Tensor:
        """A packed copy that stays: the bytes of `source` in a buffer of its own."""
        buffer = self._empty(nbytes)
        return _gather(buffer, source())

    def reset(self, slot_bytes: int) -> None:
        """Make slots of another size from now on. Every buffer must have been given back."""
        self.synchronize()
        self._free.clear()
        self.slot_bytes = slot_bytes
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    def alloc(self, nbytes: int) -> tuple[Tensor, Any]:
        if self._free:
            return self._free.popleft()
        buffer = self._empty(self.slot_bytes)
        return buffer, self.record()  # the allocator may hand out memory that queued compute still reads

    def free(self, buffer: Tensor, after: Any) -> None:
        self._free.append((buffer, after))

    def copy(self, buffer: Tensor, block: int, after: Any) -> tuple[Any, Any]:
        segments = self.sources[block]()
        start, done = torch.cuda.Event(enable_timing=True), _Issued()
        if all(segment.source.is_pinned() for segment in segments):
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                self.wait_on(self.stream, after)
                start.record(self.stream)
                for segment in segments:
                    buffer[segment.offset : segment.offset + segment.source.numel()].copy_(segment.source, non_blocking=True)
                done.record(self.stream)
            return start, done
        if self._staging is None:
            self._staging = _Staging(self)
        self._staging.submit(buffer, segments, after, start, done)
        return start, done

    def record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Any) -> None:
        self.wait_on(torch.cuda.current_stream(self.device), event)

    @staticmethod
    def wait_on(stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event.issued() if isinstance(event, _Issued) else event)

    def seconds(self, start: Any, end: Any) -> float:
        start, end = (event.issued() if isinstance(event, _Issued) else event for event in (start, end))
        return float(start.elapsed_time(end)) / 1e3

    def happened(self, event: Any) -> bool:
        return bool(event.query())

    def synchronize(self) -> None:
        if self._staging is not None:
            self._staging.drain()
        torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self.reset(0)
        self.sources.clear()

    def available(self) -> int:
        """Bytes that this device can give: free ones, and those that torch's allocator holds unused."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free) + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def bandwidth(self, *, pinned: bool) -> float:
        """Bytes per second of a copy from pinned or pageable host memory, measured."""
        source = torch.zeros(1 << 26, dtype=torch.uint8, pin_memory=pinned)
        target = torch.empty_like(source, device=self.device)
        target.copy_(source)
        start = self.record()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        end = self.record()
        torch.cuda.synchronize(self.device)
        return 4 * source.numel() / self.seconds(start, end)

    def _empty(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(buffer.untyped_storage(), self._uncount, nbytes)
        return buffer

    def _uncount(self, nbytes: int) -> None:
        self.bytes -= nbytes


class _Issued:
    """A CUDA event that a thread records later. Waiting for it waits until it is recorded, not until it has happened."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._recorded = threading.Event()
        self._error: BaseException | None = None

    def record(self, stream: torch.cuda.Stream) -> None:
        self._event.record(stream)
        self._recorded.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._recorded.set()

    def issued(self) -> torch.cuda.Event:
        self._recorded.wait()
        if self._error is not None:
            raise self._error
        return self._event

    def query(self) -> bool:
        return self._recorded.is_set() and self._event.query()


class _Staging:
    """Two pinned buffers and the thread that fills them from pageable or disk-backed memory."""

    def __init__(self, device: CudaDevice):
        self.device = device
        self.buffers = [torch.empty(device.slot_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.sent: list[torch.cuda.Event | None] = [None, None]
        self.jobs: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name="tessera-staging", daemon=True)
        self.thread.start()

    def submit(self, buffer: Tensor, segments: list[Segment], after: Any, start: torch.cuda.Event, done: _Issued) -> None:
        self.jobs.put((buffer, segments, after, start, done))

    def drain(self) -> None:
        self.jobs.join()

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()

    def _run(self) -> None:
        turn = 0
        while (job := self.jobs.get()) is not None:
            buffer, segments, after, start, done = job
            try:
                sent = self.sent[turn]
                if sent is not None:
                    sent.synchronize()
                staged = _gather(self.buffers[turn], segments)
                nbytes = max(segment.offset + segment.source.numel() for segment in segments)
                stream = self.device.stream
                with torch.cuda.device(self.device.device), torch.cuda.stream(stream):
                    self.device.wait_on(stream, after)
                    start.record(stream)
                    buffer[:nbytes].copy_(staged[:nbytes], non_blocking=True)
                    sent = torch.cuda.Event()
                    sent.record(stream)
                    self.sent[turn] = sent
                    done.record(stream)
            except BaseException as error:  # it must reach the thread that waits for the weights
                done.fail(error)
            turn = 1 - turn
            self.jobs.task_done()
        self.jobs.task_done()


def device_of(device: Any) -> Any:
    """The device that is asked for: a CUDA device, "cpu" for an arena, None for the best there is; a device of this file is that itself."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, (str, torch.device)):
        return device
    device = torch.device(device)
    if device.type == "cpu":
        return CpuArena()
    if device.type != "cuda":
        raise ValueError(f"device is {device}; use a CUDA device, or 'cpu' for the arena")
    return CudaDevice(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
