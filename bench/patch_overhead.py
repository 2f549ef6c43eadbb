"""Time that the patch itself adds to an attention call: deciding, counting, timing, checking; the math is replaced by nothing.

    python bench/patch_overhead.py [--calls 2000] [--out bench/results/patch_overhead.json]

Target: below 50 microseconds a call. Both paths are timed: a call that goes sparse and one that stays with the host.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from tessera.kernels.sparsity import get, prepare, sparse_attention
from tessera.models.families import TokenSpans
from tessera.models.patchers import attention as patcher
from tessera.models.patchers.attention import AttentionPatch, ModelCall
from tessera.models.patchers.settings import AttentionSettings

TARGET = 50e-6
LAYERS = 40
SPANS = TokenSpans(8, 16, 16)  # 2048 tokens: 16 blocks of 128


def microseconds(settings: AttentionSettings, calls: int) -> float:
    """Median over model calls of LAYERS attention calls each, per attention call."""
    tokens = SPANS.image_tokens
    q, k, v = (torch.randn(1, 2, tokens, 8) for _ in range(3))
    recipe = get(settings.method)
    arrangement = prepare(recipe, SPANS.grid(tokens, tokens), q.device, block=128)
    out, mask = sparse_attention(recipe, arrangement, q, k, v, density=0.3)
    patcher.sparse_attention = lambda *arguments, **keywords: (out, mask)
    patch = AttentionPatch(settings)
    patch.start(lambda percent: 1.0 - percent, [1.0, 0.5, 0.0])
    times = []
    for _ in range(calls // LAYERS):
        call = ModelCall(SPANS, 0.5)
        start = time.perf_counter()
        patch.begin(call)
        for _ in range(LAYERS):
            patch.attend(call, q, k, v, lambda: out, lambda x: x)
        patch.finish(call)
        times.append((time.perf_counter() - start) / LAYERS)
    patcher.sparse_attention = sparse_attention
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patch_overhead.json")
    options = parser.parse_args()
    common = dict(density=0.3, precision="native", min_tokens=0)
    result = {
        "date": options.date,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "target_microseconds": TARGET * 1e6,
        "sparse_microseconds": round(microseconds(AttentionSettings(start_percent=0.0, **common), options.calls), 1),
        "host_microseconds": round(microseconds(AttentionSettings(start_percent=0.9, **common), options.calls), 1),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
