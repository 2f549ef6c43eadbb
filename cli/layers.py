"""python -m tessera layers: a layered picture from one file format to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..models.layers import files


def convert(source: Path, target: Path) -> Iterator[str]:
    """Read, write, and say what came of it, line by line. Raises ValueError, OSError."""
    document, notes = files.read(source)
    files.write(document, target)
    yield f"{target}: {sum(1 for _ in document.walk())} layers on {document.width} x {document.height} pixels"
    yield from (f"  {note}" for note in notes)
