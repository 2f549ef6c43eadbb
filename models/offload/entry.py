"""`offload`: the call, and what it promises."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .devices import CpuArena
from .handle import Offload

POLICIES = ("auto", "resident", "superpipeline")


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
