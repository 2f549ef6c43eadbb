"""Attention and whole forward of region tokens against the full canvas of every layer, as ratios in one run.

    python bench/regions.py [--layers 50] [--canvas 1024] [--areas 5 10 25] [--heads 24] [--queries 0] [--rounds 3] [--out FILE]

`tessera` must be importable. Both sides run the same code: our attention op, and one double-stream block of Flux's shape (joint attention of
text and picture, feed-forward networks four times as wide). The target for attention is 0.7 x (N_full / N_crop)^2, N with the text; ART (arXiv
2502.18364) reports more than 12 times for 50 layers and more. On a CPU the clock is the process's own, on one thread, so that other programs
do not count. --queries N: time N tokens' rows of attention, for one head, and N tokens' way through the rest of the block, and multiply them by
tokens and heads, as every row costs the same; Flux's 24 heads at 1024 pixels take a CPU a day otherwise.
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
from torch import Tensor, nn

from tessera.kernels.attention import attention
from tessera.models.layers.regions import TOKEN, WHOLE, Regions, snap

TEXT = 512  # tokens
HEAD_DIM = 128


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


class Block(nn.Module):
    """The work of one double-stream block, without its modulation."""

    def __init__(self, heads: int):
        super().__init__()
        width = heads * HEAD_DIM
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)) for _ in range(2)
        )

    def without_attention(self, x: Tensor) -> Tensor:
        """The same work on each token but for attention, which passes its values on."""
        x = x + self.out[1](self.qkv[1](x).chunk(3, -1)[2])
        return x + self.mlp[1](x)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        streams = (text, image)
        joint = torch.cat([linear(x) for linear, x in zip(self.qkv, streams, strict=True)], 1)
        q, k, v = joint.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        y = attention(q, k, v, precision="native").transpose(1, 2).flatten(2).split([text.shape[1], image.shape[1]], 1)
        streams = tuple(x + linear(part) for x, linear, part in zip(streams, self.out, y, strict=True))
        text, image = (x + mlp(x) for x, mlp in zip(streams, self.mlp, strict=True))
        return text, image


def seconds(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Medians of `rounds`, after a round to warm up. The calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = clock()
            call()
            if turn:
                times[name].append(clock() - begin)
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
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--text", type=int, default=TEXT)
    parser.add_argument("--queries", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "regions.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = Block(options.heads).to(device, dtype)
    text = torch.randn(1, options.text, options.heads * HEAD_DIM, device=device, dtype=dtype)

    regions = {f"{percent:g} %": layout(options.canvas, options.layers, percent) for percent in options.areas}
    tokens = {name: layer_boxes.tokens for name, layer_boxes in regions.items()} | {"full": (WHOLE + options.layers) * (options.canvas // TOKEN) ** 2}
    calls: dict[str, Callable[[], object]] = {}
    scale: dict[str, float] = {}
    for name, count in tokens.items():
        total = options.text + count
        rows, heads = (options.queries, 1) if options.queries else (total, options.heads)
        q, k, v = torch.randn(3, 1, heads, total, HEAD_DIM, device=device, dtype=dtype)
        calls[f"attention, {name}"] = lambda q=q[:, :, :rows], k=k, v=v: attention(q, k, v, precision="native")
        scale[f"attention, {name}"] = total / rows * options.heads / heads
        if options.queries:
            x = torch.randn(1, rows, text.shape[2], device=device, dtype=dtype)
            calls[f"block, {name}"] = lambda x=x: block.without_attention(x)
            scale[f"block, {name}"] = total / rows
        else:
            image = torch.randn(1, count, text.shape[2], device=device, dtype=dtype)
            calls[f"block, {name}"] = lambda image=image: block(text, image)
    measured = seconds(calls, options.rounds, gpu_clock if device == "cuda" else time.process_time)
    measured = {name: value * scale.get(name, 1) for name, value in measured.items()}
    if options.queries:
        measured |= {f"block, {name}": measured[f"block, {name}"] + measured[f"attention, {name}"] for name in tokens}

    found = {}
    for name in regions:
        share = (options.text + tokens["full"]) / (options.text + tokens[name])
        gains = {kind: measured[f"{kind}, full"] / measured[f"{kind}, {name}"] for kind in ("attention", "block")}
        found[name] = {"tokens": tokens[name], "token_ratio": round(share, 2), "target": round(0.7 * share**2, 1)}
        found[name] |= {f"{kind}_speedup": round(gain, 1) for kind, gain in gains.items()}
        print(name, found[name])
    about = {name: getattr(options, name) for name in ("layers", "canvas", "heads", "text", "queries", "rounds", "date")}
    about |= {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"about": about, "tokens": tokens, "regions": found, "seconds": {name: round(value, 4) for name, value in measured.items()}}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
