"""Training in several processes gives what one process gives."""

from __future__ import annotations

import argparse
import socket

import pytest
import torch

from tessera.training.loop import Run, optimisers
from tessera.training.optimizer import Muon, Team, orthogonalise


def matrices(rank: int) -> list[torch.nn.Parameter]:
    """Three of one shape, which two processes cannot halve, and one of another; with gradients that differ between ranks."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(6, 4)] * 3 + [(5, 8)]]
    for parameter in found:
        gradients = torch.randn(2, *parameter.shape, generator=generator)
        parameter.grad = gradients.mean(0) if rank < 0 else gradients[rank]
    return found


def one_of_two(rank: int, port: int, folder: str) -> None:
    team = Team(rank, 2, port)
    found = matrices(rank)
    team.average(found)
    optimiser = Muon(found, 0.1, decay=0.01, team=team)
    for _ in range(2):
        optimiser.step()
    torch.save([parameter.detach() for parameter in found], f"{folder}/{rank}.pt")
    assert team.agree(float(rank)) == 0


def test_two_processes_step_like_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(one_of_two, (port, str(tmp_path)), 2, start_method="fork")
    alone = matrices(-1)
    optimiser = Muon(alone, 0.1, decay=0.01)
    for _ in range(2):
        optimiser.step()
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        for mine, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(mine.detach(), theirs, rtol=0, atol=1e-5)


def test_an_orthogonal_update_has_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 12, 7, generator=torch.Generator().manual_seed(1))).double())
    assert values.min() > 0.6 and values.max() < 1.3


def steps_of_a_run(path: str, count: int, resume: bool = False) -> Run:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    parts = optimisers(model.named_parameters(), lambda name, parameter: parameter.ndim == 2, 0.1, 0.1)
    run = Run(model, parts, path, Team(), argparse.Namespace(minutes=9, resume=resume), average=0.9)
    for _ in run.steps(flat=0.9):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(run.step))
        run.update((model(row).square().sum() for row in x), samples=2)
        count -= 1
        if not count:
            return run
    raise AssertionError("out of time")


def test_a_run_goes_on_from_its_file(tmp_path):
    whole = steps_of_a_run("", 6)
    steps_of_a_run(str(tmp_path / "a.pt"), 3).save()
    resumed = steps_of_a_run(str(tmp_path / "a.pt"), 3, resume=True)
    assert (resumed.step, resumed.seen, [file.name for file in tmp_path.iterdir()]) == (6, 12, ["a.pt"])
    for mine, theirs in ((whole.model, resumed.model), (whole.average, resumed.average)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(whole.model.weight, whole.average.weight)
    assert whole.rate == resumed.rate == pytest.approx(0.1 * 6 / 100)
    assert len(whole.means()) == 1 and not whole.every(4) and whole.every(3)
