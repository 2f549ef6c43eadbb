"""Where the copies of streamed blocks start from: pinned memory up to a cap on a GPU machine, else wherever the blocks are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .devices import CpuArena
from .edits import HeldMemory
from .memory import Segment
from .units import Division, Unit


class Pinned:
    """The blocks that were moved on the host, until they are taken back."""

    def __init__(self, device: Any):
        self.device = device
        self.nbytes = 0
        self._moved: list[tuple[Unit, Tensor, torch.device]] = []

    def move(self, division: Division, cap: int | None, held: HeldMemory) -> None:
        """cap: most bytes to pin; None: 40 % of the machine's memory."""
        if self.device.kind != "cuda":
            return
        cap = CpuArena().available() * 2 // 5 if cap is None else cap
        for unit in division.units:
            origin = unit.packing.parts[0].device
            pin = self.nbytes + unit.packing.nbytes <= cap and not any(id(part) in division.file_of for part in unit.packing.parts)
            if not pin and not origin.type == "cuda":
                continue
            packed = torch.empty(unit.packing.nbytes, dtype=torch.uint8, pin_memory=pin)
            self.nbytes += unit.packing.nbytes if pin else 0
            for segment in unit.packing.segments():
                packed[segment.offset : segment.offset + segment.source.numel()].copy_(segment.source)
            for part in unit.packing.parts:
                held.note(part)
            unit.packing.attach(packed)
            self._moved.append((unit, packed, origin))
            unit.host = partial(list, [Segment(packed, 0)])

    def rates(self, units: list[Unit]) -> list[float]:
        """Measured bytes per second of each block's copies."""
        pinned = {id(unit) for unit, packed, _ in self._moved if packed.is_pinned()}
        rates = {kind: self.device.bandwidth(pinned=kind) for kind in {id(unit) in pinned for unit in units}}
        return [rates[id(unit) in pinned] for unit in units]

    def take_back(self) -> None:
        for unit, packed, origin in self._moved:
            home = torch.empty_like(packed, device=origin, pin_memory=False)
            unit.packing.attach(home.copy_(packed), instead_of=packed)
        self._moved.clear()
