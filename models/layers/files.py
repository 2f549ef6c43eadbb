"""What the file formats share: 8-bit pixels, names of files, limits, and nothing half-written under the final name."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from .compose import OnLayer, announcer
from .document import Document

MAX_PIXELS = 2**29
"""Of all layers of a file together: 8 GiB as float32 RGBA."""


def eight_bit(x: Tensor) -> np.ndarray:
    """0..1 -> the nearest of 256 levels, uint8."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def from_eight_bit(x: np.ndarray) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return torch.from_numpy(np.array(x)).float() / 255


def file_name(name: str, index: int, ending: str) -> str:
    """A file name for a layer: numbered, hence unique and never a reserved one, and without what some file system refuses."""
    plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._")[:60]
    return f"{index:03d}_{plain or 'layer'}{ending}"


def check_pixels(count: int) -> None:
    """Raises ValueError for so many pixels that they would not fit into memory."""
    if count > MAX_PIXELS:
        raise ValueError(f"its layers have {count / 1e6:.0f} million pixels; {MAX_PIXELS // 10**6} million are read at most")


class PngReader:
    """Reads the PNG files of one document: no more than `MAX_PIXELS` together. notes: a line about each one that lost something."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._pixels = 0

    def read(self, stream: IO[bytes], source: str, mode: str) -> Tensor:
        """mode "RGBA" -> float32 `(height, width, 4)` in 0..1, "L" -> `(height, width)`. source: its name, for messages. Raises ValueError."""
        head = stream.read(25)  # up to the bit depth: what it declares is judged before the rest is read
        if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 25:
            raise ValueError(f"the layer file {source[:80]!r} is not a sound PNG (it does not begin as one)")
        width, height, depth = struct.unpack(">IIB", head[16:])
        self._pixels += width * height
        check_pixels(self._pixels)
        most = width * height * 8 + 2**20  # as 16 bits a channel without compression, and room for what describes it
        data = head + stream.read(most)
        if len(data) > most:
            raise ValueError(f"the layer file {source[:80]!r} is longer than {width} x {height} pixels can be; do not trust this file")
        if depth == 16:  # of colours, Pillow keeps the upper 8
            self.notes.append(f"{source}: its 16 bits a channel are read as 8")
        try:
            with PngImageFile(io.BytesIO(data)) as picture:  # unlike Image.open, it leaves the limit of pixels to us
                if picture.mode.startswith("I"):
                    return from_eight_bit(np.asarray(Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert(mode)))
                return from_eight_bit(np.asarray(picture.convert(mode)))
        except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
            raise ValueError(f"the layer file {source[:80]!r} is not a sound PNG ({error})") from error


@contextmanager
def finished(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to. It takes the name of `target` when all went well, or is removed.

    Raises ValueError where `target` is a folder already: what is in it is not ours to delete.
    """
    if target.is_dir():
        raise ValueError(f"{target} is a folder that exists; choose another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


FORMATS = ("psd", "ora", "png")


def write(document: Document, target: Path, merged: Tensor | None = None, on_layer: OnLayer | None = None) -> None:
    """To PSD or OpenRaster by the ending .psd or .ora, else to a folder of PNG files with `layers.json`.

    merged: its composite on sRGB values, if it is made already. on_layer: what it raises leaves no file. Raises ValueError, OSError.
    """
    from . import ora, png, psd

    writers: dict[str, Callable[..., None]] = {".psd": psd.write, ".ora": ora.write, "": png.write}
    ending = target.suffix.lower()
    if ending not in writers:
        raise ValueError(f"{target.name} ends in {ending}; use .psd, .ora, or no ending for a folder of PNG files")
    writers[ending](document, target, merged, announcer(on_layer, len(list(document.walk()))))


def read(source: Path) -> tuple[Document, list[str]]:
    """From a .psd, .ora, `layers.json` or the folder that holds it: the document, and what of the file it could not keep.

    Raises ValueError that names the file, OSError.
    """
    from . import ora, png, psd

    readers: dict[str, Callable[[Path], tuple[Document, list[str]]]] = {".psd": psd.read, ".ora": ora.read, ".json": png.read}
    if source.is_dir():
        return png.read(source / png.INDEX)
    if not source.is_file():
        raise ValueError(f"{source} does not exist; give a .psd or .ora file, or a folder with {png.INDEX}")
    if source.suffix.lower() not in readers:
        raise ValueError(f"{source.name} is not a kind of file that can be read; give .psd, .ora, or a folder with {png.INDEX}")
    return readers[source.suffix.lower()](source)
