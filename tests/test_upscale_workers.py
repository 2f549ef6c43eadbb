"""Patches computed by other processes: the same bits in the same order, whoever dies on the way, and never more of them at a time than said."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from patch_operators import Deadly, Stillborn, Threads, blur

from tessera.models.upscale.pictures import Network, upscale
from tessera.models.upscale.tiling import Tiling, overlapping, run_within_memory
from tessera.models.upscale.workers import AHEAD, ATTEMPTS, WorkerError, Workers, _Worker, processes, ray_cluster

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def importable(package_path):
    """What a worker process needs to import this package and the operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package_path))
        patch.setenv("PYTHONPATH", f"{package_path}{os.pathsep}{TESTS}")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("operator")


@pytest.fixture(scope="module")
def pool(importable, folder):
    with processes(Deadly(folder), ["cpu"] * 2) as workers:
        yield workers


def same(results, patches) -> bool:
    results = list(results)
    return len(results) == len(patches) and all(torch.equal(out, blur(patch)) for out, patch in zip(results, patches, strict=True))


def pids(folder: Path) -> set[int]:
    return {int(file.name.split()[0]) for file in folder.iterdir() if file.name[0].isdigit()}


# The scheduler, with workers that do exactly what a test says


class Scripted(_Worker):
    """Answers at once, with `script(place, number of its call)`: None for the operator's result, or an exception."""

    def __init__(self, place, script, up=True, log=None):
        self.place, self.script, self.log = place, script, [] if log is None else log
        self.calls = 0
        self.started = Future()
        if up:
            self.started.set_result(None)

    def submit(self, patch):
        error = self.script(self.place, self.calls)
        self.calls += 1
        self.log.append(self.place)
        future = Future()
        if error is None:
            future.set_result(blur(torch.from_numpy(patch)).numpy())
        else:
            future.set_exception(error)
        return future

    def again(self):
        return Scripted(self.place, self.script, log=self.log)

    def stop(self):
        self.log.append(f"{self.place} stopped")


def test_no_more_patches_are_drawn_than_the_workers_hold():
    drawn, out = 0, 0
    patches = [torch.rand(3, 4, 4) for _ in range(40)]

    def source():
        nonlocal drawn
        for patch in patches:
            drawn += 1
            assert drawn - out <= AHEAD * 3
            yield patch

    workers = Workers(Scripted(place, lambda *_: None) for place in range(3))
    for result, patch in zip(workers.map(source()), patches, strict=True):
        assert torch.equal(result, blur(patch))
        out += 1
    assert out == 40


def test_a_patch_that_kills_everybody_ends_the_run():
    workers = Workers(Scripted(place, lambda *_: OSError("gone")) for place in range(4))
    with pytest.raises(WorkerError, match=r"patch 1 failed 3 times, the last time with: gone"):
        list(workers.map([torch.rand(3, 4, 4)]))


def test_a_place_that_only_fails_is_left_out_and_the_others_finish():
    log = []
    workers = Workers(Scripted(place, lambda place, _: OSError("fell off the bus") if place == 1 else None, log=log) for place in range(3))
    patches = [torch.rand(3, 4, 4) for _ in range(30)]
    assert same(workers.map(patches), patches)
    assert len(workers) == 2 and log.count("1 stopped") == ATTEMPTS
    assert workers.notes[-1].endswith(f"left out after {ATTEMPTS} failures") and "fell off the bus" in workers.notes[0]


def test_no_worker_left():
    workers = Workers([Scripted(0, lambda *_: None, up=False)])
    workers._workers[0].started.set_exception(OSError("no driver"))
    workers._workers[0].failures = ATTEMPTS - 1
    with pytest.raises(WorkerError, match=r"no worker is left.*no driver"):
        list(workers.map([torch.rand(3, 4, 4)]))


def test_a_worker_that_does_not_come_up_is_not_waited_for():
    patches = [torch.rand(3, 4, 4) for _ in range(9)]
    workers = Workers([Scripted(0, lambda *_: None, up=False), Scripted(1, lambda *_: None)])
    assert same(workers.map(patches), patches)
    assert workers._workers[0].calls == 0


def test_memory_errors_make_the_tiles_smaller():
    """The worker's error is the one that `run_within_memory` knows; the worker stays."""
    x = torch.rand(3, 200, 200)
    workers = Workers([Scripted(0, lambda _, call: torch.cuda.OutOfMemoryError("full") if call == 1 else None)])

    def tiling(tile):
        return Tiling((overlapping(200, tile, 16, 4), overlapping(200, tile, 16, 4)))

    out = run_within_memory(blur, x, tiling, 128, scale=(2, 2), map_patches=workers.map)
    assert torch.equal(out, tiling(64).run(blur, x, scale=(2, 2)))
    assert len(workers) == 1 and not workers.notes


# Processes


def test_processes_give_what_one_gives(pool, folder):
    """Through `upscale`, two passes, alpha and all."""
    picture = torch.rand(4, 70, 83)
    network = Network(lambda batch: torch.stack([blur(patch) for patch in batch]), 2)
    arguments = {"size": (300, 250), "tile": 64, "overlap": 16}
    alone = upscale(picture, network, **arguments)
    assert torch.equal(upscale(picture, network, **arguments, map_patches=pool.map), alone)
    assert pids(folder) and os.getpid() not in pids(folder)


def test_a_process_that_is_killed_while_it_computes(pool, folder):
    patches = [torch.rand(3, 32, 32) for _ in range(12)]
    (folder / "death 0").touch()
    pool.notes.clear()
    assert same(pool.map(patches), patches)
    assert not list(folder.glob("death *")) and len(pool) == 2
    assert pool.notes and "failed" in pool.notes[0]


def test_a_cuda_error_counts_as_a_broken_worker(importable, pool, folder):
    """Nothing in such a process works again, though it lives."""
    broken = Deadly(folder, "cuda")
    (folder / "death 0").touch()
    with processes(broken, ["cpu"]) as workers:
        patches = [torch.rand(3, 8, 8) for _ in range(3)]
        assert same(workers.map(patches), patches)
        assert "cuda trouble" in workers.notes[0]


def test_a_process_that_is_killed_while_it_waits(pool, folder):
    patches = [torch.rand(3, 32, 32) for _ in range(6)]
    victim = next(iter(pool._workers)).executor
    list(pool.map(patches))
    (process,) = victim._processes.values()
    process.kill()
    process.join()
    assert same(pool.map(patches), patches) and len(pool) == 2


def test_a_run_that_was_given_up_does_not_hurt_the_next(pool):
    patches = [torch.rand(3, 32, 32) for _ in range(9)]
    run = pool.map(patches)
    assert torch.equal(next(run), blur(patches[0]))
    run.close()
    assert same(pool.map(patches[::-1]), patches[::-1])


def test_errors_of_the_operator_arrive_as_they_are(importable):
    with processes(Stillborn(), ["cpu"]) as workers, pytest.raises(ValueError, match="weights are those of a toaster"):
        list(workers.map([torch.rand(3, 8, 8)]))


def test_workers_have_as_many_threads_as_this_process(importable):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with processes(Threads(), ["cpu"]) as workers:
            (out,) = workers.map([torch.rand(3, 2, 2)])
    finally:
        torch.set_num_threads(before)
    assert out.unique().tolist() == [3]


def test_workers_end_with_a_process_that_is_killed(package_path, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(f"""
import pathlib, sys, torch
from patch_operators import Deadly
from tessera.models.upscale.workers import processes
if __name__ == "__main__":
    workers = processes(Deadly(pathlib.Path({str(tmp_path)!r})), ["cpu"])
    list(workers.map([torch.rand(3, 4, 4)]))
    print("up", flush=True)
    sys.stdin.read()
""")
    environment = {**os.environ, "PYTHONPATH": f"{package_path}{os.pathsep}{TESTS}"}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGKILL)
    # The workers hold the other end of this pipe: it ends when the last of them has.
    assert process.communicate(timeout=120)[0] == b""


# Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "ray>=2.9"')


@pytest.fixture(scope="module")
def cluster(importable):
    """Two nodes of one core, each with processes of its own, on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # the default is 15, which starves on a busy machine
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.second = cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


@needs_ray
def test_ray_gives_what_one_process_gives_and_survives_a_death_and_a_lost_node(cluster, tmp_path):
    patches = [torch.rand(3, 32, 32) for _ in range(16)]
    with ray_cluster(Deadly(tmp_path), cluster.address) as workers:
        assert len(workers) == 2
        assert same(workers.map(patches), patches)
        (tmp_path / "death 0").touch()
        assert same(workers.map(patches), patches)
        assert len(workers.notes) == 1 and len(workers) == 2

        def source():
            for number, patch in enumerate(patches):
                if number == 8:
                    cluster.remove_node(cluster.second)
                yield patch

        assert same(workers.map(source()), patches)


@needs_ray
@pytest.mark.parametrize(("error", "kind"), [("memory", MemoryError), ("value", ValueError)])
def test_errors_of_the_operator_arrive_from_ray(cluster, tmp_path, error, kind):
    (tmp_path / "death 0").touch()
    with ray_cluster(Deadly(tmp_path, error), cluster.address, 1) as workers, pytest.raises(kind, match=f"^{error} trouble"):
        list(workers.map([torch.rand(3, 8, 8)]))


@needs_ray
def test_more_workers_than_the_cluster_has(cluster, tmp_path):
    with pytest.raises(ValueError, match=r"workers is 99 and the Ray cluster has \d CPUs"):
        ray_cluster(Deadly(tmp_path), cluster.address, 99)


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"Ray is not installed.*tessera-nodes\[ray\]"):
        ray_cluster(Deadly(tmp_path))
