"""Texts in PNG files, such as a workflow (ISO/IEC 15948, 11.3.4)."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import IO, Any

from PIL.PngImagePlugin import PngInfo, iTXt


def text_chunks(texts: Mapping[str, str]) -> PngInfo:
    """tEXt for what Latin-1 holds, iTXt for the rest and for what was read as such."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value) if isinstance(value, iTXt) else info.add_text(key.encode("latin-1", "replace"), value)
    return info


def insert_chunks(source: IO[bytes], target: IO[bytes], chunks: Iterable[tuple[Any, ...]]) -> None:
    """Copy a PNG file with more chunks in it, `(tag, value)` each as in `PngInfo.chunks`."""
    target.write(source.read(8 + 25))  # the signature and IHDR, after which the order is free for these
    for tag, value, *_ in chunks:
        target.write(struct.pack(">I", len(value)) + tag + value + struct.pack(">I", zlib.crc32(tag + value)))
    shutil.copyfileobj(source, target)
