"""A folder of PNG files, one a layer and one a mask, and `layers.json` that says where they lie: for every other program, and to edit by hand.

The only format that keeps transforms. 8 bits a channel.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .compose import composite
from .document import Document, Group, Layer, Node, Transform
from .files import PngReader, eight_bit, file_name, finished

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
    """The document, and what was lost. Raises ValueError that names the file."""
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        if described.get("version") != 1:
            raise ValueError(f"version is {described.get('version')!r:.40}, not 1")
        reader = _Reader(index.parent)
        return Document(described["width"], described["height"], reader.nodes(described["layers"])), reader.pngs.notes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{index.parent.name}/{index.name} cannot be read: {what}") from error


class _Reader:
    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.pngs = PngReader()

    def nodes(self, entries: list[dict[str, Any]]) -> tuple[Node, ...]:
        """From `layers`, bottom to top."""
        nodes: list[Node] = []
        for entry in entries:
            common = entry["name"], entry.get("opacity", 1.0), entry["blend_mode"], entry.get("visible", True)
            if "layers" in entry:
                nodes.append(Group(common[0], self.nodes(entry["layers"]), *common[1:]))
                continue
            transform = Transform(**{key: entry[key] for key in asdict(Transform()) if key in entry})
            mask = self._picture(entry["mask"], "L") if "mask" in entry else None
            picture = self._picture(entry["image"], "RGBA")
            nodes.append(Layer(common[0], picture, entry.get("x", 0), entry.get("y", 0), *common[1:], mask, transform))
        return tuple(nodes)

    def _picture(self, name: str, mode: str) -> Tensor:
        file = (self.folder / name).resolve()
        if file.parent != self.folder:
            raise ValueError(f"the file {name!r} is not in the folder")
        with open(file, "rb") as stream:
            return self.pngs.read(stream, name, mode)
