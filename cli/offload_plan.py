"""python -m tessera offload-plan: what a memory budget costs, from a weight file and a GPU's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..models.offload import (
    EFFICIENCY,
    GB,
    GIGA,
    Card,
    card,
    choose,
    model_files,
    predict,
    read_blocks,
    smallest_budget,
    superpipeline,
    tokens_of,
)

LEAST, MOST = 1e-3, 1e6  # of the numbers on the command line: beyond is a slip of the hand


def lines(model: Path, gb: float, gpu: str | None, shape: str, tflops: float | None, gbps: float | None, passes: int = 2) -> Iterator[str]:
    """The answer, line by line. passes: forwards a sampling step (2 with guidance). Raises ValueError naming the input."""
    for name, value, example in (("gb", gb, 8), ("tflops", tflops, 40), ("gbps", gbps, 25)):
        if value is not None and not LEAST <= value <= MOST:
            raise ValueError(f"{name} is {value:g}; give a number from {LEAST:g} to {MOST:,.0f}, such as {example}")
    if not 1 <= passes <= MOST:
        raise ValueError(f"passes is {passes}; give a whole number from 1 to {MOST:,.0f}, such as 2 with guidance")
    found = card(gpu) if gpu is not None else None
    if found is None and (tflops is None or gbps is None):
        raise ValueError("gpu is missing; give --gpu 'RTX 3060', or --tflops and --gbps")
    blocks, fixed = read_blocks(model)
    tokens = tokens_of(shape)
    sizes = [block.nbytes for block in blocks]
    smallest = fixed + smallest_budget(sizes)
    room = int(gb * GB) - fixed
    if room < smallest_budget(sizes):
        raise ValueError(f"gb is {gb:g}: two blocks and what is outside the blocks need {smallest / GB:.3f} GB of weights; give that or more")
    if found is not None and gb > found.memory:
        raise ValueError(f"gb is {gb:g} and a {gpu} has {found.memory:g}; give less (the smallest workable budget is {smallest / GB:.3f})")
    rate = (tflops or (found or Card(0, 0, 0)).tflops * EFFICIENCY) * 1e12
    link = (gbps or (found or Card(0, 0, 0)).gbps) * GIGA
    seconds = [block.operations(tokens) / rate for block in blocks]
    copy = sum(sizes) / len(sizes) / link
    count = len(model_files(model))
    parts = f" ({count} files)" if count > 1 else ""
    yield f"{model.name}{parts}: {len(blocks)} blocks, {sum(sizes) / GB:.2f} GB, and {fixed / GB:.2f} GB outside them; {tokens} tokens"
    yield (
        f"a block takes {sum(seconds) / len(seconds) * 1e3:.1f} ms to compute and {copy * 1e3:.1f} ms to copy: "
        + ("transfers can hide entirely" if copy <= sum(seconds) / len(seconds) else f"t/c = {copy / (sum(seconds) / len(seconds)):.1f}")
    )
    plan = choose(sizes, room, seconds, link)
    plans = [("resident", plan)]
    if plan.streamed and room // max(sizes) >= 2:
        plans.append(("superpipeline", superpipeline(len(sizes), room // max(sizes), 1)))
    for name, plan in plans:
        answer = predict(plan, sizes, seconds, link)
        what = (
            f"{len(plan.resident)} blocks stay, {plan.slots} slots" if plan.resident or not plan.slots else f"k = {plan.slots}, k' = {plan.exchange}"
        )
        yield (
            f"{name}: {what}; weights {(fixed + answer.peak_bytes) / GB:.2f} GB at most; {answer.copied_bytes / GB:.2f} GB copied a pass, "
            f"{answer.hidden_share:.0%} hidden; {answer.step_seconds * passes:.2f} s a step of {passes} passes "
            f"({answer.step_seconds / answer.compute_seconds:.2f} x all on the GPU)"
        )
    if found is not None:
        yield f"{max(found.memory - gb, 0):.1f} of {found.memory:g} GB are left for activations, other models and the desktop"
    yield (
        "Prediction, not a measurement: the schedule is simulated exactly, compute is taken as "
        + (f"{tflops:g}" if tflops else f"{rate / 1e12:.0f} ({EFFICIENCY:.0%} of the data sheet)")
        + f" TFLOP/s with dense attention and transfers as {link / GIGA:g} GB/s from pinned memory"
    )
