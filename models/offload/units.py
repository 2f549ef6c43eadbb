"""Blocks with the places of their tensors: what belongs to which, and where its bytes are read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, find_blocks
from .edits import Structure, places, references, storage_users, storages_of
from .lent import Lent
from .memory import Packing, Segment, plain_parts, shared_between, table_of, tensors_of

# Smaller buffers (counters, statistics, rotary tables) stay on the device: blocks write to them, and they weigh nothing.
SMALL_BUFFER = 1 << 16


@dataclass(eq=False)
class Unit:
    """A block with the places of its tensors."""

    block: Block
    packing: Packing
    host: Callable[[], list[Segment]]
    file_versions: dict[int, int]  # id of each tensor on the meta device -> its version
    index: int = -1
    places: list[tuple[Any, ...]] = field(default_factory=list)  # of its plain tensors
    values: list[Tensor | None] = field(default_factory=list)  # what the module's tables have in its places
    copied: tuple[int, ...] = ()  # versions of the tensors when they were last copied to the device
    touched: bool = False  # somebody has reached into its tables since
    held: bool = False  # somebody else held a tensor of it at that time
    retired: str = ""  # why a backward cannot come back to it
    lent: Lent | None = None

    def to_copy(self) -> list[Segment]:
        """What the device copies; notes of which versions."""
        self.copied = self.versions()
        self.touched = False
        return self.host()

    def versions(self) -> tuple[int, ...]:
        """Grow whenever a tensor is written to, but not through `.data`."""
        return tuple(part._version for part in self.packing.parts)

    def stale(self) -> bool:
        """Whether the module may have other weights by now than those that were copied."""
        return self.touched or self.copied != self.versions()

    def note_places(self) -> None:
        self.places, self.values = places(self.packing.parts), self._values()

    def in_place(self) -> bool:
        """Whether its tensors, of the module still or not, lie where they were."""
        return self.places == places(self.packing.parts)

    def intact(self) -> bool:
        """Whether the module has the tensors of this block where they were."""
        return self.in_place() and all(now is then for now, then in zip(self._values(), self.values, strict=True))

    def _values(self) -> list[Tensor | None]:
        return [dict.get(table_of(owner, name), name) for owner, name, _ in self.packing.entries]

    def written_in_a_file(self) -> tuple[nn.Module, str] | None:
        """A tensor on the meta device that was written to, which has no effect."""
        return next(
            ((owner, name) for owner, name, tensor in self.packing.entries if tensor.is_meta and tensor._version != self.file_versions[id(tensor)]),
            None,
        )

    def held_elsewhere(self, storages: Counter[int]) -> bool:
        """Whether anybody but its module and ourselves holds a tensor of this block, or its memory, and so may write to it unseen."""
        # No loop variable here outside of a comprehension: it would hold a tensor.
        tables = [id(tensor) for owner, name, tensor in self.packing.entries if name in owner._parameters]  # those that `Structure` has, too
        known = Counter([id(tensor) for _, _, tensor in self.packing.entries] * 3 + tables + [id(part) for part in self.packing.parts] * 2)
        tensors = list({id(tensor): tensor for _, _, tensor in self.packing.entries}.values())
        return any(found > known[key] for key, found in references(tensors)) or any(
            users > storages[storage] for storage, users in storage_users(self.packing.parts)
        )


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
        units.append(Unit(block, packing, source_of(packing, file_of), {id(part): part._version for part in packing.parts if part.is_meta}))
    return units, groups[-1] + tied


class Division:
    """A module as it is now: its blocks and the rest, and, once noted, where everything is as long as nobody edits it.

    file_of: as of `tensors_in`. order: names of blocks in the order in which they run, as far as it is known.
    """

    def __init__(self, module: nn.Module, file_of: dict[int, Tensor], order: list[str]):
        self.module, self.file_of = module, file_of
        self.units, fixed = divide(module, find_blocks(module), file_of)
        known = {name: index for index, name in enumerate(order)}
        self.units.sort(key=lambda unit: known.get(unit.block.name, len(known)))
        self.fixed = Packing(fixed)
        self.fixed_source = source_of(self.fixed, file_of)

    @property
    def nbytes(self) -> list[int]:
        """Of each block."""
        return [unit.packing.nbytes for unit in self.units]

    def note_places(self) -> None:
        self._structure = Structure(self.module)
        self._fixed_places = places(self.fixed.parts)
        for unit in self.units:
            unit.note_places()
        self.storages = storages_of(self.module)

    def edited(self) -> bool:
        """Whether the module has other modules or parameters by now, or its tensors lie elsewhere."""
        if self._structure.changed() or self._fixed_places != places(self.fixed.parts):
            return True
        return not all(unit.intact() for unit in self.units)

    def to_copy(self, unit: Unit) -> list[Segment]:
        """What the device copies of a block."""
        unit.held = unit.held_elsewhere(self.storages)
        return unit.to_copy()


def source_of(packing: Packing, file_of: dict[int, Tensor]) -> Callable[[], list[Segment]]:
    """Where the bytes of a packing are read from: the module's tensors, or the file for those on the meta device."""
    if not any(id(part) in file_of for part in packing.parts):
        return packing.segments

    def segments() -> list[Segment]:
        flat = ((packing.offset_of(part), file_of.get(id(part), part)) for part in packing.parts)
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
