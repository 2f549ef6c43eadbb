"""Patches computed by other processes: one for each GPU of this machine, or on the machines of a Ray cluster.

The patches of a network do not depend on each other, so they may be computed anywhere and again. What comes back is what one process
computes, bit by bit, as long as the devices are of one kind and use as many threads: a patch is never cut otherwise, and the blending
stays in the process that asks.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import __version__
from .tiling import Operator

Load = Callable[[torch.device], Operator]

AHEAD = 2  # patches that a worker has: one in work, and the next, so that it does not wait for the blending
ATTEMPTS = 3  # for a patch, and starts of a worker that does nothing but fail
# What computing a patch may raise in a worker that is well: it would be raised again anywhere.
_OF_THE_OPERATOR = (torch.cuda.OutOfMemoryError, MemoryError, ValueError, TypeError, ImportError)


class WorkerError(RuntimeError):
    """Workers that ended or broke more often than is put up with."""


@dataclass(eq=False)
class _Job:
    number: int
    patch: np.ndarray
    attempts: int = 0
    result: Tensor | None = None


class _Worker:
    """One place that computes patches. It is not used before `started` is done, and never again after a failure."""

    started: Future[Any]
    failures = 0  # since it last computed something, of those before it in its place too

    def submit(self, patch: np.ndarray) -> Future[Any]:
        """Compute a patch; the result is an array."""
        raise NotImplementedError

    def again(self) -> _Worker:
        """A new one in its place."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it; it may finish the patch that it has in work."""
        raise NotImplementedError


class Workers:
    """Worker processes that hold an operator. Use it in a `with` statement, or call `close`.

    A worker that ends or breaks is replaced, and what it was computing is computed by another. Errors of the operator itself are raised.
    """

    def __init__(self, workers: Iterable[_Worker]) -> None:
        self._workers = list(workers)
        self.notes: list[str] = []  # what failed and was done again, for the user

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        while self._workers:
            self._workers.pop().stop()

    def map(self, patches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The operator's results for float32 patches, in their order, on the CPU.

        At most `AHEAD` patches a worker are drawn from `patches` beyond those that came out, so memory does not depend on their number. One
        iterator at a time. Raises WorkerError when a patch fails three times or no worker is left, and what the operator raises.
        """
        source = enumerate(patches)
        jobs: deque[_Job] = deque()  # drawn and not yet given out, in order
        queue: deque[_Job] = deque()  # those of them that no worker has
        running: dict[Future[Any], tuple[_Job, _Worker]] = {}
        try:
            while True:
                while len(jobs) < AHEAD * len(self._workers) and (item := next(source, None)) is not None:
                    jobs.append(_Job(item[0], np.ascontiguousarray(item[1].cpu().numpy())))
                    queue.append(jobs[-1])
                if not jobs:
                    return
                self._hand_out(queue, running)
                starting = [worker.started for worker in self._workers if not worker.started.done()]
                done, _ = wait([*running, *starting], return_when=FIRST_COMPLETED)
                for future in done & running.keys():
                    job, worker = running.pop(future)
                    error = future.exception()
                    if error is None:
                        job.result = torch.tensor(future.result())  # a copy: Ray's arrays lie in its store
                        worker.failures = 0
                    else:
                        self._failed(worker, error)
                        job.attempts += 1
                        if job.attempts == ATTEMPTS:
                            raise WorkerError(f"patch {job.number + 1} failed {ATTEMPTS} times, the last time with: {_text(error)}") from error
                        queue.appendleft(job)
                while jobs and (result := jobs[0].result) is not None:
                    jobs.popleft()
                    yield result
        finally:
            for future in running:
                future.cancel()

    def _hand_out(self, queue: deque[_Job], running: dict[Future[Any], tuple[_Job, _Worker]]) -> None:
        """Give the queue to workers that are up and have less than they may; replace those that did not come up."""
        for worker in list(self._workers):
            if worker.started.done() and (error := worker.started.exception()) is not None:
                self._failed(worker, error)
        up = {worker: 0 for worker in self._workers if worker.started.done()}
        for _, worker in running.values():
            if worker in up:
                up[worker] += 1
        while queue and up and min(up.values()) < AHEAD:
            worker = min(up, key=lambda worker: up[worker])
            job = queue.popleft()
            running[worker.submit(job.patch)] = job, worker
            up[worker] += 1

    def _failed(self, worker: _Worker, error: BaseException) -> None:
        """Put a new worker into the place of one that ended or broke, unless the place does nothing but fail. Raises errors of the operator."""
        if isinstance(error, _OF_THE_OPERATOR):
            raise getattr(error, "cause", error)  # Ray wraps it
        if worker not in self._workers:
            return  # its other patch said so already
        self._workers.remove(worker)
        worker.stop()
        worker.failures += 1
        note = f"a worker failed ({_text(error)}); its patches were computed again"
        if worker.failures < ATTEMPTS:
            self._workers.append(worker.again())
            self._workers[-1].failures = worker.failures
        else:
            note += f", and it was left out after {ATTEMPTS} failures"
        self.notes.append(note)
        if not self._workers:
            raise WorkerError(f"no worker is left, the last one failed with: {_text(error)}") from error


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# Processes of this machine


class _Process(_Worker):
    def __init__(self, load: Load, device: str, threads: int) -> None:
        self.arguments = load, device, threads
        # An executor of its own: where one has several processes, the end of one breaks it for all.
        self.executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _enter, self.arguments)
        self.started = self.executor.submit(_start)

    def submit(self, patch: np.ndarray) -> Future[Any]:
        try:
            return self.executor.submit(_compute, patch)
        except BrokenExecutor as error:  # it ended while it had nothing to do
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def again(self) -> _Worker:
        return _Process(*self.arguments)

    def stop(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)


class _Here:
    """What a worker process holds: its operator."""

    operator: Operator
    device: torch.device

    def start(self, load: Load, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.operator = load(self.device)

    def compute(self, patch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.operator(torch.tensor(patch, device=self.device)).float().cpu().numpy()


_here = _Here()
_arguments: Any = None


def _enter(*arguments: Any) -> None:
    """First thing in a worker process. The operator is loaded by `_start`, whose errors arrive as they are."""
    global _arguments
    _arguments = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    Thread(target=end_with_it, daemon=True).start()


def _start() -> None:
    _here.start(*_arguments)


def _compute(patch: np.ndarray) -> np.ndarray:
    return _here.compute(patch)


def processes(load: Load, devices: Iterable[str]) -> Workers:
    """A process on each of `devices`, such as ["cuda:0", "cuda:1"] or ["cpu"] * 4; a device may be there several times.

    load: makes the operator on a device, once in each process; of a module that can be imported there, and what it holds is pickled. The
    operator maps patches as in `Tiling.run`. Each process uses as many CPU threads as this one, because sums depend on their number.
    """
    return Workers([_Process(load, device, torch.get_num_threads()) for device in devices])


# Ray


class _Actor:
    """What runs on the cluster."""

    def start(self, load: Load, threads: int, version: str) -> None:
        if version != __version__:
            raise ImportError(f"a machine of the Ray cluster has Tessera {__version__}, this one {version}; install the same everywhere")
        self._here = _Here()
        self._here.start(load, "cuda" if torch.cuda.is_available() else "cpu", threads)

    def compute(self, patch: np.ndarray) -> np.ndarray:
        return self._here.compute(patch)


class _RayWorker(_Worker):
    def __init__(self, load: Any, resources: dict[str, int], threads: int) -> None:
        import ray

        self.arguments = load, resources, threads
        actor: Any = ray.remote(_Actor)
        self.actor = actor.options(**resources).remote()
        self.started = self.actor.start.remote(load, threads, __version__).future()

    def submit(self, patch: np.ndarray) -> Future[Any]:
        future: Future[Any] = self.actor.compute.remote(patch).future()
        return future

    def again(self) -> _Worker:
        return _RayWorker(*self.arguments)

    def stop(self) -> None:
        import ray

        ray.kill(self.actor)


class _RayWorkers(Workers):
    """Also disconnects, where it was this that connected."""

    def __init__(self, workers: Iterable[_Worker], connected: bool) -> None:
        super().__init__(workers)
        self._connected = connected

    def close(self) -> None:
        import ray

        super().close()
        if self._connected:
            ray.shutdown()


def ray_cluster(load: Load, address: str | None = None, count: int | None = None) -> Workers:
    """Workers on the machines of a Ray cluster: a GPU for each where the cluster has any, a CPU core for each where not.

    address: of the cluster ("host:6379", "ray://host:10001"); None: the one that RAY_ADDRESS names or that runs here, and a new one on this
    machine where there is none. count: workers, default as many as there are GPUs or cores. The cluster's machines need the same Tessera.
    load: as in `processes`. Raises ValueError without ray and for a count that the cluster cannot hold, ConnectionError without a cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'Ray is not installed ({error}); pip install "tessera-nodes[ray]", or leave out --ray') from error
    connected = not ray.is_initialized()
    if connected:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False, logging_level=logging.ERROR)
    resources = ray.cluster_resources()
    kind, have = ("GPU", int(resources.get("GPU", 0))) if resources.get("GPU") else ("CPU", int(resources.get("CPU", 0)))
    if not 0 < (have if count is None else count) <= have:
        if connected:
            ray.shutdown()
        raise ValueError(f"workers is {count} and the Ray cluster has {have} {kind}s; use 1 to {have}, or add machines to it")
    each = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
    shared = ray.put(load)  # one copy on each machine
    return _RayWorkers([_RayWorker(shared, each, torch.get_num_threads()) for _ in range(count or have)], connected)
