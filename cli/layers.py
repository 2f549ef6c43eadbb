"""python -m tessera layers: a layered picture from one file format to another."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from ..models.layers import formats
from ..models.layers.compose import without_faint_groups


def convert(source: Path, target: Path, flatten_groups: bool = False, overwrite: bool = False) -> Iterator[str]:
    """Read, write, and say what came of it, line by line. flatten_groups: see `without_faint_groups`. overwrite: a file, never a folder.

    Raises ValueError, OSError.
    """
    if target.exists() and source.exists() and target.samefile(source):  # what a format does not keep would be lost
        raise ValueError(f"{target} is the source itself; choose another name for the result")
    if target.exists() and not target.is_dir() and not overwrite:
        raise FileExistsError(errno.EEXIST, "the file is there already; choose another name, or give --overwrite", str(target))
    document, notes = formats.read(source)
    if flatten_groups:
        document, flattened = without_faint_groups(document)
        notes = [*notes, *flattened]
    formats.write(document, target)
    yield f"{target}: {sum(1 for _ in document.walk())} layers on {document.width} x {document.height} pixels"
    yield from (f"  {note}" for note in notes)
