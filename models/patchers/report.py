"""What a patched run did: calls, reasons, densities and times, and the one line that a node shows."""

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

SPARSE = "sparse"
QUANTIZED = "dense quantized"
HOST = "host"

MOST_NOTES = 3
"""That the line on the node shows; the report has all."""

LINE = 14
LEFT = 44
"""Pixels of the heat map: a line of text, and where its first column begins."""


@dataclass(slots=True)
class CallRecord:
    """One self-attention call. kept: the number of kept block pairs, a 0-dim tensor because reading it would wait for the device."""

    step: int
    layer: int | None  # None: a call of another length than the video's, which is not one of the network's blocks
    shape: tuple[int, int, int, int, int]  # batch, heads, kv heads, tokens, head_dim
    outcome: str  # SPARSE, QUANTIZED or HOST
    start: Any
    end: Any
    kept: Tensor | None = None  # None: all
    pairs: int = 1  # all block pairs of all heads
    in_window: bool = False  # long enough, and in a step and block that may be sparse
    reason: str | None = None  # why it is not sparse
    backend: str | None = None  # name of the implementation; None: the host's attention
    load: Tensor | None = None  # pairs that it computes, its tail's included, of all; 0-dim; None: those that it keeps
    predicted: float | None = None  # error |out - exact| / |exact|
    error: float | None = None  # measured, on a few queries
    search: tuple[Any, Any] | None = None  # begin and end of an exact look for the blocks that later calls keep

    @property
    def work(self) -> float:
        """Of a dense call, in query-key pairs."""
        batch, heads, _, tokens, _ = self.shape
        return float(batch * heads * tokens**2)

    @property
    def seconds(self) -> float:
        return _seconds(self.start, self.end)


@dataclass(slots=True)
class ModelCallRecord:
    """One forward of the network and its self-attention calls."""

    start: Any
    end: Any
    calls: list[CallRecord]

    @property
    def seconds(self) -> float:
        return _seconds(self.start, self.end)


def _seconds(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


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
    error: float | None = None  # asked for
    mask_bytes: Mapping[str, int] = field(default_factory=dict)  # most that masks took, on the "device" and, pinned, on the "host"
    family: str | None = None
    refusals: dict[str, str] = field(default_factory=dict)  # implementation name -> why it was not used
    notes: Counter[str] = field(default_factory=Counter)  # what else a user should know -> times
    repeated: int = 0
    records: list[CallRecord] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)  # what is no self-attention, or of no known shape -> calls
    model_calls: list[ModelCallRecord] = field(default_factory=list)

    @property
    def backends(self) -> Counter[str]:
        """Implementation name -> calls."""
        return Counter(record.backend for record in self.records if record.backend is not None)

    @property
    def reasons(self) -> Counter[str]:
        """Why calls were not sparse -> calls."""
        return Counter(record.reason for record in self.records if record.reason is not None) + self.other

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON. Shares and densities are None where there was no call to take them from."""
        records = self.records
        looks = [record.search[1] for record in records[-1:] if record.search is not None]
        for end in [part.end for part in records[-1:]] + looks + [part.end for part in self.model_calls[-1:]]:
            if not isinstance(end, float):
                end.synchronize()
        densities, loads = _densities(records)
        sparse = [record.outcome == SPARSE for record in records]
        work = [record.work for record in records]
        counts = Counter(record.outcome for record in records)
        in_window = sum(record.in_window for record in records)
        call, model_call = _speedups(self.model_calls)
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
            "work": _mean(loads, work, sparse),
            "overall_work": _mean(loads, work, [True] * len(records)),
            "asked_error": self.error,
            "error": _root_mean_square([(record.error, record.work) for record in records if record.error is not None]),
            "predicted_error": _root_mean_square([(record.predicted, record.work) for record in records if record.predicted is not None]),
            "errors": [[record.step, record.layer, record.predicted, record.error] for record in records if record.error is not None],
            "searches": sum(record.search is not None for record in records),
            "search_seconds": sum(_seconds(*record.search) for record in records if record.search is not None),
            "mask_bytes": dict(self.mask_bytes),
            "backends": dict(self.backends),
            "refusals": self.refusals,
            "reasons": dict(self.reasons),
            "main_reason": self._main_reason(),
            "notes": dict(self.notes),
            "repeated_model_calls": self.repeated,
            "attention_seconds": sum(record.seconds for record in records),
            "speedup_per_call": call,
            "speedup_per_model_call": model_call,
            "density_by_step_and_layer": self._heat_map(densities),
        }

    def _main_reason(self) -> str | None:
        """The reason, with its number of calls, that kept most calls from being sparse: of those that could have been, else of all."""
        missed = [record for record in self.records if record.reason is not None]
        decisive = [record for record in missed if record.in_window] or missed
        counted = Counter(record.reason for record in decisive) if self.records else self.other
        return "".join(f"{reason} ({calls})" for reason, calls in counted.most_common(1)) or None

    def _heat_map(self, densities: list[float]) -> list[list[float | None]]:
        """Mean density, rows = steps, columns = layers in the order of execution."""
        placed = [(record, record.layer, density) for record, density in zip(self.records, densities, strict=True) if record.layer is not None]
        if not placed:
            return []
        steps = max(record.step for record, _, _ in placed) + 1
        layers = max(layer for _, layer, _ in placed) + 1
        cells: list[list[list[float]]] = [[[] for _ in range(layers)] for _ in range(steps)]
        for record, layer, density in placed:
            cells[record.step][layer].append(density)
        return [[sum(cell) / len(cell) if cell else None for cell in row] for row in cells]


def summary(report: dict[str, Any]) -> str:
    """One line for the node, from `AttentionReport.as_dict`."""
    total, reason = report["self_attention_calls"], report["main_reason"]
    if not total:
        return f"{report['method']}: not accelerated, no self-attention call reached the patch: {reason or 'this model does not pass its calls on'}"
    calls = report["calls"]
    parts = [f"{report['method']} on {', '.join(report['backends'])}" if report["backends"] else f"{report['method']}: not accelerated"]
    parts.append(f"{calls.get(SPARSE, 0)} of {total} self-attention calls sparse")
    parts.extend(_cost_and_error(report))
    if calls.get(QUANTIZED):
        parts.append(f"{calls[QUANTIZED]} dense quantized")
    call, model_call = report["speedup_per_call"], report["speedup_per_model_call"]
    if model_call is not None and model_call >= 1:
        parts.append(f"model call {model_call:.2f}x as fast as dense (sparse attention call {call:.2f}x)")
    elif model_call is not None:
        parts.append(f"no gain in time: model call {model_call:.2f}x as fast as dense")
    parts.extend(list(report["notes"])[:MOST_NOTES])
    if reason is not None:
        parts.append(reason)
    return " · ".join(parts)


def _cost_and_error(report: dict[str, Any]) -> Iterator[str]:
    if report["density"] is not None:
        with_tail = f", work {report['work']:.2f} with its tail" if report["work"] > report["density"] else ""
        yield f"density {report['density']:.2f}{with_tail} (overall {report['overall_work']:.2f})"
    if report["error"] is not None:
        goal = f"predicted {report['predicted_error']:.1%}" if report["asked_error"] is None else f"asked {100 * report['asked_error']:g}%"
        yield f"error {report['error']:.1%}, {goal}"
    if report["searches"]:
        sizes = {where: f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB" for where, size in report["mask_bytes"].items()}
        spilled = f" and {sizes['host']} in host memory" if report["mask_bytes"]["host"] else ""
        yield f"{report['searches']} calls looked at in {report['search_seconds']:.2f} s, masks {sizes['device']}{spilled}"


def heat_map(report: dict[str, Any], cell: int = 14) -> Tensor:
    """Picture of `density_by_step_and_layer`: `(1, height, width, 3)` float32 in 0..1. Rows steps, columns layers, dense bright, grey no call.

    Above the map: the method, its density, and why most of the other calls stayed dense; below it the legend.
    """
    rows = report["density_by_step_and_layer"]
    density = "none" if report["density"] is None else f"{report['density']:.2f} ({report['overall_density']:.2f} overall)"
    reason = report["main_reason"]
    lines = [f"{report['method']}   density of sparse calls: {density}"]
    lines += textwrap.wrap(f"not sparse: {reason}" if reason is not None else "every call was sparse" if rows else "no call", 52)
    top = 6 + LINE * (len(lines) + 1)
    bottom = top + cell * len(rows) + 6
    width = max(LEFT + cell * max(map(len, rows), default=0) + 8, 330)
    picture = Image.new("RGB", (width, bottom + LINE + 6), (24, 24, 28))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((6, 2 + LINE * number), line, fill=(230, 230, 230))
    draw.text((6, top - LINE), "step" if not rows else "step     layer 0 ...", fill=(170, 170, 170))
    for y, row in enumerate(rows):
        draw.text((6, top + cell * y), str(y), fill=(170, 170, 170))
        for x, value in enumerate(row):
            corner = (LEFT + cell * x, top + cell * y)
            draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=_colour(value))
    x = 6
    for value, label in ((0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1 dense"), (None, "no call")):
        draw.rectangle((x, bottom, x + 11, bottom + 11), fill=_colour(value))
        draw.text((x + 16, bottom), label, fill=(170, 170, 170))
        x += 22 + round(draw.textlength(label))
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


def _densities(records: list[CallRecord]) -> tuple[list[float], list[float]]:
    """(kept / all block pairs, computed / all pairs) of every call, read from the device in one transfer."""
    tensors = [tensor.float() for record in records for tensor in (record.kept, record.load) if tensor is not None]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    densities, loads = [], []
    for record in records:
        densities.append(1.0 if record.kept is None else next(numbers) / record.pairs)
        loads.append(densities[-1] if record.load is None else next(numbers))
    return densities, loads


def _root_mean_square(weighted: list[tuple[float, float]]) -> float | None:
    mean = _mean([value**2 for value, _ in weighted], [weight for _, weight in weighted], [True] * len(weighted))
    return None if mean is None else math.sqrt(mean)


def _mean(values: list[float], weights: list[float], use: list[bool]) -> float | None:
    total = math.fsum(weight for weight, keep in zip(weights, use, strict=True) if keep)
    if not total:
        return None
    return math.fsum(value * weight for value, weight, keep in zip(values, weights, use, strict=True) if keep) / total


def _speedups(model_calls: list[ModelCallRecord]) -> tuple[float | None, float | None]:
    """How many times as fast as a dense one a sparse attention call and a model call with sparse calls were: medians, of equal shapes only.

    The run's first model call, which loads and compiles, is left out, and those that looked for blocks, too: they are neither kind. None where
    the run had not both kinds.
    """
    calls: dict[Hashable, dict[bool, list[float]]] = {}
    models: dict[Hashable, dict[bool, list[float]]] = {}
    for model_call in model_calls[1:]:
        if any(record.search is not None for record in model_call.calls):
            continue
        outcomes = {record.outcome for record in model_call.calls}
        for record in model_call.calls:
            if record.outcome != QUANTIZED:
                calls.setdefault(record.shape, {}).setdefault(record.outcome == SPARSE, []).append(record.seconds)
        if SPARSE in outcomes or outcomes == {HOST}:
            shapes = tuple(sorted(record.shape for record in model_call.calls))
            models.setdefault(shapes, {}).setdefault(SPARSE in outcomes, []).append(model_call.seconds)
    call, model = ([median(times[False]) / median(times[True]) for times in groups.values() if len(times) == 2] for groups in (calls, models))
    return (median(call) if call else None, median(model) if model else None)
