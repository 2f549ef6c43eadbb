"""Where layers go: in a grid, by golden sections, in drawn boxes, where masks are, or as a caption says. Rules, no model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from colorsys import hls_to_rgb
from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor

from .document import MAX_AREA, MAX_FAR, MAX_SIDE, Box, Document, Group, Layer, Node, Transform, clean_name

FITS = ("contain", "cover", "stretch")
SIDES = ("x", "y", "width", "height")
GOLDEN_ANGLE = 137.508  # degrees of hue between neighbours, as in web/layout_editor.js
SAID = 5  # problems in one message


def place(layer: Layer, box: Box, fit: str = "contain") -> Layer:
    """A layer shown in a box, turned back to 0: centred as large as fits it (contain) or fills it (cover), or filling it exactly (stretch).

    Raises ValueError for a box without area.
    """
    x, y, width, height = box
    if min(width, height) < 1:
        raise ValueError(f"the box of layer {layer.name!r} is {width} x {height} pixels; give it an area")
    if fit != "stretch":
        own_height, own_width = layer.image.shape[:2]
        scale = (min if fit == "contain" else max)(width / own_width, height / own_height)
        shown = max(round(own_width * scale), 1), max(round(own_height * scale), 1)
        x, y = x + (width - shown[0]) // 2, y + (height - shown[1]) // 2
        width, height = shown
    return replace(layer, x=x, y=y, transform=replace(layer.transform, width=width, height=height, rotation=0.0))


def arranged(document: Document, boxes: Sequence[Box], fit: str = "contain", background: bool = False) -> tuple[Document, list[str]]:
    """Layers into boxes, bottom to top. background: the lowest layer covers the canvas instead, and the boxes are for the others.

    Returns the document, and a line for each layer beyond the last box; those stay where they are. Raises ValueError.
    """
    rest = iter(boxes)
    notes: list[str] = []
    lowest = next((layer for _, layer in document.walk()), None) if background else None

    def placed(layer: Layer) -> Layer:
        if layer is lowest:
            return place(layer, (0, 0, document.width, document.height), "cover")
        box = next(rest, None)
        if box is None:
            notes.append(f"{layer.name}: there is no box for it")
            return layer
        return place(layer, box, fit)

    return document.map(placed), notes


def grid(count: int, width: int, height: int, columns: int = 0, gap: int = 0) -> list[Box]:
    """`count` equal cells in rows, `gap` pixels between them and around. columns 0: cells as square as they get.

    Raises ValueError where the gaps leave nothing.
    """
    columns = columns or max(min(round(sqrt(count * width / height)), count), 1)
    rows = max(ceil(count / columns), 1)
    across, down = _cells(width, columns, gap), _cells(height, rows, gap)
    if min(size for _, size in across + down) < 1:
        raise ValueError(f"{columns} x {rows} cells with a gap of {gap} do not fit {width} x {height} pixels; use a smaller gap or fewer layers")
    cells = [(across[i % columns], down[i // columns]) for i in range(count)]
    return [(x, y, cell_width, cell_height) for (x, cell_width), (y, cell_height) in cells]


def _cells(side: int, count: int, gap: int) -> list[tuple[int, int]]:
    """Start and length of each; together with the gaps they are the side exactly."""
    room = side - gap * (count + 1)
    ends = [room * i // count for i in range(count + 1)]
    return [(ends[i] + gap * (i + 1), ends[i + 1] - ends[i]) for i in range(count)]


def golden(count: int, width: int, height: int) -> list[Box]:
    """The golden spiral: each box is the larger golden section of what the ones before it left, the last one the rest.

    The boxes cover the canvas and do not overlap. Raises ValueError where a box would be empty.
    """
    boxes: list[Box] = []
    x, y, w, h = 0, 0, width, height
    ratio = (sqrt(5) - 1) / 2
    for index in range(count - 1):
        before = index % 4 < 2  # the larger part is left, above, right, below in turn
        if w >= h:
            part = round(w * ratio)
            boxes.append((x if before else x + w - part, y, part, h))
            x, w = (x + part if before else x), w - part
        else:
            part = round(h * ratio)
            boxes.append((x, y if before else y + h - part, w, part))
            y, h = (y + part if before else y), h - part
    boxes.append((x, y, w, h))
    if min(min(box[2:]) for box in boxes) < 1:
        raise ValueError(f"{count} golden sections do not fit {width} x {height} pixels; use grid, or fewer layers")
    return boxes


def from_masks(masks: Tensor, size: tuple[int, int] | None = None, threshold: float = 0.5) -> list[Box]:
    """The boxes of what is above the threshold in masks `(count, height, width)`, or one `(height, width)`.

    size: (width, height) of the canvas that they are scaled to, or None. Raises ValueError, also for a mask that has nothing there.
    """
    if not isinstance(masks, Tensor) or masks.ndim not in (2, 3) or not masks.numel():
        found = tuple(masks.shape) if isinstance(masks, Tensor) else f"{masks!r:.40}"
        raise ValueError(f"masks is {found}; connect masks of (count, height, width), one a layer")
    masks = masks.reshape(-1, *masks.shape[-2:])
    across, down = (1.0, 1.0) if size is None else (size[0] / masks.shape[2], size[1] / masks.shape[1])
    boxes: list[Box] = []
    for index, mask in enumerate(masks > threshold):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if not len(rows):
            raise ValueError(f"mask {index + 1} has nothing above {threshold:g}; paint it, or leave it out")
        left, top = round(int(columns[0]) * across), round(int(rows[0]) * down)
        right, bottom = round((int(columns[-1]) + 1) * across), round((int(rows[-1]) + 1) * down)
        boxes.append((left, top, max(right - left, 1), max(bottom - top, 1)))
    return boxes


def from_json(text: str, width: int, height: int) -> list[tuple[str, Box]]:
    """Names and boxes, bottom to top, of a JSON list such as `[{"name": "sky", "x": 0, "y": 0, "width": 512, "height": 128}]`, in pixels.

    A name may be missing, which is "". Boxes may overlap and reach beyond the canvas. Raises ValueError that says for each wrong box what is
    wrong with it: no such object, no area or too much, or all of it outside of the canvas.
    """
    if min(width, height) < 1:
        raise ValueError(f"the canvas is {width} x {height} pixels; use 1 or more a side")
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"boxes is not JSON ({error}); {_WRITE}") from error
    except (ValueError, RecursionError) as error:  # in Python's own words: a number of thousands of digits, lists in thousands of lists
        raise ValueError(f"boxes is JSON with too long a number, or nested too deep; {_WRITE}") from error
    if not isinstance(items, list):
        raise ValueError(f"boxes is {json.dumps(items)[:60]} and no list; {_WRITE}")
    found = ((number, _malformed(item) or _misplaced(item, width, height)) for number, item in enumerate(items, 1))
    problems = [f"box {number} {problem}" for number, problem in found if problem is not None]
    if problems:
        more = f", and {len(problems) - SAID} more boxes are wrong" if len(problems) > SAID else ""
        raise ValueError(f"{'; '.join(problems[:SAID])}{more}; change them in the editor, or {_WRITE}")
    return [_named(item) for item in items]


_WRITE = 'write a list such as [{"name": "sky", "x": 0, "y": 0, "width": 512, "height": 128}], the lowest box first'


def _malformed(item: Any) -> str | None:
    if not isinstance(item, dict):
        return f"is {json.dumps(item)[:60]} and no object"
    if missing := [side for side in SIDES if side not in item]:
        return f"has no {', '.join(missing)}"
    if unknown := sorted(item.keys() - {"name", *SIDES}):
        return f"has {', '.join(unknown)[:60]}, which mean nothing"
    if not isinstance(item.get("name", ""), str):
        return f"has the name {json.dumps(item['name'])[:60]}, which is no text"
    for side in SIDES:
        value = item[side]
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:  # of infinity and NaN, too, that is not 0
            return f"has {side} {json.dumps(value)[:60]}, which is no whole number"
        if abs(value) > MAX_FAR:
            return f"has {side} {json.dumps(value)[:60]}, which is more than {MAX_FAR} pixels"
    return None


def _named(item: dict[str, Any]) -> tuple[str, Box]:
    x, y, width, height = (int(item[side]) for side in SIDES)
    return clean_name(item.get("name", "")), (x, y, width, height)


def _misplaced(item: dict[str, Any], canvas_width: int, canvas_height: int) -> str | None:
    name, (x, y, width, height) = _named(item)
    if min(width, height) < 1:
        return f"{name[:40]!r} has no area ({width} x {height} pixels)"
    if max(width, height) > MAX_SIDE:
        return f"{name[:40]!r} has a side of more than {MAX_SIDE} pixels"
    if width * height > MAX_AREA:
        return f"{name[:40]!r} is {width} x {height} pixels, which is more than {MAX_AREA >> 20} x 2**20 in all"
    if x >= canvas_width or y >= canvas_height or x + width <= 0 or y + height <= 0:
        return f"{name[:40]!r} (at {x}, {y}, {width} x {height}) lies outside of the canvas of {canvas_width} x {canvas_height}"
    return None


def swatches(named: Sequence[tuple[str, Box]]) -> tuple[Layer, ...]:
    """A flat opaque layer for each box, of one pixel that is shown as large as the box. Neighbours differ in hue as far as many colours can."""
    layers = []
    for index, (name, (x, y, width, height)) in enumerate(named):
        colour = hls_to_rgb(index * GOLDEN_ANGLE / 360 % 1, 0.6, 0.6)
        image = torch.tensor([*colour, 1.0]).view(1, 1, 4)
        layers.append(Layer(name or f"Layer {index + 1}", image, x, y, transform=Transform(width, height)))
    return tuple(layers)


# Thirds of the canvas that words stand for: start and end, across and down.
_ACROSS = {"left": (0, 1), "right": (2, 3), "middle": (1, 2), "center": (1, 2), "centre": (1, 2)}
_DOWN = {word: (0, 1) for word in ("top", "upper", "above", "sky", "ceiling")}
_DOWN |= {word: (2, 3) for word in ("bottom", "lower", "below", "ground", "floor")} | {word: (1, 2) for word in ("middle", "center", "centre")}
_BEHIND = {"background", "behind", "backdrop", "far"}
_BEFORE = {"foreground", "front", "near"}
_LARGE, _SMALL = {"large", "big", "huge", "full", "whole"}, {"small", "little", "tiny"}


def from_caption(caption: str, document: Document, fit: str = "contain") -> tuple[Document, list[str]]:
    """Layers placed as a caption says: clauses, divided by commas, semicolons, full stops or "and", that name a layer and where it is.

    "a dog on the left, a small bird top right, mountains in the background": a clause is about the first layer that it names, or its plural.
    left, right, middle, top, bottom choose thirds of the canvas; large is two thirds, small half a third; background fills the canvas and goes
    below the rest, foreground goes above it. Layers in groups keep their group. Returns the document, and a line for each layer that the
    caption does not place; those stay as they are.
    """
    said = _said(caption.lower(), {_words(layer.name) for _, layer in document.walk()} - {()})
    notes: list[str] = []
    depth: dict[int, int] = {}

    def placed(layer: Layer) -> Layer:
        for name, words in said:
            box = _described(words, document.width, document.height) if name == _words(layer.name) else None
            if box is not None:
                behind = bool(words & _BEHIND)
                there = place(layer, box, "cover" if behind else fit)
                depth[id(there)] = -1 if behind else int(bool(words & _BEFORE))
                return there
        notes.append(f"{layer.name}: the caption does not say where")
        return layer

    moved = document.map(placed)
    return replace(moved, layers=tuple(sorted(moved.layers, key=lambda node: depth.get(id(node), 0)))), notes


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _said(caption: str, names: set[tuple[str, ...]]) -> list[tuple[tuple[str, ...], set[str]]]:
    """Of each clause that has a name: the first one, and the other words. Names are found before clauses end: they may have "and" or a dot."""
    longest = sorted(names, key=lambda name: (-len(" ".join(name)), name))
    kinds = [*(r"\b" + r"\W+".join(name) + r"(?:s|es)?\b" for name in longest), r"[,;.\n]|\band\b", r"\w+"]
    clauses: list[list[tuple[int, str]]] = [[]]
    for found in re.finditer("|".join(f"({kind})" for kind in kinds), caption):
        kind = (found.lastindex or 0) - 1
        if kind == len(names):
            clauses.append([])
        else:
            clauses[-1].append((kind, found[0]))
    said = []
    for clause in clauses:
        first = next((index for index, (kind, _) in enumerate(clause) if kind < len(names)), None)
        if first is not None:
            rest = " ".join(text for _, text in clause[:first] + clause[first + 1 :])
            said.append((longest[clause[first][0]], set(_words(rest))))
    return said


def _described(words: set[str], width: int, height: int) -> Box | None:
    across = [_ACROSS[word] for word in sorted(words) if word in _ACROSS]
    down = [_DOWN[word] for word in sorted(words) if word in _DOWN]
    if words & _BEHIND and not across and not down:
        return 0, 0, width, height
    if not across and not down and not words & (_BEFORE | _LARGE | _SMALL | _BEHIND):
        return None
    sides = []
    for side, found in ((width, across), (height, down)):
        # "top left" says both; "top" alone leaves the other side in the middle, and so does "middle" said of both
        start, end = next((part for part in found if part != (1, 2)), (1, 2))
        size = (4 if words & _LARGE else 1 if words & _SMALL else 2) / 6
        centre = (start + end) / 6
        begin = min(max(centre - size / 2, 0), 1 - size)
        sides.append((round(begin * side), max(round(size * side), 1)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def chosen(document: Document, which: str) -> list[Layer]:
    """Layers by name, or one by its number from the bottom, 1 being the lowest and -1 the uppermost. Raises ValueError that lists the names."""
    layers = [layer for _, layer in document.walk()]
    named = [layer for layer in layers if layer.name == which.strip()]
    if named:
        return named
    if re.fullmatch(r"-?[1-9]\d{0,8}", which.strip()):
        index = int(which)
        if abs(index) <= len(layers):
            return [layers[index - 1 if index > 0 else index]]
    names = ", ".join(f"{number} {layer.name!r}" for number, layer in enumerate(layers, 1)) or "none"
    raise ValueError(f"layer is {which!r:.60}, and there is none of that name or number; the layers are, from the bottom: {names:.400}")


def restacked(nodes: tuple[Node, ...], layer: Layer, position: int) -> tuple[Node, ...]:
    """The layer moved among its neighbours, those of its group: 1 lowest, -1 uppermost, what is beyond them counts as the last."""
    if any(node is layer for node in nodes):
        rest = [node for node in nodes if node is not layer]
        rest.insert(max(position - 1, 0) if position >= 0 else max(len(nodes) + position, 0), layer)
        return tuple(rest)
    return tuple(replace(node, layers=restacked(node.layers, layer, position)) if isinstance(node, Group) else node for node in nodes)


def trimmed(layer: Layer, threshold: float = 0.0) -> Layer:
    """A layer cut to its pixels with alpha above `threshold`; one that has none stays as it is. Only for layers without a transform."""
    alpha = layer.image[..., 3] if layer.mask is None else layer.image[..., 3] * layer.mask
    if layer.transform != Transform() or not (alpha > threshold).any():
        return layer
    left, top, width, height = from_masks(alpha[None], threshold=threshold)[0]
    mask = None if layer.mask is None else layer.mask[top : top + height, left : left + width].contiguous()
    image = layer.image[top : top + height, left : left + width].contiguous()
    return replace(layer, image=image, mask=mask, x=layer.x + left, y=layer.y + top)
