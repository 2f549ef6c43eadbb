"""The one exception of every reader: a file that cannot be used, in a sentence that a user can act on."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

# What a decoder that has lost its way raises without meaning to: the text is about its code, and tells nothing of the file.
_STUMBLED: tuple[type[Exception], ...] = (
    *(AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OverflowError, RecursionError, StopIteration, TypeError),
    *(UnboundLocalError, UnicodeDecodeError, UnicodeEncodeError, ZeroDivisionError, struct.error),
)
_OF_PYTHON = re.compile(r"to unpack|object at 0x|invalid literal|could not convert string|set_int_max_str_digits")  # the same, of a ValueError


class FileError(ValueError):
    """A file that cannot be read. The text names the file, what was found in it, and what to do."""


@contextmanager
def reading(file: str | os.PathLike[str], kind: str, remedy: str = "make or download it again") -> Iterator[None]:
    """Turn whatever a decoder raises over the bytes of `file` into one FileError. Wrap the decoder, not code that calls the host back.

    kind: what the file should have been, "a safetensors file". Errors of the file system (OSError with an errno) and lack of memory pass, the
    former with the file's name. The decoder's own words are told where it chose them.
    """
    try:
        yield
    except (FileError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place that the file named and does not have
            error.filename = error.filename or os.fspath(file)
            raise
        found = str(error).strip().partition("\n")[0][:200]
        if isinstance(error, json.JSONDecodeError):
            found = f"no JSON from line {error.lineno}, column {error.colno} on"
        elif type(error) in _STUMBLED or _OF_PYTHON.search(found):
            found = ""
        raise FileError(f"{file}: not {kind}, or damaged{f' ({found})' if found else ''}; {remedy}") from error
