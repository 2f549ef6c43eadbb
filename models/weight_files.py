"""Weight files: safetensors, whose header the library checks against the file, and checkpoints of torch, of which nothing is run.

Every reader raises FileNotFoundError for what is no file, and FileError that names the file, what was found and what to do.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FileError, reading

ROOM, SMALL = 16, 1 << 20  # a file's tensors may take so many times its bytes, as tied weights are stored once, and so many bytes in any case
COPY = "get a complete copy of it"


# What the safetensors library says of a header, older versions in one word, and what that means.
MEANINGS = {
    "not fully covered|MetadataIncompleteBuffer": "its header speaks of another number of bytes than follow: cut off, or written over",
    "header length|header too|InvalidHeaderLength|HeaderToo": "it does not begin with the length of a header, or is cut off in it",
    "unknown variant": "its header names a dtype that is not known, perhaps of a later version",
    "JSON|UTF-8|InvalidHeader": "its header is no list of tensors, or one of a later version",
    "offset|overflow|slic|InvalidOffset|Overflow|TensorInvalidInfo": "its header's shapes and places do not agree",
}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> memory-mapped tensor, the file's metadata)."""
    with _opened(path, "pt", COPY) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    _check_claims(path, tensors)
    return tensors, metadata


def read_sizes(path: str | Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """name -> (shape, bytes) of a safetensors file's tensors, with none of them mapped: the file may be larger than this machine's memory."""
    with _opened(path, "np", f"{COPY}, or convert it first") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    return {name: (shape, prod(shape) * _bits(dtype) // 8) for name, (shape, dtype) in found.items()}


@contextmanager
def _opened(path: str | Path, framework: str, remedy: str) -> Iterator[Any]:
    """The library's open file; what it raises is one FileError."""
    from safetensors import SafetensorError, safe_open  # here, because everything else runs where there is torch alone

    _check_file(path)
    with reading(path, "a safetensors file", remedy):
        try:
            with safe_open(str(path), framework) as file:
                yield file
        except SafetensorError as error:
            raise ValueError(next((meaning for said, meaning in MEANINGS.items() if re.search(said, str(error))), str(error))) from error


def _bits(dtype: str) -> int:
    """Of one element of a safetensors dtype: F32, BF16, F8_E4M3, BOOL."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def read_torch(path: str | Path) -> Any:
    """What `torch.save` wrote: tensors in dicts and lists. Any other class or function in it is refused by name, and nothing of it is run."""
    _check_file(path)
    with reading(path, "a checkpoint of torch", f"{COPY}, best as .safetensors"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickles of other versions
        packed = zipfile.is_zipfile(path)  # torch 1.6 and later
        if packed:
            asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if asked:
                wanted = ", ".join(sorted(asked)[:5])
                raise FileError(f"{path}: asks for {wanted}, which is code and is not run; get its weights alone, best as .safetensors")
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise FileError(f"{path}: its tensors are compressed, which torch.save does not do; {COPY}")
        try:
            # Mapped, no tensor reaches beyond the file; older versions of torch, reading into memory, believe whatever size is claimed.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
        except pickle.UnpicklingError as error:  # its text tells how to run the file's code
            raise FileError(f"{path}: damaged, or holds more than weights; nothing of it was run; {COPY}, best as .safetensors") from error


def state_dict(path: str | Path, found: Any) -> dict[str, Tensor]:
    """The tensors of what `read_torch` returned."""
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise FileError(f"{path} holds no weights; use the state dict of a network")
    odd = [name for name, value in tensors.items() if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized]
    if odd:
        raise FileError(f"{path}: {odd[0]} is no plain tensor; save the weights dense and unquantized")
    _check_claims(path, tensors)
    return tensors


def check_numbers(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise FileError that names a tensor with NaN or infinity, from which a network makes nothing, or something wrong."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        values = value.half() if value.element_size() == 1 else value  # exact, and torch can ask halves
        if not values.isfinite().all():
            found = "NaN (not a number)" if values.isnan().any() else "infinity"
            raise FileError(f"{path}: {name} has {found} among its values, so the result would be empty or wrong; {COPY}, or train it again")


def check_fit(state: Mapping[str, Tensor], make: Callable[[], nn.Module], what: str) -> None:
    """Raise ValueError that names the first tensor that differs from the network of `make`, which is built without memory for its weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on sizes of 0, which are told below
            expected = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    except (RuntimeError, TypeError, OverflowError, ZeroDivisionError) as error:  # sizes that torch cannot even write down
        raise ValueError(f"these are not the weights of {what}: no network has the sizes that they ask for") from error
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wrong = f"{name[:200]} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
            raise ValueError(f"these are not the weights of {what}: {wrong}")


def _check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {found}; give a weight file")


def _check_claims(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """A small file can claim much: tensors whose elements are one and the same, and empty ones of any size."""
    size = Path(path).stat().st_size
    claimed = {name: prod(max(side, 1) for side in value.shape) * value.element_size() for name, value in tensors.items()}
    if sum(claimed.values()) > max(ROOM * size, SMALL):
        name = max(claimed, key=claimed.__getitem__)
        raise FileError(f"{path}: {name} is {tuple(tensors[name].shape)}, which a file of {size:,} bytes cannot hold; {COPY}")
