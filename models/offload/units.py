"""Blocks with the places of their tensors: what belongs to which, and where its bytes are read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block
from .memory import Packing, Segment, plain_parts, shared_between, tensors_of

# Smaller buffers (counters, statistics, rotary tables) stay on the device: blocks write to them, and they weigh nothing.
SMALL_BUFFER = 1 << 16


@dataclass(eq=False)
class Unit:
    """A block with the places of its tensors."""

    block: Block
    packing: Packing
    host: Callable[[], list[Segment]]
    index: int = -1
    copied: tuple[int, ...] = ()  # versions of the parameters when they were last copied to the device
    swapped: list[tuple[dict[str, Any], str, Tensor, Tensor, int]] | None = None

    def to_copy(self) -> list[Segment]:
        """What the device copies; notes of which versions."""
        self.copied = self.versions()
        return self.host()

    def versions(self) -> tuple[int, ...]:
        """Grow whenever a parameter is written to."""
        return tuple(old._version for _, _, old in self.packing.entries if isinstance(old, nn.Parameter))


def divide(module: nn.Module, blocks: list[Block], file_of: dict[int, Tensor]) -> tuple[list[Unit], list[tuple[nn.Module, str, Tensor]]]:
    """(blocks with the weights that only they use, everything else)."""
    inside = {id(owner): index for index, block in enumerate(blocks) for owner in block.module.modules()}
    groups: list[list[tuple[nn.Module, str, Tensor]]] = [[] for _ in range(len(blocks) + 1)]
    for owner, name, tensor in tensors_of(module):
        small = name in owner._buffers and tensor.nbytes < SMALL_BUFFER
        groups[len(blocks) if small else inside.get(id(owner), len(blocks))].append((owner, name, tensor))
    shared = shared_between([{id(part): part for _, _, tensor in group for part in plain_parts(tensor)}.values() for group in groups])
    tied = [entry for group in groups[:-1] for entry in group if any(id(part) in shared for part in plain_parts(entry[2]))]
    own = [[entry for entry in group if entry not in tied] for group in groups[:-1]]
    units = []
    for block, entries in zip(blocks, own, strict=True):
        packing = Packing(entries)
        units.append(Unit(block, packing, source_of(packing, file_of)))
    return units, groups[-1] + tied


def source_of(packing: Packing, file_of: dict[int, Tensor]) -> Callable[[], list[Segment]]:
    """Where the bytes of a packing are read from: the module's tensors, or the file for those on the meta device."""
    if not any(id(part) in file_of for part in packing.parts):
        return packing.segments

    def segments() -> list[Segment]:
        flat = ((packing.pieces[id(part)].offset, file_of.get(id(part), part)) for part in packing.parts)
        return [Segment(source.contiguous().flatten().view(torch.uint8), offset) for offset, source in flat if source.numel()]

    return segments


def tensors_in(module: nn.Module, files: Any, path: Any) -> dict[int, Tensor]:
    """id of each meta tensor -> its tensor in the file."""
    found: dict[int, Tensor] = {}
    missing = []
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if not tensor.is_meta:
            continue
        if files is None:
            raise ValueError(f"{name} is on the meta device and has no values; give weights='file.safetensors', or load the module first")
        stored = files.get(name)
        if stored is None:
            missing.append(name)
        elif stored.shape != tensor.shape or stored.dtype != tensor.dtype:
            raise ValueError(
                f"weights: {name} is {stored.dtype} {tuple(stored.shape)} in {path} and {tensor.dtype} {tuple(tensor.shape)} in the module; "
                "give the file that belongs to this module"
            )
        else:
            found[id(tensor)] = stored
    if missing:
        raise ValueError(
            f"weights: {path} has no {missing[0]} ({len(missing)} of the module's tensors are missing); give the file that belongs to this module"
        )
    return found
