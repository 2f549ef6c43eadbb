"""The readers' one exception."""

from __future__ import annotations

from json import JSONDecodeError
from pathlib import Path

import pytest

from tessera.models.errors import FileError, reading


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("storage has wrong size\nmore"), " (storage has wrong size)"),
        (ValueError(), ""),
        (OSError(22, "Invalid argument"), " ([Errno 22] Invalid argument)"),  # a place in the file that is none
        (ValueError("too many values to unpack (expected 2)"), ""),
        (KeyError("data_offsets"), ""),
        (JSONDecodeError("Expecting value", "{\n", 2), " (no JSON from line 2, column 1 on)"),
        (ValueError("Exceeds the limit (4300 digits); use sys.set_int_max_str_digits() to increase the limit"), ""),
        (TypeError("'NoneType' object is not subscriptable"), ""),
        (RecursionError("maximum recursion depth exceeded"), ""),
    ],
)
def test_whatever_a_decoder_raises_is_one_sentence_that_names_the_file(error, found):
    with pytest.raises(FileError) as caught, reading("a/b.safetensors", "a safetensors file"):
        raise error
    assert str(caught.value) == f"a/b.safetensors: not a safetensors file, or damaged{found}; make or download it again"
    assert caught.value.__cause__ is error


def test_errors_of_the_disk_name_the_file():
    with pytest.raises(OSError, match=r"Input/output error: 'a/b.png'"), reading(Path("a/b.png"), "a picture"):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), MemoryError(), FileError("said already"), KeyboardInterrupt()])
def test_what_is_not_the_files_fault_passes(error: BaseException):
    with pytest.raises(type(error)) as caught, reading("x", "a picture"):
        raise error
    assert caught.value is error
