"""The readers' one exception."""

from __future__ import annotations

import pytest

from tessera.models.errors import FileError, reading


def test_whatever_a_decoder_raises_is_one_sentence_that_names_the_file():
    for error, found in ((KeyError("data_offsets"), "'data_offsets'"), (RecursionError("deep\nmore"), "deep"), (TypeError(), "TypeError")):
        with pytest.raises(FileError) as caught, reading("a/b.safetensors", "a safetensors file"):
            raise error
        assert str(caught.value) == f"a/b.safetensors: not a safetensors file, or damaged ({found}); make or download it again"
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), MemoryError(), FileError("said already"), KeyboardInterrupt()])
def test_what_is_not_the_files_fault_passes(error: BaseException):
    with pytest.raises(type(error)) as caught, reading("x", "a picture"):
        raise error
    assert caught.value is error
