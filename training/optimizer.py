"""Muon (Keller Jordan, 2024): momentum, then the nearest orthogonal matrix by Newton-Schulz, for hidden weight matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def orthogonalise(g: Tensor) -> Tensor:
    """(n, rows, cols) -> same shape, singular values near one. Large stacks in bfloat16, which is enough here."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if g.numel() > 10**5 else x
    flip = x.shape[1] > x.shape[2]
    x = x.mT if flip else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions, flattened to (out, rest). Equal shapes are updated in one batch.

    team: whose processes have the same gradients; each computes its share of the updates.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, decay: float = 0.0, team: Team | None = None) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))
        self.team = team or Team()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody asks for a loss
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, cols), ps in shapes.items():
                g = torch.stack([p.grad.reshape(rows, cols) for p in ps if p.grad is not None])
                for p in ps:
                    if "m" not in self.state[p]:
                        self.state[p]["m"] = torch.zeros(rows, cols, device=p.device)
                m = torch.stack([self.state[p]["m"] for p in ps]).lerp_(g, 1 - group["momentum"])
                u = self.team.divide(orthogonalise, g.lerp(m, group["momentum"])) * max(1, rows / cols) ** 0.5
                for i, p in enumerate(ps):
                    self.state[p]["m"].copy_(m[i])
                    if group["decay"]:
                        p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(u[i].reshape(p.shape), alpha=-group["lr"])


class Team:
    """Several single-threaded processes that share one training run by averaging gradients.

    On a busy CPU this is faster than one process with several threads, which waits for its slowest thread at every operation.
    """

    def __init__(self, rank: int = 0, size: int = 1, port: int = 29531) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)

    def average(self, params: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over the team."""
        if self.size > 1:
            grads = [p.grad for p in params if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in grads])
            torch.distributed.all_reduce(flat)
            for g, part in zip(grads, (flat / self.size).split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view(g.shape))

    def divide(self, f: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
        """f of a stack of matrices (n, rows, cols), one by one: each process does its share, and all get the whole."""
        if self.size == 1:
            return f(stack)
        share = -(-len(stack) // self.size)
        mine = F.pad(stack, (0, 0, 0, 0, 0, share * self.size - len(stack)))[self.rank * share : (self.rank + 1) * share]
        mine = f(mine).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(parts, mine)
        return torch.cat(parts)[: len(stack)]

    def agree(self, value: float) -> float:
        """The first process's value (a float), in every process."""
        if self.size == 1:
            return value
        t = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(t, 0)
        return float(t)
