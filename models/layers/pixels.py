"""What the formats of layer files share: 8-bit pixels, names of files, limits, and nothing half-written under the final name."""

from __future__ import annotations

import errno
import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import IO

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from ..errors import FileError
from . import profiles
from .document import clean_name

MAX_PIXELS = 2**29
"""Of all layers of a file together: 8 GiB as float32 RGBA."""
MAX_LAYERS = 2**15 - 1  # of a file: PSD's limit


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


_HEADER = 26  # bytes of a PNG up to its colour type
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type
_DEFLATED = 1032  # times as long as deflated data what comes out can be


def _header(head: bytes, source: str) -> tuple[int, int, int]:
    """Width, height and bits a pixel of a PNG. Raises ValueError."""
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < _HEADER or head[25] not in _CHANNELS:
        raise ValueError(f"the layer file {source[:80]!r} is not a sound PNG (it does not begin as one); make or download it again")
    width, height = struct.unpack(">II", head[16:24])
    return width, height, head[24] * _CHANNELS[head[25]]


def check_pixels(count: int) -> None:
    """Raises ValueError for so many pixels that they would not fit into memory."""
    if count > MAX_PIXELS:
        raise ValueError(f"its layers have {count / 1e6:.0f} million pixels; {MAX_PIXELS // 10**6} million are read at most")


class PngReader:
    """Reads the PNG files of one document, each once. notes: a line about each one that lost something.

    First `declare` all of them, as often as they are named: what that would take is judged before any is unpacked.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._pixels = self._count = 0
        self._read: dict[tuple[str, str], Tensor] = {}

    def declare(self, stream: IO[bytes], source: str) -> tuple[int, int]:
        """(width, height) that it claims. Raises ValueError where the document would have more layers or pixels than are read."""
        width, height, _ = _header(stream.read(_HEADER), source)
        self._count += 1
        self._pixels += width * height
        check_pixels(self._pixels)
        if self._count > 2 * MAX_LAYERS:  # a picture and a mask each
            raise ValueError(f"it has more than {MAX_LAYERS} layers; so many are read at most")
        return width, height

    def read(self, stream: IO[bytes], source: str, mode: str) -> Tensor:
        """mode "RGBA" -> float32 `(height, width, 4)` in 0..1, "L" -> `(height, width)`. source: its name, for messages. Raises ValueError."""
        if (source, mode) not in self._read:
            self._read[source, mode] = from_eight_bit(self.unpacked(stream, source, mode))
        return self._read[source, mode]

    def unpacked(self, stream: IO[bytes], source: str, mode: str) -> np.ndarray:
        """The same as uint8, and not kept."""
        head = stream.read(_HEADER)
        width, height, bits = _header(head, source)
        raw = height * (1 + ceil(width * bits / 8))  # bytes of its rows, each with the number of its filter
        most = raw + raw // 1000 + 2**20  # without compression, and room for what describes it
        data = head + stream.read(most)
        if len(data) > most:
            raise ValueError(f"the layer file {source[:80]!r} is longer than {width} x {height} pixels can be; do not trust this file")
        if raw > _DEFLATED * len(data):
            raise ValueError(f"the layer file {source[:80]!r} is too short for {width} x {height} pixels; make or download it again")
        try:
            with PngImageFile(io.BytesIO(data)) as picture:  # unlike Image.open, it leaves the limit of pixels to us
                picture.load()
                return self._in_srgb(picture, source, mode, head[24])
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can make the decoder fail in any way
            raise ValueError(f"the layer file {source[:80]!r} is damaged, no sound PNG; make or download it again") from error

    def _in_srgb(self, picture: Image.Image, source: str, mode: str, depth: int) -> np.ndarray:
        profile = picture.info.get("icc_profile")
        if depth == 16:  # of colours, Pillow keeps the upper 8
            self.notes.append(f"{source}: its 16 bits a channel are read as 8")
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        channels = 1 if picture.mode in ("1", "L", "LA") else 3
        pixels = np.array(picture.convert(mode))
        if mode == "RGBA" and isinstance(profile, bytes):
            try:
                convert, name = profiles.to_srgb(profile, channels)
            except ValueError as error:
                self.notes.append(f"{source}: {error}; the values are taken as sRGB")
            else:
                if convert is not None:
                    pixels[..., :3] = convert(np.ascontiguousarray(pixels[..., :channels]))
                    self.notes.append(f"{source}: its colours are converted from {clean_name(name)!r} to sRGB")
        return pixels


@contextmanager
def decoding(name: str, kind: str, *ours: type[Exception]) -> Iterator[None]:
    """As `reading`, but without the words of the decoder: those of psd-tools, zipfile and Pillow are about their own code.

    ours: what passes, beside FileError.
    """
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        if isinstance(error, ours) and not isinstance(error, UnicodeError):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place that the file names and has not
            raise
        raise FileError(f"{name}: not {kind}, or damaged; make or download it again") from error
