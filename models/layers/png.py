"""A folder of PNG files, one a layer and one a mask, and `layers.json` that says where they lie: for every other program, and to edit by hand.

The only format that keeps transforms. 8 bits a channel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch import Tensor

from ..media.atomic import finished
from .compose import composite
from .document import Document, Group, Layer, Node, Transform
from .pixels import PngReader, decoding, eight_bit, file_name

INDEX = "layers.json"
MERGED = "merged.png"


def write(document: Document, folder: Path, merged: Tensor | None, before: Callable[[], None]) -> None:
    """merged: its composite, if it is made already. before: called for each layer.

    Raises ValueError where the folder, or a file of its name, exists.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file that exists; choose another name, or remove it")
    with finished(folder) as unfinished:
        unfinished.mkdir()
        Image.fromarray(eight_bit(composite(document) if merged is None else merged)).save(unfinished / MERGED)
        layers = _described(document.layers, unfinished, before)
        index = {"version": 1, "width": document.width, "height": document.height, "merged": MERGED, "layers": layers}
        (unfinished / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")


def _described(nodes: tuple[Node, ...], folder: Path, before: Callable[[], None]) -> list[dict[str, Any]]:
    """Bottom to top, with pictures written to the folder."""
    entries: list[dict[str, Any]] = []
    for node in nodes:
        entry: dict[str, Any] = {"name": node.name, "opacity": node.opacity, "blend_mode": node.blend_mode, "visible": node.visible}
        if isinstance(node, Group):
            entries.append(entry | {"layers": _described(node.layers, folder, before)})
            continue
        before()
        entry |= {"x": node.x, "y": node.y, **asdict(node.transform)}
        for kind, ending, picture in (("image", ".png", node.image), ("mask", "_mask.png", node.mask)):
            if picture is not None:
                entry[kind] = file_name(node.name, len(list(folder.iterdir())), ending)
                Image.fromarray(eight_bit(picture)).save(folder / entry[kind])
        entries.append(entry)
    return entries


def read(index: Path) -> tuple[Document, list[str]]:
    """The document, and what was lost. Raises FileError, and ValueError without the name."""
    with decoding(f"{index.parent.name}/{index.name}", "a description of layers", ValueError):
        try:
            described = json.loads(index.read_bytes())
        except UnicodeDecodeError:
            raise ValueError("it is no text in UTF-8; save it as such") from None
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"it is no JSON file, or cut off ({where}); correct it there, or save the layers again") from None
        except ValueError:  # Python's limit of digits
            raise ValueError("it holds a number of thousands of digits; correct it, or save the layers again") from None
        version = described.get("version") if isinstance(described, dict) else None
        if version != 1:
            raise ValueError(f"its version is {version!r:.40}, not 1; save the layers again")
        reader = _Reader(index.parent)
        canvas = Document(_given(described, "width", int), _given(described, "height", int))
        entries = _given(described, "layers", list)
        reader.declare(entries)
        return replace(canvas, layers=reader.nodes(entries)), reader.pngs.notes


_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}


def _given(entry: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of the type that it should have; None is no default. Raises ValueError."""
    value = entry.get(key, default)
    fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if fits:
        return value
    name = f" of {entry['name']!r:.40}" if isinstance(entry.get("name"), str) else ""
    raise ValueError(f"{key!r}{name} is {'missing' if key not in entry else f'{value!r:.40}'}; give {_TYPES[kind]}")


class _Reader:
    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.pngs = PngReader()

    def declare(self, entries: list[Any]) -> None:
        """All that `nodes` will read."""
        for entry in entries:
            if not isinstance(entry, dict):
                raise ValueError(f"'layers' holds {entry!r:.40}; give an object for each layer")
            if "layers" in entry:
                self.declare(_given(entry, "layers", list))
                continue
            for key in ("image", *(["mask"] if "mask" in entry else [])):
                name = _given(entry, key, str)
                with self._open(name) as stream:
                    self.pngs.declare(stream, name)

    def nodes(self, entries: list[dict[str, Any]]) -> tuple[Node, ...]:
        """From `layers`, bottom to top."""
        nodes: list[Node] = []
        for entry in entries:
            name, opacity = _given(entry, "name", str), _given(entry, "opacity", float, 1.0)
            blend_mode, visible = _given(entry, "blend_mode", str), _given(entry, "visible", bool, True)
            if "layers" in entry:
                nodes.append(Group(name, self.nodes(entry["layers"]), opacity, blend_mode, visible))
                continue
            shown = {key: _given(entry, key, type(usual), usual) for key, usual in asdict(Transform()).items()}
            mask = self._picture(entry["mask"], "L") if "mask" in entry else None
            at = _given(entry, "x", int, 0), _given(entry, "y", int, 0)
            nodes.append(Layer(name, self._picture(entry["image"], "RGBA"), *at, opacity, blend_mode, visible, mask, Transform(**shown)))
        return tuple(nodes)

    def _picture(self, name: str, mode: str) -> Tensor:
        with self._open(name) as stream:
            return self.pngs.read(stream, name, mode)

    def _open(self, name: str) -> IO[bytes]:
        file = (self.folder / name).resolve() if "\0" not in name else self.folder
        if file.parent != self.folder:
            raise ValueError(f"the file {name[:80]!r} is not in the folder; put it there")
        if not file.is_file():
            raise ValueError(f"the file {name[:80]!r} is missing; put it into the folder")
        return open(file, "rb")
