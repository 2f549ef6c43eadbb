"""The one exception of every reader: a file that cannot be used, in a sentence that a user can act on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class FileError(ValueError):
    """A file that cannot be read. The text names the file, what was found in it, and what to do."""


@contextmanager
def reading(file: str | os.PathLike[str], kind: str, remedy: str = "make or download it again") -> Iterator[None]:
    """Turn whatever a decoder raises over the bytes of `file` into one FileError. Wrap the decoder, not code that calls the host back.

    kind: what the file should have been, "a safetensors file". Errors of the file system (OSError with an errno) and lack of memory pass.
    """
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        if isinstance(error, OSError) and error.errno is not None:
            raise
        found = str(error).strip().splitlines()
        raise FileError(f"{file}: not {kind}, or damaged ({found[0] if found else type(error).__name__}); {remedy}") from error
