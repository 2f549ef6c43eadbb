"""python -m tessera layers: a layered picture from one file format to another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..models.layers import files
from ..models.layers.compose import without_faint_groups


def convert(source: Path, target: Path, flatten_groups: bool = False) -> Iterator[str]:
    """Read, write, and say what came of it, line by line. flatten_groups: see `without_faint_groups`. Raises ValueError, OSError."""
    document, notes = files.read(source)
    if flatten_groups:
        document, flattened = without_faint_groups(document)
        notes = [*notes, *flattened]
    files.write(document, target)
    yield f"{target}: {sum(1 for _ in document.walk())} layers on {document.width} x {document.height} pixels"
    yield from (f"  {note}" for note in notes)
