"""What a run under a memory limit did: the split of the limit, weights resident and streamed, times, and the one line that a node shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .planner import GB, replay
from .schedule import Scheduler


@dataclass(frozen=True)
class Split:
    """How a limit divides, in bytes. weights: of the whole model. blocks: of each of its repeated blocks."""

    limit: int  # what the process may hold on the device in total
    activations: int
    activations_from: str
    reserve: int
    weights: int
    blocks: tuple[int, ...]

    @property
    def outside(self) -> int:
        """Weights outside the repeated blocks."""
        return max(self.weights - sum(self.blocks), 0)

    @property
    def room(self) -> int:
        """What is left for weights and the buffers that they stream through."""
        return max(self.limit - self.activations - self.reserve, 0)

    @property
    def smallest(self) -> int:
        """The smallest limit that works: one block computes while the next arrives."""
        return self.activations + self.reserve + self.outside + sum(sorted(self.blocks)[-2:])

    def __str__(self) -> str:
        return (
            f"activations {size(self.activations)} {self.activations_from}, reserve {size(self.reserve)}, "
            f"weights outside blocks {size(self.outside)}, two blocks {size(sum(sorted(self.blocks)[-2:]))}"
        )


@dataclass(slots=True)
class BlockSpan:
    """One run of one block. start, end: as `report.clock` gives them. memory: bytes on the device when it began, None where not read."""

    step: int
    block: int
    start: Any
    end: Any = None
    memory: int | None = None


@dataclass(slots=True)
class ModuleSpan:
    """One run of one module whose weights are streamed, the wait for them included. block: None outside the blocks. nbytes: of the weights."""

    step: int
    block: int | None
    nbytes: int
    start: Any
    end: Any


@dataclass(slots=True)
class StepSpan:
    """One evaluation of the model for all conditions."""

    start: Any
    end: Any = None


@dataclass
class OffloadReport:
    """Everything that one sampling run reports. Sizes in bytes. `as_dict` reads the device once, so call it after the run.

    budget: what the policy gives this model's weights and streaming buffers; at most the split's room.
    """

    policy: str
    asked: str  # the limit in the user's words
    backend: str = "none"  # how the host was told: legacy, dynamic, or none
    split: Split | None = None
    other_weights: int = 0  # of other models on the device
    budget: int | None = None
    weights: int = 0
    resident: int = 0
    blocks: list[tuple[str, int]] = field(default_factory=list)  # name, bytes; in order
    peak: int | None = None
    bytes_per_second: float | None = None  # of the link, where it was measured
    resident_step_seconds: float | None = None  # of an earlier run of the same shape with every weight on the device
    streams: int = 0  # on which the host copies, in turn
    copies_unknown: str | None = None  # why the host's copies cannot be predicted
    no_effect: str | None = None  # why the limit changed nothing
    notes: list[str] = field(default_factory=list)
    model_calls: int = 0
    steps: list[StepSpan] = field(default_factory=list)
    spans: list[BlockSpan] = field(default_factory=list)
    modules: list[ModuleSpan] = field(default_factory=list)  # of the first steps, in order

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON. None: not measured, or not known."""
        split = self.split
        steps = [step for step in self.steps if step.end is not None]
        spans = [span for span in self.spans if span.end is not None]
        for end in (span.end for timed in (steps, spans, self.modules) for span in timed[-1:]):
            if not isinstance(end, float):
                end.synchronize()
        step_seconds = [_seconds(step.start, step.end) for step in steps]
        by_block: dict[int, list[float]] = {}
        for span in spans:
            by_block.setdefault(span.block, []).append(_seconds(span.start, span.end))
        calls_per_step = self.model_calls / len(self.steps) if self.steps else None
        streamed = max(self.weights - self.resident, 0)
        copied = None if calls_per_step is None else round(streamed * calls_per_step)
        step = _median(step_seconds)
        timeline = self._timeline(steps, spans)
        missing = self._missing(timeline)
        rate = copied / step if copied and step and self.peak is not None else None  # only a device with its own memory has a link
        return {
            "policy": self.policy,
            "asked": self.asked,
            "backend": self.backend,
            "no_effect": self.no_effect,
            "notes": list(self.notes),
            "limit_bytes": split.limit if split else None,
            "activation_bytes": split.activations if split else None,
            "activations_from": split.activations_from if split else None,
            "reserve_bytes": split.reserve if split else None,
            "smallest_limit_bytes": split.smallest if split else None,
            "other_weights_bytes": self.other_weights,
            "weights_budget_bytes": self.budget,
            "weights_bytes": self.weights,
            "resident_bytes": self.resident,
            "streamed_bytes": streamed,
            "blocks": len(self.blocks),
            "block_bytes": [nbytes for _, nbytes in self.blocks],
            "outside_blocks_bytes": max(self.weights - sum(nbytes for _, nbytes in self.blocks), 0),
            "peak_bytes": self.peak,
            "within_limit": self._within(),
            "steps": len(self.steps),
            "model_calls_per_step": calls_per_step,
            "copied_bytes_per_step": copied,
            "seconds_per_step": step,
            "seconds_per_block": [_median(by_block.get(index, [])) for index in range(len(self.blocks))],
            "resident_seconds_per_step": self.resident_step_seconds,
            "copied_bytes_per_second": rate,
            "link_bytes_per_second": self.bytes_per_second,
            "hidden_share": self._hidden(copied, step),
            "predicted": None if timeline is None or missing is not None else self._predicted(timeline["step"]),
            "predicted_missing": missing,
            "timeline": timeline,
        }

    def _within(self) -> bool | None:
        if self.no_effect is not None or self.split is None:
            return None
        if self.peak is not None:
            return self.peak <= self.split.limit
        return None if self.budget is None else self.resident <= self.budget

    def _hidden(self, copied: int | None, step: float | None) -> float | None:
        """Share of the copy time that did not lengthen the step; needs the link's speed and a run without copies to compare with."""
        if not copied or step is None or self.bytes_per_second is None or self.resident_step_seconds is None:
            return None
        return min(max(1 - (step - self.resident_step_seconds) * self.bytes_per_second / copied, 0.0), 1.0)

    def _missing(self, timeline: dict[str, Any] | None) -> str | None:
        """Why no copies are predicted; None where they are."""
        if self.copies_unknown is not None:
            return self.copies_unknown
        if self.no_effect is not None:
            return f"not predicted: {self.no_effect}"
        if self.resident >= self.weights:
            return "none: every weight stays where it is"
        if timeline is None or not any(span.step == timeline["step"] for span in self.modules):
            return "not predicted: no step has times of its modules"
        return "not predicted: the rate of the link was not measured" if self.bytes_per_second is None else None

    def _predicted(self, step: int) -> dict[str, Any]:
        """The copies of one step: the host's rule, on the measured times of the modules that it streams, at the measured rate of the link."""
        assert self.bytes_per_second is not None
        origin = self.steps[0].start
        begins, ends = ([_seconds(origin, getattr(span, edge)) for span in self.modules] for edge in ("start", "end"))
        copies = replay([span.nbytes for span in self.modules], begins, ends, self.bytes_per_second, self.streams)
        inside = [(span, copy) for span, copy in zip(self.modules, copies, strict=True) if span.step == step]
        begin = _seconds(origin, self.steps[step].start)
        seconds = sum(copy.end - copy.start for _, copy in inside)
        waited = sum(copy.end - copy.waited for _, copy in inside)
        return {
            "hidden_share": 1 - waited / seconds if seconds > 0 else None,
            "copy_seconds": seconds,
            "wait_seconds": waited,
            "copied_bytes": sum(span.nbytes for span, _ in inside),
            "streams": self.streams,
            "bytes_per_second": self.bytes_per_second,
            "early": sum(copy.early for _, copy in inside),
            "copies": [[span.block, copy.start - begin, copy.waited - begin, copy.end - begin] for span, copy in inside],
        }

    def _timeline(self, steps: list[StepSpan], spans: list[BlockSpan]) -> dict[str, Any] | None:
        """One step, seconds from its start: the second where there is one, since the first also warms up."""
        known = [index for index in (1, 0) if index < len(steps) and any(span.step == index for span in spans)]
        if not known:
            return None
        step = steps[known[0]]
        inside = [span for span in spans if span.step == known[0]]
        starts = [_seconds(step.start, span.start) for span in inside]
        return {
            "step": known[0],
            "seconds": _seconds(step.start, step.end),
            "compute": [[span.block, start, _seconds(step.start, span.end)] for span, start in zip(inside, starts, strict=True)],
            "memory": [[start, span.memory] for span, start in zip(inside, starts, strict=True) if span.memory is not None],
        }


def stream_figures(scheduler: Scheduler, names: Sequence[str]) -> dict[str, Any]:
    """What the streams of a device did, from the scheduler's records; names: of the blocks. Seconds, and bytes."""
    device, records = scheduler.device, list(scheduler.records)
    first = records[0].start if records else None
    events = [(r.kind, names[r.block], device.seconds(first, r.start), device.seconds(first, r.end)) for r in records]
    total = {kind: sum(end - start for what, _, start, end in events if what == kind) for kind in ("compute", "copy", "wait")}
    return {
        "copied_bytes": scheduler.copied_bytes,
        "misses": scheduler.misses,
        "compute_seconds": total["compute"],
        "copy_seconds": total["copy"],
        "wait_seconds": total["wait"],
        "events": events,
    }


def summary(report: dict[str, Any]) -> str:
    """One line for the node, from `OffloadReport.as_dict`."""
    if report["no_effect"] is not None:
        return f"{report['asked']} had no effect: {report['no_effect']} · weights {size(report['weights_bytes'])}"
    parts = [f"weights {part_of(report['resident_bytes'], report['weights_bytes'])} resident"]
    if not report["streamed_bytes"]:
        parts.append("nothing streamed")
    elif report["copied_bytes_per_step"] is not None:
        parts.append(f"{size(report['copied_bytes_per_step'])} streamed a step")
    if report["peak_bytes"] is not None:
        parts.append(f"peak {part_of(report['peak_bytes'], report['limit_bytes'])}")
    elif report["weights_budget_bytes"] is not None:
        parts.append(f"{report['asked']} leaves {size(report['weights_budget_bytes'])} for weights")
    line = ", ".join(parts)
    extra = []
    if report["within_limit"] is False:
        extra.append("over the limit")
    if report["seconds_per_step"] is not None:
        extra.append(f"{report['seconds_per_step']:.3g} s a step")
    predicted = _predicted_share(report)
    if report["hidden_share"] is not None:
        extra.append(f"{report['hidden_share']:.0%} of the copies hidden" + ("" if predicted is None else f", predicted {predicted:.0%}"))
    elif predicted is not None:
        extra.append(f"predicted: {predicted:.0%} of the copies hidden")
    return " · ".join([line, *extra, *report["notes"][:1]])


def size(nbytes: float) -> str:
    """Bytes for a reader."""
    amount, unit, digits = _scaled(nbytes, nbytes)
    return f"{amount:.{digits}f} {unit}"


def _predicted_share(report: dict[str, Any]) -> float | None:
    return report["predicted"]["hidden_share"] if report["predicted"] else None


def part_of(part: float, whole: float) -> str:
    """`3.1 of 7.2 GB`: both in the unit of the whole."""
    amount, unit, digits = _scaled(whole, whole)
    return f"{_scaled(part, whole)[0]:.{digits}f} of {amount:.{digits}f} {unit}"


def _scaled(nbytes: float, like: float) -> tuple[float, str, int]:
    """(number, unit, decimals) of a size, in the unit that suits `like`."""
    if abs(like) >= GB:
        return nbytes / GB, "GB", 1
    megabytes = abs(like) / 1024**2
    return nbytes / 1024**2, "MB", 0 if megabytes >= 100 or not megabytes else 1 if megabytes >= 1 else 3


def _seconds(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
