"""Where the weights of a block lie: as the module has them, packed in one run of bytes on the host, or as views of a device buffer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what CUDA's own allocations have, and more than any vector load needs


def tensors_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(owner, name, tensor) of every parameter and buffer below `module`. A shared tensor comes once for each place it is used in."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield owner, name, tensor


def plain_parts(tensor: Any) -> list[Tensor]:
    """The ordinary tensors that a tensor consists of: itself, or the parts of a wrapper subclass (quantized data, scales ...)."""
    if not _is_wrapper(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_parts(getattr(tensor, name))]


def with_parts(tensor: Any, parts: Iterator[Tensor]) -> Tensor:
    """A tensor like `tensor` made of other parts; takes as many from `parts` as it needs. Not a Parameter."""
    if _is_wrapper(tensor):
        names, context = tensor.__tensor_flatten__()
        inner = {name: with_parts(getattr(tensor, name), parts) for name in names}
        made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        return made
    part = next(parts)
    if type(tensor) in (Tensor, nn.Parameter):
        return part
    out: Tensor = part.as_subclass(type(tensor))  # a subclass that only adds attributes, as GGUF loaders do
    out.__dict__.update(tensor.__dict__)
    return out


def set_data(part: Tensor, data: Tensor) -> None:
    """`part.data = data`, also for a subclass."""
    with torch._C.DisableTorchFunctionSubclass():
        part.data = data


def table_of(owner: nn.Module, name: str) -> dict[str, Any]:
    """The table of `owner` that has, or had, a tensor of that name."""
    return owner._parameters if name in owner._parameters else owner._buffers


def as_parameter(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` as a new leaf, a Parameter where `like` is one."""
    if isinstance(like, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=like.requires_grad)
    return tensor


def _is_wrapper(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__")


def nbytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once."""
    parts = {id(part): part for _, _, tensor in tensors_of(module) for part in plain_parts(tensor)}
    return sum(part.numel() * part.element_size() for part in parts.values())


def span(part: Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory that a strided tensor covers. A meta tensor's address is made up: unique to the object."""
    extent = 0 if part.numel() == 0 else 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    address = (id(part) << 64) if part.is_meta else part.data_ptr()
    return address, extent * part.element_size()


def shared_between(groups: Iterable[Iterable[Tensor]]) -> set[int]:
    """ids of the plain tensors whose memory more than one group uses (tied weights)."""
    spans = sorted((*span(part), group, id(part)) for group, parts in enumerate(groups) for part in parts)
    shared: set[int] = set()
    cluster: list[tuple[int, int]] = []
    end = -1
    for start, length, group, key in spans:
        if start >= end:
            cluster = []
        cluster.append((group, key))
        end = max(end, start + length)
        if any(other != group for other, _ in cluster):
            shared.update(member for _, member in cluster)
    return shared


@dataclass(frozen=True)
class Piece:
    """One plain tensor inside a packed run of bytes."""

    run: int  # which run of memory it belongs to
    offset: int  # in bytes, from the start of the run
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A run of host bytes and its place in the packed block."""

    source: Tensor  # uint8
    offset: int


class Packing:
    """The layout of some tensors as one run of bytes. Tensors that overlap in memory (views of one another) still do."""

    def __init__(self, tensors: Iterable[tuple[nn.Module, str, Tensor]]):
        self.entries = list(tensors)
        self.parts = list({id(part): part for _, _, tensor in self.entries for part in plain_parts(tensor)}.values())
        self.runs: list[tuple[int, list[Tensor]]] = []  # (offset, the plain tensors of one run of memory, first the one it starts with), ascending
        self.pieces: dict[int, Piece] = {}
        self._ends: list[int] = []  # of the runs
        self.nbytes = 0
        run_start = run_end = -1
        for start, length, _, part in sorted((*span(part), index, part) for index, part in enumerate(self.parts)):
            if start >= run_end:
                self.runs.append((self.nbytes, []))
                self._ends.append(self.nbytes)
                run_start, run_end = start - start % 16, start  # so that every dtype is aligned as it was
            offset = self.runs[-1][0]
            self.runs[-1][1].append(part)
            run_end = max(run_end, start + length)
            self.nbytes = -(-(offset + run_end - run_start) // ALIGNMENT) * ALIGNMENT
            self.pieces[id(part)] = Piece(len(self.runs) - 1, start - run_start, part.dtype, part.shape, part.stride())
            self._ends[-1:] = [offset + run_end - run_start]

    def segments(self) -> list[Segment]:
        """The bytes where they are now. Valid while nobody moves the tensors."""
        return [Segment(bytes_of(part), self.offset_of(part)) for _, run in self.runs for part in _cover(run)]

    def offset_of(self, part: Tensor) -> int:
        """Where a plain tensor starts in the packed bytes."""
        piece = self.pieces[id(part)]
        return self.runs[piece.run][0] + piece.offset

    def parts_on(self, buffer: Tensor) -> dict[int, Tensor]:
        """id of each plain tensor -> the same as a part of `buffer` (uint8, on any device).

        Each run is a storage of its own, so that who saves or copies a tensor does not do it with all of the buffer.
        """
        whole = buffer.untyped_storage()
        storages = [whole[offset:end] for (offset, _), end in zip(self.runs, self._ends, strict=True)]
        with torch.inference_mode(False):  # inference tensors would not tell when they are written to
            return {key: _tensor_in(storages[piece.run], piece) for key, piece in self.pieces.items()}

    def attach(self, buffer: Tensor, *, instead_of: Tensor | None = None) -> None:
        """Make `buffer`, which holds the bytes, the memory of the module's own tensors; of those alone that lie in another buffer."""
        parts = self.parts_on(buffer)
        for part in self.parts:
            if instead_of is None or 0 <= part.untyped_storage().data_ptr() - instead_of.data_ptr() < instead_of.nbytes:
                set_data(part, parts[id(part)])

    def views(self, buffer: Tensor) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
        """(owner, name, the module's tensor, the same tensor made of views of `buffer`); a tensor used in two places comes as one object."""
        made: dict[int, Tensor] = {}
        parts = self.parts_on(buffer)
        for owner, name, tensor in self.entries:
            if id(tensor) not in made:
                made[id(tensor)] = as_parameter(with_parts(tensor, (parts[id(part)] for part in plain_parts(tensor))), tensor)
            yield owner, name, tensor, made[id(tensor)]


def _tensor_in(storage: torch.UntypedStorage, piece: Piece) -> Tensor:
    return torch.empty(0, dtype=piece.dtype, device=storage.device).set_(storage, piece.offset // piece.dtype.itemsize, piece.size, piece.stride)


def bytes_of(part: Tensor) -> Tensor:
    """The memory that a plain tensor covers, as uint8."""
    with torch._C.DisableTorchFunctionSubclass():
        storage = part.untyped_storage()
        start = part.storage_offset() * part.element_size()
        return torch.empty(0, dtype=torch.uint8, device=part.device).set_(storage, start, (span(part)[1],), (1,))


def same_bytes(part: Tensor, home: Tensor) -> bool:
    """Whether two plain tensors of one shape and dtype hold the same bits, wherever they are."""
    if part.stride() != home.stride():
        part, home = part.contiguous(), home.contiguous()
    return torch.equal(bytes_of(part).to(home.device), bytes_of(home))


def _cover(run: list[Tensor]) -> Iterator[Tensor]:
    """Of the tensors of a run, those that add bytes to the ones before."""
    end = -1
    for part in run:
        start, length = span(part)
        if start + length > end:
            end = start + length
            yield part
