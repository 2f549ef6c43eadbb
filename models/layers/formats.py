"""The formats of layer files. A new one is a module that writes and reads it, and a row of FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import FileError
from . import ora, png, psd, psd_reader
from .compose import OnLayer, announcer
from .document import Document


@dataclass(frozen=True)
class Format:
    """title: for people. suffix: of what is written; "" is a folder. extensions: of the files that are read.

    write: a document to a path; merged: its composite, if it is made already; before: called for each layer. read: the document, and what of
    the file is not kept or looks different. Both raise FileError, and ValueError without the file's name.
    """

    title: str
    suffix: str
    extensions: tuple[str, ...]
    write: Callable[[Document, Path, Tensor | None, Callable[[], None]], None]
    read: Callable[[Path], tuple[Document, list[str]]]


FORMATS = {
    "psd": Format("Photoshop", ".psd", (".psd", ".psb"), psd.write, psd_reader.read),
    "ora": Format("OpenRaster", ".ora", (".ora",), ora.write, ora.read),
    "png": Format(f"a folder of PNG files with {png.INDEX}", "", (".json",), png.write, png.read),
}
EXTENSIONS = tuple(extension for kind in FORMATS.values() if kind.suffix for extension in kind.extensions)
"""Of the formats that are one file each."""


def either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def write(document: Document, target: Path, merged: Tensor | None = None, on_layer: OnLayer | None = None, format: str | None = None) -> None:
    """format: one of FORMATS; None: by the ending of `target`. A document to a file, or to a folder where that is the format.

    merged: its composite on sRGB values, if it is made already. on_layer: what it raises leaves no file. Raises ValueError, OSError.
    """
    kinds = [kind for name, kind in FORMATS.items() if (kind.suffix == target.suffix.lower() if format is None else name == format)]
    if not kinds:
        endings = ", ".join(kind.suffix for kind in FORMATS.values() if kind.suffix)
        raise ValueError(f"{target.name} ends in {target.suffix.lower()}; use {endings}, or no ending for a folder of PNG files")
    kinds[0].write(document, target, merged, announcer(on_layer, len(list(document.walk()))))


def read(source: Path) -> tuple[Document, list[str]]:
    """From a file of any of FORMATS, or the folder that holds it: the document, and what of the file is not kept or looks different.

    Raises FileError, OSError.
    """
    source = source / png.INDEX if source.is_dir() else source
    if not source.is_file():
        raise FileError(f"{source} does not exist; give a {either(EXTENSIONS)} file, or a folder with {png.INDEX}")
    kind = next((kind for kind in FORMATS.values() if source.suffix.lower() in kind.extensions), None)
    if kind is None:
        raise FileError(f"{source.name} is not a kind of file that can be read; give {', '.join(EXTENSIONS)}, or a folder with {png.INDEX}")
    try:
        return kind.read(source)
    except FileError:
        raise
    except ValueError as error:  # ours, about what the file holds
        name = f"{source.parent.name}/{source.name}" if source.name == png.INDEX else source.name
        raise FileError(f"{name} cannot be read: {error}") from error
