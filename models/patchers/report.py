"""What a patched run did: calls, reasons, densities and times, and the one line that a node shows."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

SPARSE = "sparse"
QUANTIZED = "dense quantized"
HOST = "host"


@dataclass(slots=True)
class CallRecord:
    """One self-attention call. kept: the number of kept block pairs, a 0-dim tensor because reading it would wait for the device."""

    step: int
    layer: int
    tokens: int
    outcome: str  # SPARSE, QUANTIZED or HOST
    start: Any
    end: Any
    kept: Tensor | None = None  # None: all
    pairs: int = 1  # all block pairs of all heads
    in_window: bool = False  # long enough, and in a step and block that may be sparse

    @property
    def seconds(self) -> float:
        if isinstance(self.start, float):
            return self.end - self.start
        return self.start.elapsed_time(self.end) / 1e3


def clock(device: torch.device) -> Any:
    """Now, on the device's own time line: seconds on a CPU, a recorded event on CUDA (read only when the run is over)."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class AttentionReport:
    """Everything that one sampling run reports. `as_dict` reads the device once, so call it after the run."""

    method: str
    precision: str
    density: float = 1.0  # asked for
    family: str | None = None
    backends: Counter[str] = field(default_factory=Counter)  # implementation name -> calls
    refusals: dict[str, str] = field(default_factory=dict)  # implementation name -> why it was not used
    reasons: Counter[str] = field(default_factory=Counter)  # why calls stayed with the host -> calls
    notes: Counter[str] = field(default_factory=Counter)  # what else a user should know -> times
    repeated: int = 0
    records: list[CallRecord] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON. Shares and densities are None where there was no call to take them from."""
        records = self.records
        if records and not isinstance(records[-1].start, float):
            records[-1].end.synchronize()
        densities = _densities(records)
        sparse = [record.outcome == SPARSE for record in records]
        work = [float(record.tokens) ** 2 for record in records]
        seconds = [record.seconds for record in records]
        counts = Counter(record.outcome for record in records)
        in_window = sum(record.in_window for record in records)
        return {
            "method": self.method,
            "family": self.family,
            "asked_density": self.density,
            "precision": self.precision,
            "self_attention_calls": len(records),
            "calls": dict(counts),
            "calls_in_window": in_window,
            "sparse_share_in_window": counts[SPARSE] / in_window if in_window else None,
            "density": _mean(densities, work, sparse),
            "overall_density": _mean(densities, work, [True] * len(records)),
            "backends": dict(self.backends),
            "refusals": self.refusals,
            "reasons": dict(self.reasons),
            "notes": dict(self.notes),
            "repeated_model_calls": self.repeated,
            "attention_seconds": sum(seconds),
            "speedup_per_call": _speedup(records, seconds),
            "density_by_step_and_layer": self._heat_map(densities),
        }

    def _heat_map(self, densities: list[float]) -> list[list[float | None]]:
        """Mean density, rows = steps, columns = layers in the order of execution."""
        if not self.records:
            return []
        steps = max(record.step for record in self.records) + 1
        layers = max(record.layer for record in self.records) + 1
        cells: list[list[list[float]]] = [[[] for _ in range(layers)] for _ in range(steps)]
        for record, density in zip(self.records, densities, strict=True):
            cells[record.step][record.layer].append(density)
        return [[sum(cell) / len(cell) if cell else None for cell in row] for row in cells]


def summary(report: dict[str, Any]) -> str:
    """One line for the node, from `AttentionReport.as_dict`."""
    total = report["self_attention_calls"]
    if not total:
        return (
            f"{report['method']}: no self-attention call reached the patch ({_first(report['reasons']) or 'this model does not pass its calls on'})"
        )
    calls = report["calls"]
    used = ", ".join(report["backends"]) or "host attention"
    parts = [f"{report['method']} on {used}", f"{calls.get(SPARSE, 0)} of {total} self-attention calls sparse"]
    if report["density"] is not None:
        parts.append(f"density {report['density']:.2f} (overall {report['overall_density']:.2f})")
    if calls.get(QUANTIZED):
        parts.append(f"{calls[QUANTIZED]} dense quantized")
    if report["speedup_per_call"] is not None:
        parts.append(f"sparse call {report['speedup_per_call']:.2f}x as fast as a dense one")
    for counter in ("notes", "reasons"):
        if report[counter]:
            parts.append(_first(report[counter]))
    return " · ".join(parts)


def heat_map(report: dict[str, Any], cell: int = 14) -> Tensor:
    """Picture of `density_by_step_and_layer`: `(1, height, width, 3)` float32 in 0..1. Rows steps, columns layers, dense bright, grey no call."""
    rows = report["density_by_step_and_layer"] or [[None]]
    cells = [[_colour(density) for density in row] for row in rows]
    left, top, bottom = 44, 34, 8
    width = max(left + cell * len(rows[0]) + 8, 330)
    picture = Image.new("RGB", (width, top + cell * len(rows) + bottom), (24, 24, 28))
    draw = ImageDraw.Draw(picture)
    density = "none" if report["density"] is None else f"{report['density']:.2f} ({report['overall_density']:.2f} overall)"
    draw.text((6, 2), f"{report['method']}   density of sparse calls: {density}", fill=(230, 230, 230))
    draw.text((6, 16), "step     layer 0 ...", fill=(170, 170, 170))
    for y, row in enumerate(cells):
        draw.text((6, top + cell * y), str(y), fill=(170, 170, 170))
        for x, colour in enumerate(row):
            corner = (left + cell * x, top + cell * y)
            draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=colour)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255


def _colour(density: float | None) -> tuple[int, int, int]:
    """Dark blue (nothing kept) over orange to light yellow (dense)."""
    if density is None:
        return 70, 70, 74
    stops = ((20, 28, 84), (190, 74, 62), (252, 236, 170))
    position = min(max(density, 0.0), 1.0) * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    red, green, blue = (round(a + (b - a) * (position - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return red, green, blue


def _first(counter: dict[str, int]) -> str:
    return next((f"{reason} ({times})" for reason, times in counter.items()), "")


def _densities(records: list[CallRecord]) -> list[float]:
    """Kept / all block pairs of every call, read from the device in one transfer."""
    kept = iter(torch.stack(tensors).tolist() if (tensors := [record.kept for record in records if record.kept is not None]) else ())
    return [1.0 if record.kept is None else next(kept) / record.pairs for record in records]


def _mean(values: list[float], weights: list[float], use: list[bool]) -> float | None:
    total = math.fsum(weight for weight, keep in zip(weights, use, strict=True) if keep)
    if not total:
        return None
    return math.fsum(value * weight for value, weight, keep in zip(values, weights, use, strict=True) if keep) / total


def _speedup(records: list[CallRecord], seconds: list[float]) -> float | None:
    """Median time of the host's dense calls / median time of sparse calls, over lengths that had both."""
    times: dict[tuple[int, str], list[float]] = {}
    for record, second in zip(records, seconds, strict=True):
        times.setdefault((record.tokens, record.outcome), []).append(second)
    ratios = [
        _median(host) / _median(times[tokens, SPARSE]) for (tokens, outcome), host in times.items() if outcome == HOST and (tokens, SPARSE) in times
    ]
    return _median(ratios) if ratios else None


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
