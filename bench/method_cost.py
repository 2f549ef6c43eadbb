"""What the method `tessera` costs on a CPU, in plain torch, against torch's own dense attention: the look, the tail, a whole sparse call.

    python bench/method_cost.py [--rounds 5] [--threads 1] [--out bench/results/method_cost.json]

`tessera` must be importable. Calls take turns, and time is the process's own CPU time, so that what else the machine does is in no ratio. Nothing
is reported before the output agrees with the float64 formula.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.kernels import reference
from tessera.kernels.attention import attention
from tessera.kernels.block_mask import BlockMask
from tessera.kernels.sparsity import TokenGrid, choose, get, prepare, sampled_error, sparse_attention
from tessera.models.patchers.search import guard_rows

HEADS, HEAD_DIM, BLOCK, DENSITY = 8, 64, 128, 0.2
GRID = TokenGrid(frames=32, height=16, width=16)
SPARSE_STEPS = 14
"""That one look serves."""
TARGETS = {"choosing_and_tail": 0.25, "whole_call_times_faster": 2.2}
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "method_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, GRID.seq_len, HEAD_DIM)
    recipe = get("tessera")
    arrangement = prepare(recipe, GRID, q.device, block=BLOCK)
    with torch.inference_mode():
        mask, _ = choose(recipe, arrangement, q, k, v, density=DENSITY)
        out, _ = sparse_attention(recipe, arrangement, q, k, v, density=DENSITY, mask=mask, precision="native")
        error = largest_error(out, arrangement, q, k, v, mask)
        if not error < TOLERANCE:
            sys.exit(f"error {error:.2e} is above {TOLERANCE}; nothing is reported")
        rows = guard_rows(GRID.seq_len, 1, q.device)
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v),
            "look": lambda: choose(recipe, arrangement, q, k, v, density=DENSITY),
            "sparse call": lambda: sparse_attention(recipe, arrangement, q, k, v, density=DENSITY, mask=mask, precision="native"),
            "kept pairs alone": lambda: attention(q, k, v, block_mask=mask, precision="native"),
            "kept pairs and tail": lambda: attention(q, k, v, block_mask=mask, tail=arrangement.tail, precision="native"),
            "guard": lambda: sampled_error(out, q, k, v, rows, None, None),
        }
        shares = measured(calls, options.rounds)
    tail = shares["kept pairs and tail"] - shares["kept pairs alone"]
    result = {
        "choosing_and_tail": shares["look"] / SPARSE_STEPS + tail,
        "whole_call_times_faster": 1 / shares["sparse call"],
        "shares_of_dense": shares,
        "tail": tail,
        "guard_of_sparse_call": shares["guard"] / shares["sparse call"],
        "work": arrangement.work(mask).item(),
        "largest_error": error,
    }
    met = {name: result[name] <= goal if name == "choosing_and_tail" else result[name] >= goal for name, goal in TARGETS.items()}
    about = dict(
        date=options.date, torch=torch.__version__, threads=options.threads, tokens=GRID.seq_len, heads=HEADS, head_dim=HEAD_DIM, block=BLOCK
    )
    report = {**about, "density": DENSITY, "sparse_steps": SPARSE_STEPS, **result, "targets": TARGETS, "met": met}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each call over those of the dense one beside it: medians over rounds, after one that is thrown away."""
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        seconds = {}
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name] = time.process_time() - start
        if turn:
            for name in calls:
                ratios[name].append(seconds[name] / seconds["dense"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def largest_error(out: Tensor, arrangement: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> float:
    """Largest absolute error against the float64 formula, on every eighth query block."""
    out, q, k, v = (x[:, :, arrangement.order] for x in (out, q, k, v))
    blocks = torch.arange(0, q.shape[2] // BLOCK, 8)
    tokens = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    some = BlockMask(mask.indices[:, :, blocks], mask.counts[:, :, blocks], BLOCK, arrangement.granule)
    worst = 0.0
    for head in range(HEADS):
        one = slice(head, head + 1)
        own = BlockMask(some.indices[:, one], some.counts[:, one], BLOCK, arrangement.granule)
        exact, _ = reference.attention(q[:, one, tokens], k[:, one], v[:, one], block_mask=own, tail=arrangement.tail)
        worst = max(worst, (out[:, one, tokens] - exact).abs().max().item())
    return worst


if __name__ == "__main__":
    main()
