"""Layer offload on a CUDA GPU: our policies, diffusers' group offload, mmgp and no offload, side by side on random weights.

    python bench/gpu_offload.py [--minutes 3] [--date 2026-01-31] [--out bench/results/gpu_offload_NAME_DATE.json]
    python bench/gpu_offload.py --device cpu        the same code on a tiny model and the CPU arena: does it run? Its times mean nothing

`tessera` must be importable; torch is all it needs, peers are measured where they are installed. Exit status 0 when every output equals
that without offload and every peak stays in its budget, 1 when not, 2 without a CUDA GPU.

For each shape: seconds of a forward pass (median), peak bytes beyond activations, hidden share, and for ours the time that the
simulation predicts from this machine's copy rate and block times. Targets: at 40 % of the weights on the device at most 1.05 times
max(compute, transfer); never 3 % slower than the best peer at equal peak; prediction within 10 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tessera
from tessera.models.offload.planner import GB

SHARES = (0.2, 0.4, 0.6)
ROUNDS = 5


class Block(nn.Module):
    """A DiT block: modulated self-attention, cross-attention where there is text, feed-forward."""

    def __init__(self, width: int, hidden: int, cross: bool, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(4)) if cross else None
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).chunk(3, -1)
        x = x + self.out(self._attention(q, k, v)) * (1 + gate)
        if self.cross is not None:
            to_q, to_k, to_v, to_out = self.cross
            x = x + to_out(self._attention(to_q(x), to_k(text), to_v(text)))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2), approximate="tanh")) * (1 + gate2)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Network(nn.Module):
    def __init__(self, groups: list[tuple[int, int, int, bool]], head_dim: int):
        super().__init__()
        for index, (count, width, hidden, cross) in enumerate(groups):  # children of their own, which is where peers look for blocks
            self.add_module(f"blocks_{index}", nn.ModuleList(Block(width, hidden, cross, head_dim) for _ in range(count)))
        self.head = nn.Linear(groups[-1][1], 64)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for name, blocks in self.named_children():
            if name != "head":
                for block in blocks:
                    x = block(x, text)
        return self.head(x)


# (blocks, width, hidden, cross-attention) of each list; tokens; text tokens. Fewer blocks than the originals, of the same size.
SHAPES = {
    "Wan 14B, 480p, 17 frames (16 of 40 blocks)": ([(16, 5120, 13824, True)], 128, 7800, 512),
    "Wan 14B, 480p, 81 frames (8 of 40 blocks)": ([(8, 5120, 13824, True)], 128, 32760, 512),
    "Flux, 1024 x 1024 (8 large and 16 small blocks)": ([(8, 3072, 24576, False), (16, 3072, 12288, False)], 128, 4608, 0),
    "Flux, 512 x 512 (8 large and 16 small blocks)": ([(8, 3072, 24576, False), (16, 3072, 12288, False)], 128, 1536, 0),
}
TINY = {"tiny": ([(8, 64, 128, True), (8, 64, 192, False)], 32, 40, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=3.0, help="no shape is begun after this")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu_offload.py needs a CUDA GPU; --device cpu only tries the code", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU arena"
    rows: list[dict[str, Any]] = []
    out = options.out or Path(__file__).parent / "results" / f"gpu_offload_{re.sub('[^A-Za-z0-9]+', '_', name)}_{options.date}.json"
    deadline = time.monotonic() + 60 * options.minutes
    for shape, (groups, head_dim, tokens, text) in (SHAPES if device.type == "cuda" else TINY).items():
        if time.monotonic() < deadline:
            rows += measure(shape, Network, groups, head_dim, tokens, text, device)
            out.write_text(json.dumps({"date": options.date, "device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"WRONG: {row['shape']}, {row['method']}: {row['wrong']}")
    return 1 if wrong else 0


def measure(shape: str, network: Any, groups: Any, head_dim: int, tokens: int, text: int, device: torch.device) -> list[dict[str, Any]]:
    """All methods on one shape."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        module = network(groups, head_dim).to(dtype).requires_grad_(False)
        inputs = (torch.randn(1, tokens, groups[0][1], dtype=dtype), torch.randn(1, max(text, 1), groups[0][1], dtype=dtype))
    weights = sum(parameter.nbytes for parameter in module.parameters())
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        expected = module(*inputs)
    base, activations = timed(nullcontext, module, inputs, device, weights)
    rows.append({"shape": shape, "method": "no offload", "seconds": base, "peak_bytes": weights, "activation_bytes": activations})
    print(rows[-1], flush=True)
    module.to("cpu")
    for method, share, budget, context in methods(module, weights, device):
        row: dict[str, Any] = {"shape": shape, "method": method, "share": share, "budget_bytes": budget}
        try:
            with context() as handle, torch.inference_mode():
                equal = all(torch.equal(module(*inputs), expected) for _ in range(3))
                row["seconds"], peak = timed(nullcontext, module, inputs, device, 0)
                row["slower_than_no_offload"] = row["seconds"] / base
                row["peak_bytes"] = peak - activations if device.type == "cuda" else None
                if isinstance(handle, tessera.models.offload.Offload):
                    row |= ours(handle)
                    if row["peak_bytes"] > budget:
                        row["wrong"] = f"peak {row['peak_bytes']} of {budget} bytes"
                if not equal:
                    row["wrong"] = "output differs from that without offload"
        except Exception as error:  # a peer that cannot do this shape is a result too
            row["error"] = f"{type(error).__name__}: {error}"
            if method.startswith("tessera") and "smallest workable budget" not in str(error):
                row["wrong"] = row["error"]
        rows.append(row)
        print(row, flush=True)
    return rows


def ours(handle: Any) -> dict[str, Any]:
    """From the handle's report: what the targets speak of."""
    report = handle.report()
    keep = (
        "policy",
        "resident_blocks",
        "slots",
        "peak_bytes",
        "copied_bytes",
        "misses",
        "bytes_per_second",
        "hidden_seconds",
        "copy_seconds",
        "pinned_bytes",
    )
    predicted = report["predicted"] or {}
    return {name: report[name] for name in keep} | {
        f"predicted_{name}": predicted.get(name) for name in ("step_seconds", "bound_seconds", "hidden_share")
    }


def timed(
    context: Callable[[], AbstractContextManager[Any]], module: nn.Module, inputs: Any, device: torch.device, weights: int
) -> tuple[float, int]:
    """(median seconds of a pass, most bytes allocated beyond `weights`)."""
    times = []
    with context(), torch.inference_mode():
        for round_ in range(ROUNDS + 2):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            module(*inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 2:
                times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) - weights if device.type == "cuda" else 0
    return statistics.median(times), peak


def methods(module: nn.Module, weights: int, device: torch.device) -> Iterator[tuple[str, float | None, int | None, Callable[[], Any]]]:
    """(name, share of the weights, budget in bytes, context that offloads). mmgp comes last: it leaves a module without its weights."""
    for share in SHARES:
        budget = int(share * weights)
        for policy, more in (("resident", {}), ("superpipeline", {"k_prime": 1}), ("superpipeline", {"k_prime": 1, "batch": False})):
            name = f"tessera {policy}" + ("" if more.get("batch", True) else ", sequential")
            yield (
                name,
                share,
                budget,
                lambda policy=policy, more=more, budget=budget: tessera.offload(module, budget / GB, policy=policy, device=device, **more),
            )
    if device.type == "cuda":
        for blocks, stream in ((1, True), (1, False), (4, False)):
            yield (
                f"diffusers group offload, {blocks} a group{', streams' * stream}",
                None,
                None,
                lambda blocks=blocks, stream=stream: _diffusers(module, device, blocks, stream),
            )
        for share in SHARES:
            budget = int(share * weights)
            yield "mmgp", share, budget, lambda budget=budget: _mmgp(module, budget)


@contextmanager
def _diffusers(module: nn.Module, device: torch.device, blocks: int, stream: bool) -> Iterator[None]:
    from diffusers.hooks import HookRegistry, apply_group_offloading

    arguments = dict(offload_type="block_level", num_blocks_per_group=blocks, use_stream=stream, non_blocking=stream)
    apply_group_offloading(module, onload_device=device, offload_device=torch.device("cpu"), **arguments)
    try:
        yield
    finally:
        for part in module.modules():
            HookRegistry.check_if_exists_or_initialize(part).remove_hook("group_offloading", recurse=False)
        module.to("cpu")


@contextmanager
def _mmgp(module: nn.Module, budget: int) -> Iterator[None]:
    from mmgp import offload

    weights = {name: parameter.data for name, parameter in module.named_parameters()}
    handle = offload.all({"transformer": module}, pinnedMemory=True, budgets={"transformer": budget >> 20}, quantizeTransformer=False)
    try:
        yield
    finally:
        handle.release()
        module.to("cpu")
        for name, data in weights.items():
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._parameters[last] = nn.Parameter(data, requires_grad=False)


if __name__ == "__main__":
    sys.exit(main())
