"""The picture of a run under a memory limit: one step over time, the copies, memory against the limit."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .planner import GB
from .report import part_of, size


def picture(report: dict[str, Any], line: str, width: int = 760) -> Tensor:
    """Time line of one step and memory against the limit, under `line`: `(1, height, width, 3)` float32 in 0..1.

    Copies are predicted ones: in the colour of their block where they were hidden, orange where the device waited.
    """
    left, right, top, row, curve = 90, width - 14, 58, 26, 96
    height = top + 2 * (row + 12) + curve + 66
    image = Image.new("RGB", (width, height), (24, 24, 28))
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), f"{report['asked']}   back-end: {report['backend']}   policy: {report['policy']}", fill=_BRIGHT)
    for y, words in zip((20, 36), _wrapped(line, width // 6 - 4), strict=False):
        draw.text((8, y), words, fill=_GREY)
    timeline = report["timeline"]
    seconds = timeline["seconds"] if timeline else 0.0

    def x_of(second: float) -> float:
        return left + (right - left) * min(max(second / seconds, 0.0), 1.0) if seconds else left

    y = top
    draw.text((8, y + 7), "compute", fill=_GREY)
    draw.rectangle((left, y, right, y + row), fill=_PANEL)
    for block, start, end in timeline["compute"] if timeline else ():
        draw.rectangle((x_of(start), y, max(x_of(end) - 1, x_of(start)), y + row), fill=_BLOCKS[block % len(_BLOCKS)])
    if timeline is None:
        draw.text((left + 6, y + 7), "times of blocks: not measured", fill=_GREY)
    y += row + 12
    draw.text((8, y + 1), "copies,", fill=_GREY)
    draw.text((8, y + 13), "predicted", fill=_GREY)
    draw.rectangle((left, y, right, y + row), fill=_PANEL)
    for block, start, waited, end in report["predicted"]["copies"] if report["predicted"] else ():
        if end <= 0:
            continue  # the next step's first copies are made during the last
        colour = _STREAMED if block is None else _BLOCKS[block % len(_BLOCKS)]
        draw.rectangle((x_of(start), y, max(x_of(end) - 1, x_of(start)), y + row), fill=colour)
        if waited < end:
            draw.rectangle((x_of(waited), y, max(x_of(end) - 1, x_of(waited)), y + row), fill=_WAITED)
    if report["predicted_missing"] is not None:
        draw.text((left + 6, y + 7), report["predicted_missing"], fill=_GREY)
    y += row + 12
    _draw_memory(draw, report, timeline, x_of, (left, y, right, y + curve))
    y += curve + 6
    if timeline:
        draw.text((left, y), "0", fill=_GREY)
        end_label = f"{seconds:.3g} s, step {timeline['step']}"
        draw.text((right - 6 * len(end_label), y), end_label, fill=_GREY)
    draw.text((8, y + 18), _rates_text(report), fill=_BRIGHT)
    draw.text((8, y + 34), _split_text(report), fill=_GREY)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).float() / 255


_BRIGHT, _GREY, _PANEL, _LIMIT = (230, 230, 230), (170, 170, 170), (44, 44, 50), (216, 72, 64)
_BLOCKS = ((86, 132, 214), (120, 170, 236))
_RESIDENT, _STREAMED, _WAITED = (96, 168, 110), (92, 92, 100), (224, 144, 56)


def _draw_memory(draw: ImageDraw.ImageDraw, report: dict[str, Any], timeline: dict[str, Any] | None, x_of: Any, box: tuple[int, ...]) -> None:
    """The curve of device memory where it was measured, else the resident share of the weights; the limit as a red line."""
    left, top, right, bottom = box
    draw.text((8, top + 7), "memory", fill=_GREY)
    draw.rectangle(box, fill=_PANEL)
    limit = report["limit_bytes"]
    curve = timeline["memory"] if timeline else []
    if not curve or not limit:
        weights = max(report["weights_bytes"], 1)
        middle = left + (right - left) * min(report["resident_bytes"] / weights, 1.0)
        draw.rectangle((left, top + 34, right, top + 60), fill=_STREAMED)
        draw.rectangle((left, top + 34, middle, top + 60), fill=_RESIDENT)
        draw.text((left + 6, top + 12), f"weights resident: {part_of(report['resident_bytes'], report['weights_bytes'])}", fill=_BRIGHT)
        draw.text((left + 6, top + 70), "memory over time: read on CUDA devices only", fill=_GREY)
        return
    highest = max(limit, *(memory for _, memory in curve), report["peak_bytes"] or 0) * 1.08

    def y_of(nbytes: float) -> float:
        return float(bottom - (bottom - top) * nbytes / highest)

    points = [(x_of(second), y_of(memory)) for second, memory in curve]
    draw.line([*points, (right, points[-1][1])], fill=_RESIDENT, width=2)
    draw.line((left, y_of(limit), right, y_of(limit)), fill=_LIMIT, width=2)
    draw.text((left + 6, y_of(limit) + 3), f"limit {size(limit)}", fill=_LIMIT)


def _rates_text(report: dict[str, Any]) -> str:
    hidden = "hidden share: not measured" if report["hidden_share"] is None else f"hidden share: {report['hidden_share']:.0%} measured"
    predicted = report["predicted"]
    if predicted is not None and predicted["hidden_share"] is not None:
        hidden += f", {predicted['hidden_share']:.0%} predicted at {predicted['bytes_per_second'] / GB:.1f} GB/s (orange: waited)"
        if predicted["early"]:
            hidden += f", {predicted['early']} of {len(predicted['copies'])} copies were faster"
    rate = report["copied_bytes_per_second"]
    reached = "GB/s: not measured" if rate is None else f"{rate / GB:.1f} GB/s over the whole step"
    return f"{hidden}   {reached}"


def _split_text(report: dict[str, Any]) -> str:
    if report["limit_bytes"] is None:
        return f"weights {size(report['weights_bytes'])}"
    parts = [f"limit {size(report['limit_bytes'])}: activations {size(report['activation_bytes'])} {report['activations_from']}"]
    parts.append(f"reserve {size(report['reserve_bytes'])}")
    if report["other_weights_bytes"]:
        parts.append(f"other models {size(report['other_weights_bytes'])}")
    return ", ".join([*parts, f"weights {size(report['weights_budget_bytes'] or 0)}"])


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 1 > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
