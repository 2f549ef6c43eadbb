"""Region tokens against the full canvas of every layer: attention, and a whole forward. Every token of both sides is computed.

    python bench/regions.py [--layers 50] [--canvas 1024] [--areas 5 10 25] [--heads 1] [--head-dim 128] [--rounds 1] [--out FILE]

`tessera` and diffusers must be importable. Attention is our op. The forward is that of diffusers' Flux class with random weights and one block
of each kind: embeddings, rotary positions, modulation, joint attention, feed-forward networks, output. Both sides run the same code.

The targets for attention are 0.7 x (N_full / N_crop)^2, N with the text, and more than 12 at 10 %, which ART (arXiv 2502.18364) reports for 50
layers and more. On a CPU the clock is the process's own, on one thread, so that other programs do not count, and the time of the full canvas grows
with the fourth power of --canvas. --heads 24 is Flux's width, for a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from tessera.kernels.attention import attention
from tessera.models.layers.regions import TOKEN, Regions, positions, snap

CHANNELS, TEXT_DIM, POOLED_DIM = 64, 4096, 768  # Flux's
ATLEAST = {"10 %": 12}


def layout(canvas: int, layers: int, percent: float) -> Regions:
    """`layers` boxes of `percent` of the canvas on average, areas from a half to one and a half times it, sides 1:2 to 2:1."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    side = canvas // TOKEN
    for index in range(layers):
        area = percent / 100 * side**2 * (0.5 + (index + 0.5) / layers)
        aspect, across, down = torch.rand(3, generator=generator).tolist()
        width = min(max(round((area * 4 ** (aspect - 0.5)) ** 0.5), 1), side)
        height = min(max(round(area / width), 1), side)
        boxes.append(tuple(TOKEN * value for value in (int((side - width) * across), int((side - height) * down), width, height)))
    return snap(boxes, canvas, canvas)


def seconds(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Medians of `rounds`, in which the calls take turns. Each kind is warmed up by its first, small call."""
    for call in list(calls.values())[:2]:
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(clock() - begin)
            print(f"{name}: {times[name][-1]:.3f} s", flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--canvas", type=int, default=1024)
    parser.add_argument("--areas", type=float, nargs="+", default=[5, 10, 25])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--text", type=int, default=512, help="tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "regions.json")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_device("cuda" if gpu else "cpu")
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    shape = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": options.heads, "attention_head_dim": options.head_dim}
    axes = options.head_dim // 8, options.head_dim * 7 // 16, options.head_dim * 7 // 16
    flux = FluxTransformer2DModel(**shape, guidance_embeds=True, axes_dims_rope=axes)

    with torch.device("cpu"):
        sides = {f"{percent:g} %": layout(options.canvas, options.layers, percent) for percent in options.areas}
        sides["full"] = snap([(0, 0, options.canvas, options.canvas)] * options.layers, options.canvas, options.canvas)
        places = {name: positions(regions, 1) for name, regions in sides.items()}
    calls: dict[str, Callable[[], object]] = {}
    for name, ids in places.items():
        q, k, v = torch.randn(3, 1, options.heads, options.text + len(ids), options.head_dim)
        inputs = {
            "hidden_states": torch.randn(1, len(ids), CHANNELS),
            "encoder_hidden_states": torch.randn(1, options.text, TEXT_DIM),
            "pooled_projections": torch.randn(1, POOLED_DIM),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": ids.to(torch.get_default_device()),
            "txt_ids": torch.zeros(options.text, 3),
        }
        calls[f"attention, {name}"] = lambda q=q, k=k, v=v: attention(q, k, v, precision="native")
        calls[f"forward, {name}"] = lambda inputs=inputs: flux(**inputs)
    measured = seconds(calls, options.rounds, gpu_clock if gpu else time.process_time)

    tokens = {name: len(ids) for name, ids in places.items()}
    found = {}
    for name in list(sides)[:-1]:
        share = (options.text + tokens["full"]) / (options.text + tokens[name])
        gains = {kind: measured[f"{kind}, full"] / measured[f"{kind}, {name}"] for kind in ("attention", "forward")}
        target = max(0.7 * share**2, ATLEAST.get(name, 0))
        found[name] = {"tokens": tokens[name], "token_ratio": round(share, 2), "target": round(target, 1), "met": gains["attention"] >= target}
        found[name] |= {f"{kind}_speedup": round(gain, 1) for kind, gain in gains.items()}
        print(name, found[name])
    about = {name: getattr(options, name) for name in ("layers", "canvas", "heads", "head_dim", "text", "rounds", "date")}
    about |= {"device": torch.cuda.get_device_name() if gpu else "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    about["targets"] = "attention: 0.7 x (N_full / N_crop)^2, N with the text; more than 12 at 10 %"
    result = {"about": about, "tokens": tokens, "regions": found, "seconds": {name: round(value, 4) for name, value in measured.items()}}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
