"""Attention on a CUDA GPU: is it right, and how fast is it, against the fastest of torch's own backends.

    python bench/gpu_attention.py [--minutes 8] [--date 2026-01-31] [--out bench/results/gpu_attention_NAME_DATE.json]

`tessera` must be importable; torch and triton are all it needs. Exit status: 0 when everything is right, 1 when something is
wrong or disabled, 2 without a CUDA GPU. First each implementation's self-test, then for each shape every call's output
against float64 on sampled query blocks, then time: CUDA events, the calls taking turns, the median over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera.kernels import gpu, reference, selftest
from tessera.kernels.attention import attention
from tessera.kernels.block_mask import BlockMask, PooledTail, num_blocks
from tessera.kernels.sparsity import Arrangement, Recipe, TokenGrid, get, prepare, sparse_attention, with_tail
from tessera.kernels.triton_backend import IMPLEMENTATIONS, compile_table

CUDA = torch.device("cuda")
HEAD_DIM = 128
SHAPES = {
    "Wan 1.3B, 480p, 81 frames": (TokenGrid(21, 30, 52), 12),
    "Wan 14B, 480p, 81 frames": (TokenGrid(21, 30, 52), 40),
    "Wan 1.3B, 720p, 81 frames": (TokenGrid(21, 45, 80), 12),
    "Wan 14B, 720p, 81 frames": (TokenGrid(21, 45, 80), 40),
}
DENSITIES = (0.5, 0.3, 0.2, 0.1)
PRECISIONS = ("native", "int8")
RECIPE = "rainfusion2"
GRANULES = (128, 32)
TAIL = PooledTail(4)
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
SDPA_TOLERANCE = 0.01
CONFIGS = [
    compile_table.Config(*numbers)
    for numbers in (
        *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
        *((128, 32, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 3)),
    )
]
"""Tile configurations that are tried beside the table's, to correct the table by."""
ROUNDS = 9
MIN_ROUNDS = 3


@dataclass
class Call:
    """One way to compute the attention of a shape. `function` returns the output and, where it chose one, the mask."""

    name: str
    function: Callable[[], tuple[Tensor, BlockMask | None]]
    tolerance: float
    density: float = 1.0
    tail: PooledTail | None = None
    order: Tensor | None = None  # token order that the mask refers to
    work: float = 1.0  # density, and what the tail adds to it
    times: list[float] = field(default_factory=list)  # milliseconds
    error: float = 0.0


def inputs(tokens: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 q, k, v `(1, heads, tokens, HEAD_DIM)`, laid out token by token as models do; keys with a common component."""
    q, k, v = (torch.randn(1, tokens, heads, HEAD_DIM, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    k += 4 * torch.randn(1, 1, heads, HEAD_DIM, device=CUDA, dtype=torch.bfloat16)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def random_mask(heads: int, tokens: int, density: float, blocks: tuple[int, int]) -> BlockMask:
    """The same number of random key blocks for every query block."""
    shape = (1, heads, num_blocks(tokens, blocks[0]), num_blocks(tokens, blocks[1]))
    return BlockMask.from_indices(torch.rand(shape, device=CUDA).topk(max(1, round(density * shape[-1])), -1).indices, *blocks)


def calls_for(grid: TokenGrid, heads: int, q: Tensor, k: Tensor, v: Tensor) -> list[Call]:
    """Dense by torch and by us, sparse with a random mask, and the whole sparse call with the estimate and the permutation."""
    calls = []

    def sdpa(backend: SDPBackend) -> tuple[Tensor, None]:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v), None

    def ours(precision: str, mask: BlockMask | None, tail: PooledTail | None = None) -> tuple[Tensor, BlockMask | None]:
        return attention(q, k, v, block_mask=mask, precision=precision, tail=tail), mask

    tolerances = {implementation.precision: implementation.tolerance for implementation in IMPLEMENTATIONS}
    for name, backend in SDPA.items():
        calls.append(Call(f"torch {name}", lambda backend=backend: sdpa(backend), SDPA_TOLERANCE))
    for precision in PRECISIONS:
        calls.append(Call(f"dense {precision}", lambda precision=precision: ours(precision, None), tolerances[precision]))
    recipes = get(RECIPE), with_tail(get(RECIPE))
    arrangements = [prepare(recipe, grid, CUDA) for recipe in recipes]
    for density in DENSITIES:
        masks = {blocks: random_mask(heads, grid.seq_len, density, blocks) for blocks in ((128, 128), (128, 64), GRANULES)}
        for precision in PRECISIONS:
            tolerance = tolerances[precision]
            for blocks, mask in masks.items():
                name = f"sparse {precision} {blocks[0]}x{blocks[1]}"
                calls.append(Call(name, lambda precision=precision, mask=mask: ours(precision, mask), tolerance, density))
            name = f"sparse {precision} {GRANULES[0]}x{GRANULES[1]} + tail"
            calls.append(Call(name, lambda precision=precision, mask=masks[GRANULES]: ours(precision, mask, TAIL), tolerance, density, TAIL))
            for recipe, arrangement in zip(recipes, arrangements, strict=True):
                # Of all pairs `density` are kept, those that the recipe keeps anyway among them.
                forced = arrangement.forced.pairs.float().mean().item()
                own = max((density - forced) / (1 - forced), 0.0)

                def whole(
                    precision: str = precision, own: float = own, recipe: Recipe = recipe, arrangement: Arrangement = arrangement
                ) -> tuple[Tensor, BlockMask]:
                    return sparse_attention(recipe, arrangement, q, k, v, density=own, precision=precision)

                name = f"whole call {precision} {RECIPE}" + (" + tail" if arrangement.tail else "")
                calls.append(Call(name, whole, tolerance, density, arrangement.tail, arrangement.order))
    return calls


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, tail: PooledTail | None = None) -> float:
    """sum |out - float64| / sum |float64| over the first, the middle and the last query block of the first and the last head."""
    block = 128 if mask is None else mask.block_m
    last = num_blocks(q.shape[2], block) - 1
    difference = magnitude = 0.0
    for head in (0, q.shape[1] - 1):
        one = slice(head, head + 1)
        for index in (0, last // 2, last):
            rows = slice(index * block, (index + 1) * block)
            some = None if mask is None else BlockMask(mask.indices[:, one, index, None], mask.counts[:, one, index, None], block, mask.block_n)
            exact, _ = reference.attention(q[:, one, rows], k[:, one], v[:, one], block_mask=some, tail=tail)
            difference += float((out[:, one, rows] - exact).abs().sum())
            magnitude += float(exact.abs().sum())
    return difference / magnitude


def verify(calls: list[Call], q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Call], dict[str, str]]:
    """Run every call once. Returns those that are right, and for the others what is wrong."""
    right, wrong = [], {}
    for call in calls:
        label = f"{call.name} at density {call.density}"
        try:
            out, mask = call.function()
            if mask is not None:
                call.density = mask.density(k.shape[2]).item()
                call.work = call.density + (0.0 if call.tail is None else call.tail.density(mask, k.shape[2]).item())
            tensors = (out, q, k, v) if call.order is None else tuple(x.index_select(2, call.order) for x in (out, q, k, v))
            call.error = relative_error(*tensors, mask, call.tail)
        except Exception as error:  # a backend that torch lacks here, no implementation, too little memory: the others go on
            wrong[label] = str(error).strip().splitlines()[0][:300]
            continue
        if call.error < call.tolerance:
            right.append(call)
        else:
            wrong[label] = f"relative error {call.error:.4f} is above {call.tolerance}"
    return right, wrong


def milliseconds(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(calls: list[Call], deadline: float) -> None:
    """Fill `times`, the calls taking turns, for ROUNDS rounds or, from MIN_ROUNDS on, until the deadline."""
    for turn in range(ROUNDS):
        if turn >= MIN_ROUNDS and time.monotonic() > deadline:
            return
        for call in calls:
            call.times.append(milliseconds(call.function))


def sweep(q: Tensor, k: Tensor, v: Tensor, deadline: float) -> list[dict]:
    """Other tile configurations than the table's, dense and at density 0.2, fastest first within each variant, while there is time."""
    from tessera.kernels.triton_backend.attention import attention as launch

    rows = []
    masks = {"dense": None, "sparse 128x128": random_mask(q.shape[1], q.shape[2], 0.2, (128, 128))}
    for (name, mask), qk in itertools.product(masks.items(), ("native", "int8")):
        variant = []
        for config in CONFIGS:
            if time.monotonic() > deadline or (qk == "int8" and config.block_n > compile_table.K_BLOCK):
                continue

            def run(config: compile_table.Config = config, mask: BlockMask | None = mask, qk: str = qk) -> Tensor:
                return launch(q, k, v, mask, None, HEAD_DIM**-0.5, False, qk=qk, config=config)[0]

            with contextlib.suppress(Exception):  # too much shared memory for this GPU
                error = relative_error(run(), q, k, v, mask)
                median = statistics.median(milliseconds(run) for _ in range(5))
                tile = [config.block_m, config.block_n, config.num_warps, config.num_stages]
                variant.append({"what": f"{name} {qk}", "tile": tile, "ms": round(median, 3), "error": round(error, 4)})
        rows += sorted(variant, key=lambda row: row["ms"])
    return rows


def report_shape(name: str, grid: TokenGrid, heads: int, deadline: float) -> tuple[dict, bool]:
    """Verify and measure one shape. Returns its rows, and whether all of our calls were right."""
    torch.manual_seed(0)
    q, k, v = inputs(grid.seq_len, heads)
    calls, wrong = verify(calls_for(grid, heads, q, k, v), q, k, v)
    measure(calls, deadline)
    flops = 4 * grid.seq_len**2 * HEAD_DIM * heads
    torch_times = {call.name: statistics.median(call.times) for call in calls if call.name.startswith("torch ")}
    best = min(torch_times, key=torch_times.__getitem__) if torch_times else None
    rows = []
    for call in calls:
        median = statistics.median(call.times)
        row = {
            "what": call.name,
            "density": round(call.density, 4),
            "median_ms": round(median, 3),
            "work": round(call.work, 4),
            "tflops": round(flops * call.work / median / 1e9, 1),
            "times_faster_than_torch": round(torch_times[best] / median, 2) if best else None,
            "relative_error": round(call.error, 5),
        }
        rows.append(row)
        share = f"density {call.density:.2f} work {call.work:.2f}"
        print(f"{name}: {call.name:40s} {share} {median:9.2f} ms {row['tflops']:7.1f} TFLOP/s  {row['times_faster_than_torch']}x")
    for label, reason in wrong.items():
        print(f"{name}: {label}: NOT MEASURED: {reason}")
    ours_right = all(label.startswith("torch ") for label in wrong)
    shape = {"shape": name, "tokens": grid.seq_len, "heads": heads, "fastest_torch": best, "rounds": len(calls[0].times) if calls else 0}
    return {**shape, "rows": rows, "not_measured": wrong}, ours_right


def driver_version() -> str | None:
    with contextlib.suppress(OSError):
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 else None
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no further shape is started when this time is over")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("gpu_attention: no CUDA GPU is visible to torch; nothing was measured. Run it on a machine that has one.", file=sys.stderr)
        return 2

    started = time.monotonic()
    device = torch.cuda.get_device_name()
    arch = gpu.of(CUDA).name
    print(f"{device} ({arch})")
    tests = {implementation.name: selftest.failure(implementation, CUDA) or "passed" for implementation in IMPLEMENTATIONS}
    for name, outcome in tests.items():
        print(f"self-test {name}: {outcome}")
    correct = all(outcome == "passed" for outcome in tests.values())

    shapes = []
    with torch.inference_mode():
        for index, (name, (grid, heads)) in enumerate(SHAPES.items()):
            remaining = options.minutes * 60 - (time.monotonic() - started)
            if remaining <= 0:
                print(f"{name}: NOT MEASURED: the time is over")
                continue
            shape, right = report_shape(name, grid, heads, time.monotonic() + remaining / (len(SHAPES) - index))
            shapes.append(shape)
            correct &= right
            torch.cuda.empty_cache()
        grid, heads = next(iter(SHAPES.values()))
        tiles = sweep(*inputs(grid.seq_len, heads), deadline=started + options.minutes * 60)
        for row in tiles:
            print(f"tile {row['tile']} {row['what']}: {row['ms']} ms")

    import triton

    versions = {"driver": driver_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    result = {"date": options.date, "device": device, "arch": arch, **versions, "dtype": "bfloat16", "head_dim": HEAD_DIM, "self_tests": tests}
    slug = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    out = options.out or Path(__file__).parent / "results" / f"gpu_attention_{slug}_{options.date}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "shapes": shapes, "tiles": tiles}, indent=1) + "\n")
    print(f"{'all outputs are right' if correct else 'SOMETHING IS WRONG, see above'}; {time.monotonic() - started:.0f} s; written to {out}")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
