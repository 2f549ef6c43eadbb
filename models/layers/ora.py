"""OpenRaster files (www.openraster.org): a ZIP archive of PNG layers and `stack.xml`, read by GIMP, Krita and MyPaint.

Written with 8 bits a channel. OpenRaster has no masks: the layer is written as its mask leaves it, so that every reader shows it right,
and the untouched picture and the mask lie beside it for us to read back. Blend modes that SVG has not are named as Krita names them.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..media.atomic import finished
from . import compare
from .blend import PASS_THROUGH
from .compose import composite
from .document import Document, Group, Layer, Node, clean_name
from .pixels import MAX_PIXELS, PngReader, decoding, eight_bit, file_name, from_eight_bit

MIMETYPE = "image/openraster"
THUMBNAIL = 256  # pixels of the longer side at most
MERGED = "mergedimage.png"
MAX_STACK = 2**24  # bytes of stack.xml
_SVG = "multiply screen overlay darken lighten color-dodge color-burn hard-light soft-light difference hue saturation color luminosity".split()
OPERATORS = {
    **{"normal": "svg:src-over", "linear-dodge": "svg:plus"},
    **{mode: f"svg:{mode}" for mode in _SVG},
    **{mode: f"krita:{mode.replace('-', '_')}" for mode in ("dissolve", "exclusion", "linear-burn", "vivid-light", "pin-light", "subtract")},
    **{mode: f"krita:{mode.replace('-', '_')}" for mode in ("divide", "grain-extract", "grain-merge")},
    **{mode: f"krita:{mode.replace('-', ' ')}" for mode in ("linear-light", "darker-color", "lighter-color")},
    "hard-mix": "krita:hard_mix_photoshop",
}
_MODES = {operator: mode for mode, operator in OPERATORS.items()} | {"svg:exclusion": "exclusion", "svg:add": "linear-dodge"}
_MASK, _WHOLE = "tessera-mask", "tessera-unmasked"  # attributes of a layer that other readers ignore


def write(document: Document, file: Path, merged: Tensor | None, before: Callable[[], None]) -> None:
    """merged: its composite, if it is made already. before: called for each layer.

    Raises ValueError for a pass-through group with an opacity, which OpenRaster has not.
    """
    image = ElementTree.Element("image", version="0.0.6", w=str(document.width), h=str(document.height), xres="72", yres="72")
    pictures: dict[str, np.ndarray] = {}
    _add(ElementTree.SubElement(image, "stack"), document.layers, pictures)
    flat = eight_bit(composite(document) if merged is None else merged)
    small = Image.fromarray(flat)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    pictures |= {MERGED: flat, "Thumbnails/thumbnail.png": np.asarray(small)}
    with finished(file) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr("mimetype", MIMETYPE)  # first and stored, so that it stands at a fixed place in the file
        archive.writestr("stack.xml", ElementTree.tostring(image, "UTF-8", xml_declaration=True), zipfile.ZIP_DEFLATED)
        for name, picture in pictures.items():
            if name.count("/") == 1 and name.startswith("data/"):  # a layer's own, not its mask's
                before()
            archive.writestr(name, _png(picture))


def _add(stack: ElementTree.Element, nodes: tuple[Node, ...], pictures: dict[str, np.ndarray]) -> None:
    for node in reversed(nodes):  # OpenRaster lists the uppermost first
        attributes = {"name": node.name, "opacity": repr(float(node.opacity)), "visibility": "visible" if node.visible else "hidden"}
        if isinstance(node, Group):
            through = node.blend_mode == PASS_THROUGH
            if through and node.opacity < 1:
                lack = f"group {node.name!r} passes through at opacity {node.opacity:g}, which OpenRaster has not"
                raise ValueError(f"{lack}; use normal, save as .psd, or convert that with tessera layers --flatten-groups")
            attributes |= {"composite-op": OPERATORS["normal" if through else node.blend_mode], "isolation": "auto" if through else "isolate"}
            _add(ElementTree.SubElement(stack, "stack", attributes), node.layers, pictures)
            continue
        layer = node.baked()
        picture, source = eight_bit(layer.image), f"data/{file_name(layer.name, len(pictures), '.png')}"
        attributes |= {"composite-op": OPERATORS[layer.blend_mode], "x": str(layer.x), "y": str(layer.y), "src": source}
        if layer.mask is not None:
            attributes |= {_WHOLE: source.replace("data/", "data/unmasked/"), _MASK: source.replace("data/", "data/masks/")}
            pictures |= {attributes[_WHOLE]: picture, attributes[_MASK]: eight_bit(layer.mask)}
            picture = eight_bit(torch.cat([layer.image[..., :3], layer.image[..., 3:] * layer.mask[..., None]], -1))
        pictures[source] = picture
        ElementTree.SubElement(stack, "layer", attributes)


def _png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def read(file: Path) -> tuple[Document, list[str]]:
    """The document, and what was left out or looks different. Nothing is unpacked to disk. Raises FileError, and ValueError without the name."""
    with decoding(file.name, "an OpenRaster file", ValueError), zipfile.ZipFile(file) as archive:
        return _Reader(archive).document()


class _Reader:
    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.pngs = PngReader()
        self.notes: list[str] = self.pngs.notes

    def document(self) -> tuple[Document, list[str]]:
        """See `read`."""
        with self._open("stack.xml") as stream:
            text = stream.read(MAX_STACK + 1)
        if len(text) > MAX_STACK:
            raise ValueError(f"stack.xml is longer than {MAX_STACK >> 20} MiB; do not trust this file")
        image = _parsed(text)
        stack = image.find("stack")
        if stack is None:
            raise ValueError("stack.xml has no stack; make or download it again")
        canvas = Document(self._whole(image, "w"), self._whole(image, "h"))
        for item in stack.iter("layer"):
            for source in (item.get(_WHOLE, item.get("src", "")), item.get(_MASK)):
                if source is not None:
                    with self._png(source) as stream:
                        self.pngs.declare(stream, source)
        document = replace(canvas, layers=self._nodes(stack, 0, 0))
        self._compare(document)
        return document, self.notes

    def _compare(self, document: Document) -> None:
        """With the merged picture, which is where the standard has put it, if it is there."""
        if MERGED not in self.archive.namelist():
            return
        if document.width * document.height > MAX_PIXELS:
            self.notes.append("its merged picture is too large to check the layers against")
            return
        merged = self._merged(document)
        if merged is None:
            self.notes.append("its merged picture is damaged or of another size, and the layers could not be checked against it")
        elif found := compare.difference(document, merged):
            self.notes.append(found)

    def _merged(self, document: Document) -> Tensor | None:
        """The pixels of it that are compared, over white, with alpha."""
        pngs, step = PngReader(), compare.stride(document.width, document.height)
        try:
            with self._png(MERGED) as stream:
                if pngs.declare(stream, MERGED) != (document.width, document.height):
                    return None
            with self._png(MERGED) as stream:
                merged = from_eight_bit(pngs.unpacked(stream, MERGED, "RGBA")[::step, ::step])
        except ValueError:
            return None
        merged[..., :3] = merged[..., :3] * merged[..., 3:] + 1 - merged[..., 3:]
        return merged

    def _nodes(self, stack: ElementTree.Element, x: int, y: int) -> tuple[Node, ...]:
        nodes: list[Node] = []
        for item in reversed(stack):
            left, top = x + self._whole(item, "x"), y + self._whole(item, "y")  # a stack's offset moves all in it
            name = clean_name(item.get("name", ""))
            operator, opacity = item.get("composite-op", "svg:src-over"), _number(item.get("opacity", "1"))
            mode, visible = _MODES.get(operator), item.get("visibility") != "hidden"
            if mode is None and item.tag in ("stack", "layer"):
                self.notes.append(f"{name}: {operator} is not known; normal is used")
            mode = mode or "normal"
            if item.tag == "stack":
                through = item.get("isolation") == "auto" and mode == "normal" and opacity == 1
                nodes.append(Group(name, self._nodes(item, left, top), opacity, PASS_THROUGH if through else mode, visible))
            elif item.tag == "layer":
                picture = self._picture(item.get(_WHOLE, item.get("src", "")), "RGBA")
                mask = self._picture(item.attrib[_MASK], "L") if _MASK in item.attrib else None
                nodes.append(Layer(name, picture, left, top, opacity, mode, visible, mask))
            else:
                self.notes.append(f"{name}: {item.tag} is left out")
        return tuple(nodes)

    def _whole(self, item: ElementTree.Element, key: str) -> int:
        text = item.get(key, "0")
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{key}={text[:40]!r} in stack.xml is not a number of pixels; make or download it again") from None

    def _picture(self, source: str, mode: str) -> Tensor:
        with self._png(source) as stream:
            return self.pngs.read(stream, source, mode)

    def _png(self, source: str) -> IO[bytes]:
        if source.startswith("/") or ".." in source.replace("\\", "/").split("/"):
            raise ValueError(f"the layer file {source[:80]!r} points out of the archive; do not trust this file")
        return self._open(source)

    def _open(self, member: str) -> IO[bytes]:
        try:
            info = self.archive.getinfo(member)
        except KeyError:
            raise ValueError(f"it has no file {member[:80]!r}; make or download it again") from None
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member[:80]} is compressed by method {info.compress_type}; OpenRaster has stored and deflated members only")
        return self.archive.open(info)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"opacity={text[:40]!r} in stack.xml is not a number; use 0 to 1") from None


def _parsed(text: bytes) -> ElementTree.Element:
    """As ElementTree, which would read declarations of entities: they make a small file large, and OpenRaster has none."""

    def refuse(*_: object) -> None:
        raise ValueError("stack.xml has declarations, which OpenRaster has not; do not trust this file")

    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = builder.start, builder.end, refuse
    parser.Parse(text, True)
    return builder.close()
