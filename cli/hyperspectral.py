"""python -m tessera hyperspectral: a hyperspectral cube, file to file, through ESSAformer; memory does not grow with the cube's height."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..models.errors import FileError, reading
from ..models.media.atomic import finished
from ..models.upscale.convert_essaformer import convert
from ..models.upscale.essaformer import ESSAformer, build, super_resolve
from ..models.weight_files import COPY, check_numbers, read_safetensors

LAYOUTS = ("bands-first", "bands-last")
TIFF = (".tif", ".tiff")
DENSEST = 1100  # times a file's bytes that its cube may take: what deflate makes of nothing but zeros
NUMBERS = {(kind, size) for kind in "iu" for size in (1, 2, 4)} | {("f", size) for size in (2, 4, 8)}  # what float64 holds exactly
GB = 2**30


def run(options: argparse.Namespace) -> Iterator[str]:
    """What the command line asks for, told line by line."""
    if options.convert:
        return convert_lines(options.source, options.target, overwrite=options.overwrite)
    names = ("layout", "tile", "overlap", "device", "overwrite")
    return lines(options.source, options.target, options.model, limits=options.range, **{name: getattr(options, name) for name in names})


def lines(
    source: Path,
    target: Path,
    model: Path | None,
    *,
    layout: str | None = None,
    limits: tuple[float, float] | None = None,
    tile: int = 128,
    overlap: int = 32,
    device: str = "auto",
    overwrite: bool = False,
) -> Iterator[str]:
    """Super-resolve the cube `source` into `target`; what happens, line by line. The result has the source's dtype and layout.

    layout: default that of a TIFF's samples, else bands-first. limits: the values that the network is to see as 0 and 1, default 0 and the
    largest of the cube. tile, overlap: input pixels. Raises ValueError or OSError that names the input before anything is written.
    """
    if model is None:
        raise ValueError("--model is missing; give an ESSAformer .safetensors file (--convert makes one of the published checkpoint)")
    _check_target(source, target, (".npy", *TIFF), overwrite)
    if tile < 4 or overlap < 0:
        raise ValueError(f"tile is {tile} and overlap {overlap}; use a tile of 4 or more and an overlap of 0 or more")
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch sees no CUDA GPU; use cpu")
    cube, stored = _read(source)
    layout = layout or stored or LAYOUTS[0]
    network = _network(model)
    bands_first = _bands_first(cube, layout, network.bands, source)
    low, high = _limits(cube, source, limits)
    bands, height, width = bands_first.shape
    scale = network.upscale
    shape = (bands, height * scale, width * scale)
    _check_space(target, int(np.prod(shape)) * cube.dtype.itemsize)
    yield (
        f"{source.name}: {bands} bands, {width} x {height} {cube.dtype.name}, {layout}; {low:g} to {high:g} are 0 to 1 for the network. "
        f"x{scale}, {width * scale} x {height * scale} pixels, on {where.type}"
    )
    network = network.to(where)
    halved: list[str] = []
    rows = (torch.from_numpy(((bands_first[:, y].astype(np.float64) - low) / (high - low)).astype(np.float32)) for y in range(height))
    with finished(target) as temporary, torch.inference_mode():
        out = _create(temporary, target, shape, cube.dtype, layout)
        for y, row in enumerate(super_resolve(rows, network, scale, tile=tile, overlap=overlap, device=where, steps_down=halved)):
            if not row.isfinite().all():
                raise FileError(f"{model}: makes NaN (not a number) or infinity of {source}; use another model, or another --range")
            out[:, y] = _as_stored(row.numpy(), low, high, cube.dtype)
            if (y + 1) * 10 // shape[1] > y * 10 // shape[1]:
                yield f"{(y + 1) * 10 // shape[1] * 10} %"
        del out  # closes the map, which writes it
    yield from halved
    yield f"wrote {target}"


def convert_lines(source: Path, target: Path, *, overwrite: bool = False) -> Iterator[str]:
    """Convert the published ESSAformer checkpoint `source` to the safetensors file `target`; what was found, in a line."""
    _check_target(source, target, (".safetensors",), overwrite)
    with finished(target) as temporary:
        network = convert(source, temporary)
    size = sum(parameter.numel() for parameter in network.parameters())
    yield f"wrote {target}: ESSAformer x{network.upscale}, {network.bands} bands, {size:,} parameters"


def _check_target(source: Path, target: Path, endings: tuple[str, ...], overwrite: bool) -> None:
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if target.suffix.lower() not in endings:
        raise ValueError(f"{target}: the output ends in {target.suffix or 'nothing'}; use {' or '.join(endings)}")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder; make it first")
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"{target}: input and output are one file; choose another output")
        if not overwrite:
            raise ValueError(f"{target}: the output exists; choose another or add --overwrite")


def _network(model: Path) -> ESSAformer:
    if not model.is_file():
        raise ValueError(f"{model}: no such file; --model is an ESSAformer .safetensors file")
    state, _ = read_safetensors(model)
    check_numbers(model, state)
    try:
        return build(state)
    except ValueError as error:
        raise FileError(f"{model}: {error}; --convert makes one of the published checkpoint") from error


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"TIFF needs the package tifffile, which cannot be imported ({error}): pip install tifffile, or use .npy") from error
    return tifffile


def _read(path: Path) -> tuple[np.ndarray, str | None]:
    """The file's array, mapped where the file allows it and not read, and the layout that it declares."""
    suffix = path.suffix.lower()
    stored = None
    if suffix == ".npy":
        with reading(path, "a .npy file of plain numbers", "write it with np.save"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers of Python 2, and on odd ones
            # What np.load does to map a file; unlike it, this has no way to a pickle.
            try:
                cube: np.ndarray = np.lib.format.open_memmap(path, mode="r")
            except MemoryError as error:  # of Python's parser: nothing is allocated
                raise FileError(f"{path}: the header of this .npy file is nested too deeply; write it with np.save") from error
    elif suffix in TIFF:
        cube, stored = _read_tiff(path)
    else:
        raise FileError(f"{path}: the input ends in {suffix or 'nothing'}; use .npy, {' or '.join(TIFF)}")
    if cube.ndim != 3:
        raise FileError(f"{path}: the array has shape {cube.shape}; use three axes, bands, height and width")
    if (cube.dtype.kind, cube.dtype.itemsize) not in NUMBERS:
        raise FileError(f"{path}: the array holds {cube.dtype}; use integers of 8 to 32 bits, or float16, float32 or float64")
    if 0 in cube.shape:
        raise FileError(f"{path}: the array is empty, {cube.shape}")
    return cube, stored


def _check_directories(path: Path) -> None:
    """Raise FileError for directories that go round in a circle, which tifffile would follow some millions of times."""
    with path.open("rb") as file:
        head = file.read(16)
        order, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
        count, link = (struct.Struct(order + kind) for kind in ("QQ" if big else "HI"))
        entry = 20 if big else 12  # bytes
        seen: set[int] = set()
        found = head[8:] if big else head[4:8]
        while len(found) == link.size and (place := link.unpack(found)[0]):
            if place in seen:
                raise FileError(f"{path}: damaged, its pictures follow each other in a circle; {COPY}")
            seen.add(place)
            file.seek(place)
            entries = file.read(count.size)
            if len(entries) < count.size:
                break
            file.seek(count.unpack(entries)[0] * entry, os.SEEK_CUR)
            found = file.read(link.size)


def _read_tiff(path: Path) -> tuple[np.ndarray, str | None]:
    tifffile, stored = _tifffile(), None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it tells of each tag that it does not understand
    with reading(path, "a TIFF that can be read", "save it uncompressed"):
        _check_directories(path)
        # OME's description would be believed on the number of planes, and on other files.
        with tifffile.TiffFile(path, is_ome=False) as file:
            series = file.series[0]
            size = path.stat().st_size
            if series.nbytes > DENSEST * size:
                raise FileError(f"{path}: claims {series.nbytes / GB:.1f} GB, which {size:,} bytes cannot hold; {COPY}")
            if len(series.axes) == 3 and "S" in series.axes:
                stored = LAYOUTS[0] if series.axes.startswith("S") else LAYOUTS[1]
            if series.dataoffset is None:  # compressed, or scattered over the file
                return series.asarray(), stored
            if series.dataoffset + series.nbytes > size:
                raise FileError(f"{path}: cut off: {series.nbytes:,} bytes of numbers begin at {series.dataoffset:,} and it has {size:,}; {COPY}")
            return tifffile.memmap(path, mode="r", series=0, is_ome=False), stored


def _bands_first(cube: np.ndarray, layout: str, bands: int, path: Path) -> np.ndarray:
    """A view (bands, height, width), which has the network's number of bands."""
    first, last = cube.shape[0], cube.shape[-1]
    found, other, other_layout = (first, last, LAYOUTS[1]) if layout == LAYOUTS[0] else (last, first, LAYOUTS[0])
    if found != bands:
        hint = f"the other layout would fit: add --layout {other_layout}" if other == bands else "use a cube of those bands, or a model for these"
        raise FileError(f"{path}: shape {cube.shape} has {found} bands ({layout}) and the model takes {bands}; {hint}")
    return cube if layout == LAYOUTS[0] else np.moveaxis(cube, -1, 0)


def _limits(cube: np.ndarray, path: Path, limits: tuple[float, float] | None) -> tuple[float, float]:
    """Reads the whole cube once."""
    largest = -np.inf
    for index, part in enumerate(cube):
        if cube.dtype.kind == "f" and not np.isfinite(part).all():
            bad = np.count_nonzero(~np.isfinite(part))
            raise FileError(f"{path}: {bad} NaN or infinite values at index {index} of the first axis; replace them, also where they mean no data")
        largest = max(largest, float(part.max()))
    low, high = limits or (0.0, largest)
    if not (np.isfinite((low, high)).all() and low < high):
        cause = f"--range is {low:g} {high:g}" if limits else f"{path}: the largest value is {largest:g}"
        raise ValueError(f"{cause}; give --range LOW HIGH, two values that the network is to see as 0 and 1, the first one smaller")
    return low, high


def _check_space(target: Path, needed: int) -> None:
    # A mapped file that does not fit on the disk ends the process without a word.
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(f"{target}: the result needs {needed / GB:.1f} GB and {free / GB:.1f} are free on that disk")


def _create(temporary: Path, target: Path, shape: tuple[int, ...], dtype: np.dtype[Any], layout: str) -> np.ndarray:
    """The mapped output as (bands, height, width), stored in `layout`."""
    bands_last = layout == LAYOUTS[1]
    stored = (*shape[1:], shape[0]) if bands_last else shape
    create: Callable[..., np.ndarray] = np.lib.format.open_memmap
    if target.suffix.lower() == ".npy":
        out = create(temporary, mode="w+", dtype=dtype, shape=stored)
    else:
        # One picture of many samples, as remote sensing software reads it.
        options = {"photometric": "minisblack", "planarconfig": "contig" if bands_last else "separate"}
        out = _tifffile().memmap(temporary, shape=stored, dtype=dtype.newbyteorder("="), **options)
    return np.moveaxis(out, -1, 0) if bands_last else out


def _as_stored(row: np.ndarray, low: float, high: float, dtype: np.dtype[Any]) -> np.ndarray:
    """The network's values on the cube's scale, held inside the dtype; integers rounded."""
    values = row.astype(np.float64) * (high - low) + low
    info = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return (values if dtype.kind == "f" else values.round()).clip(info.min, info.max).astype(dtype)
