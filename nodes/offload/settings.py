"""What *Layer Offload* is asked for, how a limit divides, and what of it is the weights'. Arithmetic; sizes are in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...models.offload import GB, OffloadReport, Split, size

USE_AT_MOST, LEAVE_FREE = "use at most", "leave free"
LIMITS = (USE_AT_MOST, LEAVE_FREE)
AUTO, RESIDENT, SUPERPIPELINE = "auto", "resident", "superpipeline"
POLICIES = (AUTO, RESIDENT, SUPERPIPELINE)


@dataclass(frozen=True)
class MemorySettings:
    """limit: one of LIMITS, in gb. k, k_prime: Superpipeline's window and exchange in blocks; 0 leaves them to the limit."""

    limit: str = USE_AT_MOST
    gb: float = 8.0
    policy: str = AUTO
    k: int = 0
    k_prime: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.gb * GB)

    @property
    def asked(self) -> str:
        return f"{self.limit} {self.gb:g} GB"


def check_settings(settings: MemorySettings) -> None:
    """Raise ValueError with the input, its value and what to use instead; needs no model."""
    if settings.limit not in LIMITS:
        raise ValueError(f"limit is {settings.limit!r}; use one of {', '.join(LIMITS)}")
    if settings.policy not in POLICIES:
        raise ValueError(f"policy is {settings.policy!r}; use one of {', '.join(POLICIES)}")
    if not math.isfinite(settings.gb) or settings.gb <= 0:
        raise ValueError(f"gb is {settings.gb:g}; use a number of gigabytes above 0, such as 8")
    if settings.policy != SUPERPIPELINE:
        return
    if settings.k < 0 or settings.k == 1:
        raise ValueError(f"k is {settings.k}; use at least 2 blocks, or 0 to let the limit decide")
    if settings.k_prime < 0 or settings.k_prime > (settings.k or settings.k_prime):
        raise ValueError(f"k_prime is {settings.k_prime}; use 0 to k, which is {settings.k}")


def split_limit(
    settings: MemorySettings, report: OffloadReport, available: int, reserve: int, measured: int | None, most: float, least: float
) -> Split:
    """The limit and what it has to hold. Raises ValueError with the smallest limit that works.

    available: what the device has for this process. measured: activations, where a run has shown them; most, least: ComfyUI's own estimates
    of them, conditions batched and one by one.
    """
    sizes = tuple(nbytes for _, nbytes in report.blocks)
    limit = max(available - settings.nbytes, 0) if settings.limit == LEAVE_FREE else settings.nbytes
    if measured is not None:
        split = Split(limit, measured, "measured", reserve, report.weights, sizes)
    else:
        split = Split(limit, int(most), "estimated", reserve, report.weights, sizes)
        # ComfyUI computes the conditions in one batch only where 1.5 times their estimate is free beside the weights.
        if most * 1.5 >= available - min(split.room, split.weights):
            split = replace(split, activations=int(least))
    if limit < split.smallest:
        found = f"gb is {settings.gb:g}"
        advice = f"use at least {_up(split.smallest)}"
        if settings.limit == LEAVE_FREE:
            found += f" to leave free, which leaves {size(limit)} for ComfyUI"
            most_free = available - split.smallest
            advice = f"leave at most {_down(most_free)}" if most_free > 0.01 * GB else "close other programs that use the device"
        if measured is None:
            advice += " (a run measures the activations; they may be less)"
        raise ValueError(f"Layer Offload: {found}, and this sampling needs {size(split.smallest)} ({split}); {advice}")
    if limit > available:
        report.notes.append(f"other programs leave {size(available)} of the device")
        split = replace(split, limit=available)
    return split


def budget_of(settings: MemorySettings, split: Split) -> int:
    """Bytes for this model's weights and the buffers that they stream through."""
    if settings.policy != SUPERPIPELINE or not settings.k:
        return split.room
    if not split.blocks:
        raise ValueError("Layer Offload: policy is superpipeline, and this model has no repeated blocks; use auto")
    block = max(split.blocks)
    window = split.outside + min(settings.k, len(split.blocks)) * block
    if window > split.room:
        most = (split.room - split.outside) // block
        raise ValueError(f"Layer Offload: k is {settings.k} blocks of {size(block)}, and the limit has room for {most}; use k {most} or 0")
    return window


def _up(nbytes: float) -> str:
    """GB with two decimals that are enough."""
    return f"{math.ceil(nbytes / GB * 100) / 100:g}"


def _down(nbytes: float) -> str:
    """GB with two decimals that are not too much."""
    return f"{math.floor(nbytes / GB * 100) / 100:g}"
