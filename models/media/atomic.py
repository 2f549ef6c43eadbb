"""Files and folders that appear under their name when they are whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A new hidden path beside `target` to write a file or a folder to. What is there at the end is removed."""
    path = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        with suppress(OSError):  # such as none there, or on Windows one that is open: it must not hide why
            path.unlink()


@contextmanager
def finished(target: Path) -> Iterator[Path]:
    """The same, of which what is there takes the name of `target` when all went well. Folders above it are made.

    Raises ValueError where `target` is a folder already: what is in it is not ours to delete.
    """
    if target.is_dir():
        raise ValueError(f"{target} is a folder that exists; choose another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(target) as path:
        yield path
        os.replace(path, target)
