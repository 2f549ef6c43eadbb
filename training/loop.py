"""What every training run has: options, optimisers, a rate over time, averaged weights, and the file that it goes on from."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from .optimizer import Muon, Team


def parser(description: str | None, *, minutes: float, rate: float, adam: str, port: int, threads: int = 1) -> argparse.ArgumentParser:
    """The options that all have. adam: AdamW's share of the rate, in words."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--work", required=True)
    out.add_argument("--minutes", type=float, default=minutes, help="total, including the time before --resume")
    out.add_argument("--resume", action="store_true")
    out.add_argument("--rate", type=float, default=rate, help=f"Muon step; AdamW uses {adam} of it")
    out.add_argument("--threads", type=int, default=threads)
    out.add_argument("--workers", type=int, default=1, help="training processes that average gradients, one thread each if more than one")
    out.add_argument("--rank", type=int, default=-1, help="start only this worker here")
    out.add_argument("--port", type=int, default=port)
    return out


def launch(train: Callable[[Team, argparse.Namespace], None], options: argparse.Namespace) -> None:
    """train(team, options) in options.workers processes; with options.rank, in this one only (the others are started alike)."""
    if options.workers == 1:
        torch.set_num_threads(options.threads)
        train(Team(), options)
    elif options.rank >= 0:
        _worker(options.rank, train, options)
    else:
        spawn(_worker, (train, options), options.workers)


def _worker(rank: int, train: Callable[[Team, argparse.Namespace], None], options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    train(Team(rank, options.workers, options.port), options)


def optimisers(
    named: Iterable[tuple[str, nn.Parameter]],
    hidden: Callable[[str, nn.Parameter], bool],
    rate: float,
    adam: float,
    *,
    decay: float = 0.0,
    adam_decay: float = 0.0,
    team: Team | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon for the parameters that `hidden` takes for hidden matrices, AdamW with the share `adam` of its rate for the others."""
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        parts[hidden(name, parameter)].append(parameter)
    return [Muon(parts[True], rate, decay=decay, team=team), torch.optim.AdamW(parts[False], rate * adam, (0.9, 0.98), weight_decay=adam_decay)]


def store(what: Any, path: str) -> None:
    """torch.save that never leaves half a file under its name."""
    torch.save(what, path + ".tmp")
    os.replace(path + ".tmp", path)


Model = TypeVar("Model", bound=nn.Module)


class Run(Generic[Model]):
    """A model and its optimisers on their way through options.minutes; with options.resume from what `save` wrote to `path`.

    average: how much averaged weights keep of themselves in a step, at first 1 - ramp / steps; None: the weights as they are.
    """

    def __init__(
        self,
        model: Model,
        optimisers: list[torch.optim.Optimizer],
        path: str,
        team: Team,
        options: argparse.Namespace,
        average: float | None = None,
        ramp: int = 19,
    ) -> None:
        self.model, self.optimisers, self.path, self.team = model, optimisers, path, team
        self.average = model if average is None else copy.deepcopy(model)
        self._keep, self._ramp = average, ramp
        self._trained = [parameter for optimiser in optimisers for group in optimiser.param_groups for parameter in group["params"]]
        self.step = self.seen = 0
        self._used = 0.0
        if options.resume:
            saved = torch.load(path, weights_only=True, map_location="cpu")
            model.load_state_dict(saved["model"])
            self.average.load_state_dict(saved.get("ema", saved["model"]))
            for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.step, self.seen, self._used = saved["step"], saved["seen"], saved["used"]
        self._total = 60 * options.minutes
        self._marks: dict[str, float] = {}
        self._figures: list[tuple[float, ...]] = []

    @property
    def seconds(self) -> float:
        """Of all steps, those of before `resume` too."""
        return time.time() - self._begin

    @property
    def rate(self) -> float:
        """Muon's, as it is now."""
        return float(self.optimisers[0].param_groups[0]["lr"])

    def steps(self, warmup: int = 100, flat: float = 0.0, floor: float = 0.01) -> Iterator[float]:
        """The share of the time that is over, at each step. The rate rises for `warmup` steps, stays until `flat`, falls to `floor` as a cosine."""
        self._begin = time.time() - self._used
        while (done := self.team.agree(self.seconds / self._total)) < 1:
            falling = max(0.0, (done - flat) / (1 - flat))
            factor = min(1, (self.step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling)))
            for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
                group["lr"] = group.setdefault("base", group["lr"]) * factor
            yield done

    def update(self, losses: Iterable[Tensor], figures: tuple[float, ...] = (), samples: int = 0) -> None:
        """A step down the sum of the losses, of which each is made when the one before it is done with.

        figures: what `means` is of; nothing: the sum. samples: that this process has used up.
        """
        self.model.zero_grad()
        total = 0.0
        for loss in losses:
            loss.backward()
            total += loss.item()
        self.team.average(self._trained)
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step, self.seen = self.step + 1, self.seen + samples * self.team.size
        if self.team.rank == 0:
            self._figures.append(figures or (total,))
        if self._keep is not None:
            self._follow(min(self._keep, 1 - self._ramp / (self.step + 1 + self._ramp)))

    @torch.no_grad()
    def _follow(self, keep: float) -> None:
        for mine, theirs in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - keep)
            else:
                mine.copy_(theirs)

    def means(self) -> list[float]:
        """Of the figures of all steps since the last call."""
        found: list[float] = torch.tensor(self._figures).mean(0).tolist()
        self._figures = []
        return found

    def every(self, steps: int) -> bool:
        """Whether the team's first process is to say something after this step."""
        return self.team.rank == 0 and self.step % steps == 0

    def due(self, what: str, seconds: float) -> bool:
        """Whether the team's first process is to do `what` again, which it does once in so many seconds."""
        now = time.time()
        if self.team.rank or now - self._marks.setdefault(what, now) <= seconds:
            return False
        self._marks[what] = now
        return True

    def save(self) -> None:
        state = dict(model=self.model.state_dict(), optimisers=[optimiser.state_dict() for optimiser in self.optimisers])
        state |= {} if self._keep is None else dict(ema=self.average.state_dict())
        store(state | dict(step=self.step, seen=self.seen, used=self.seconds), self.path)
