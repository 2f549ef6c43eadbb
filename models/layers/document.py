"""The layer document: what lies where, in which order and how it is blended. To and from ComfyUI's `LAYERS`.

Pictures are float32 `(height, width, 4)` in 0..1, sRGB with straight alpha. A document owns nothing twice: layers share their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, cos, floor, isfinite, pi, sin
from numbers import Real
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.nn import functional as F

from ..media.resize import resize
from .blend import MODES, PASS_THROUGH

MAX_SIDE = 30_000  # of a canvas, in pixels: PSD's limit
MAX_AREA = 2**28  # of a layer's bounds, in pixels: 4 GiB as float32 RGBA
MAX_FAR = 2**20  # pixels: how far from the canvas' corner a layer may lie, and how long a side of it may be
MAX_DEPTH = 100  # groups in groups
MAX_NAME = 255  # characters: PSD's limit
_NO_TEXT = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]")  # control characters, and what XML cannot hold
_OURS = "tessera"  # key of a LAYERS item that other nodes ignore

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


@dataclass(frozen=True)
class Transform:
    """How a layer's picture is shown: flipped, scaled to (width, height), turned clockwise by `rotation` radians about its centre.

    A size of 0 is the picture's own. x and y of the layer are the upper left corner before it is turned.
    """

    width: int = 0
    height: int = 0
    rotation: float = 0.0
    flip_h: bool = False
    flip_v: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """One picture of a document. mask: float32 `(height, width)`, 1 shows, 0 hides; it is transformed with the picture."""

    name: str
    image: Tensor
    x: int = 0
    y: int = 0
    opacity: float = 1.0
    blend_mode: str = "normal"
    visible: bool = True
    mask: Tensor | None = None
    transform: Transform = field(default_factory=Transform)
    checked: tuple[Tensor | None, ...] = field(default=(), repr=False)  # what was found finite, so that a changed copy is not searched again

    def __post_init__(self) -> None:
        _check(self, "layer", MODES)
        if not isinstance(self.image, Tensor) or not isinstance(self.mask, Tensor | None):
            raise ValueError(f"layer {self.name!r} has no picture, or something else as its mask; look for the node that made it")
        shape = tuple(self.image.shape)
        if self.image.dtype != torch.float32 or len(shape) != 3 or shape[2] != 4 or not min(shape):
            raise ValueError(
                f"layer {self.name!r} has an image {shape} of {str(self.image.dtype)[6:]}; give float32 (height, width, 4) with a pixel at least"
            )
        if self.mask is not None and (tuple(self.mask.shape) != shape[:2] or self.mask.dtype != torch.float32):
            raise ValueError(f"layer {self.name!r} has a mask {tuple(self.mask.shape)} of {str(self.mask.dtype)[6:]}; give float32 {shape[:2]}")
        if not all(_finite(x) for x in (self.image, self.mask) if x is not None and not any(x is known for known in self.checked)):
            raise ValueError(f"layer {self.name!r} has pixels that are not finite numbers; look for the node that made them")
        object.__setattr__(self, "checked", (self.image, self.mask))
        if not all(isinstance(at, int) and abs(at) <= MAX_FAR for at in (self.x, self.y)):
            raise ValueError(f"layer {self.name!r} lies at {f'{self.x!r}, {self.y!r}':.40}; use whole pixels, {MAX_FAR} at most either way")
        shown = self.transform
        if not all(isinstance(side, int) and 0 <= side <= MAX_FAR for side in (shown.width, shown.height)) or not _is_finite(shown.rotation):
            found = f"is shown at {shown.width!r:.40} x {shown.height!r:.40} pixels, turned by {shown.rotation!r:.40}"
            raise ValueError(f"layer {self.name!r} {found}; use sizes of 0 to {MAX_FAR} whole pixels and a finite rotation")
        _, _, width, height = self.bounds
        if width * height > MAX_AREA:
            raise ValueError(f"layer {self.name!r} is shown at {width} x {height} pixels; use at most {MAX_AREA >> 20} x 2**20 in all")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) at which it is shown, before it is turned."""
        return self.transform.width or self.image.shape[1], self.transform.height or self.image.shape[0]

    @property
    def bounds(self) -> Box:
        """The pixels of the canvas that it can touch."""
        (width, height), angle = self.size, self.transform.rotation
        quarters = angle / (pi / 2)
        if abs(quarters - round(quarters)) < 1e-6:
            if round(quarters) % 2:
                return self.x + (width - height) // 2, self.y + (height - width) // 2, height, width
            return self.x, self.y, width, height
        half_x = (abs(width * cos(angle)) + abs(height * sin(angle))) / 2
        half_y = (abs(width * sin(angle)) + abs(height * cos(angle))) / 2
        centre_x, centre_y = self.x + width / 2, self.y + height / 2
        left, top = floor(centre_x - half_x), floor(centre_y - half_y)
        return left, top, ceil(centre_x + half_x) - left, ceil(centre_y + half_y) - top

    def baked(self, window: Box | None = None) -> Layer:
        """The same layer without a transform. Flips and quarter turns move pixels, everything else interpolates premultiplied colours.

        window: the part of its bounds that is needed; the layer that comes back has at least that.
        """
        if self.transform == Transform():
            return self
        window = window if window is not None and _turned_freely(self.transform.rotation) else self.bounds
        image = self.image.movedim(-1, 0)
        if (image.shape[2], image.shape[1]) == self.size and not _turned_freely(self.transform.rotation):
            shown = self._moved(image, window)
        else:
            premultiplied = self._moved(torch.cat([image[:3] * image[3:], image[3:]]), window)
            alpha = premultiplied[3:].clamp(0, 1)
            colour = torch.where(alpha > 1e-6, premultiplied[:3] / alpha.clamp_min(1e-6), 0).clamp(0, 1)
            shown = torch.cat([colour, alpha])
        mask = None if self.mask is None else self._moved(self.mask[None], window)[0].clamp(0, 1)
        return replace(self, image=shown.movedim(0, -1), mask=mask, x=window[0], y=window[1], transform=Transform())

    def _moved(self, x: Tensor, window: Box) -> Tensor:
        """Channels first, through the transform; if turned freely, only the window."""
        axes = [axis for axis, flip in ((-1, self.transform.flip_h), (-2, self.transform.flip_v)) if flip]
        x = x.flip(axes)
        if (x.shape[2], x.shape[1]) != self.size:
            x = resize(x, self.size)
        if not _turned_freely(self.transform.rotation):
            return x.rot90(-round(self.transform.rotation / (pi / 2)), (-2, -1))
        left, top, width, height = window
        centre = self.x + self.size[0] / 2 - left, self.y + self.size[1] / 2 - top
        down, right = torch.meshgrid(
            torch.arange(height, device=x.device) + 0.5 - centre[1], torch.arange(width, device=x.device) + 0.5 - centre[0], indexing="ij"
        )
        c, s = cos(self.transform.rotation), sin(self.transform.rotation)
        source = torch.stack([(right * c + down * s) * 2 / self.size[0], (down * c - right * s) * 2 / self.size[1]], -1)
        return F.grid_sample(x[None], source[None].to(x), align_corners=False)[0]


def _brief(value: Any) -> str:
    """In a message, on one line."""
    return " ".join(repr(value).split())[:40]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # not isfinite, which fails for whole numbers beyond all floats


def _finite(x: Tensor) -> bool:
    return all(isfinite(end) for end in x.aminmax())


def _turned_freely(rotation: float) -> bool:
    quarters = rotation / (pi / 2)
    return abs(quarters - round(quarters)) >= 1e-6


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that are blended together. `pass-through` does not isolate them: they see what lies below the group."""

    name: str
    layers: tuple[Layer | Group, ...] = ()
    opacity: float = 1.0
    blend_mode: str = PASS_THROUGH
    visible: bool = True

    def __post_init__(self) -> None:
        _check(self, "group", (PASS_THROUGH, *MODES))
        if self.depth > MAX_DEPTH:
            raise ValueError(f"group {self.name!r} holds groups in groups, {self.depth} deep; use at most {MAX_DEPTH}")

    @property
    def depth(self) -> int:
        """1, or more where groups are in it."""
        return 1 + max((node.depth for node in self.layers if isinstance(node, Group)), default=0)


Node = Layer | Group


@dataclass(frozen=True, eq=False)
class Document:
    """A canvas in pixels and what lies on it, bottom to top. Layers may reach beyond the canvas, or miss it."""

    width: int
    height: int
    layers: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in (self.width, self.height)):
            raise ValueError(f"the canvas is {f'{self.width!r} x {self.height!r}':.40}; use 1 to {MAX_SIDE} whole pixels a side")

    def walk(self) -> Iterator[tuple[tuple[Group, ...], Layer]]:
        """Every layer with the groups around it, outermost first, bottom to top."""
        yield from _walk(self.layers, ())

    def map(self, change: Callable[[Layer], Layer]) -> Document:
        """The document with every layer changed, groups as they are."""
        return replace(self, layers=_mapped(self.layers, change))


def _walk(nodes: tuple[Node, ...], groups: tuple[Group, ...]) -> Iterator[tuple[tuple[Group, ...], Layer]]:
    for node in nodes:
        if isinstance(node, Group):
            yield from _walk(node.layers, (*groups, node))
        else:
            yield groups, node


def _mapped(nodes: tuple[Node, ...], change: Callable[[Layer], Layer]) -> tuple[Node, ...]:
    return tuple(replace(node, layers=_mapped(node.layers, change)) if isinstance(node, Group) else change(node) for node in nodes)


def _check(node: Node, kind: str, modes: Any) -> None:
    if not isinstance(node.name, str):
        raise ValueError(f"a {kind} has {_brief(node.name)} as its name; use text")
    if len(node.name) > MAX_NAME or _NO_TEXT.search(node.name):
        raise ValueError(f"{kind} name {node.name[:40]!r} is too long or has control characters; use at most {MAX_NAME} printable ones")
    if not _is_finite(node.opacity) or not 0 <= node.opacity <= 1:
        raise ValueError(f"{kind} {node.name!r} has opacity {_brief(node.opacity)}; use 0 to 1")
    if not isinstance(node.visible, bool):
        raise ValueError(f"{kind} {node.name!r} has visible {_brief(node.visible)}; use true or false")
    if not isinstance(node.blend_mode, str) or node.blend_mode not in modes:
        raise ValueError(f"{kind} {node.name!r} has blend mode {_brief(node.blend_mode)}; use one of {', '.join(modes)}")


def clean_name(text: str) -> str:
    """A text as a layer may be named: control characters become spaces, and it is cut to length."""
    return _NO_TEXT.sub(" ", text).strip()[:MAX_NAME]


def rgba(image: Tensor) -> Tensor:
    """`(height, width, 1, 3 or 4)` -> float32 `(height, width, 4)` in 0..1, opaque where there was no alpha: itself, if it is that already.

    Raises ValueError.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"the image is {tuple(image.shape)} (height, width, channels); use 1, 3 or 4 channels")
    image = image.float()
    if image.shape[2] != 4:
        return torch.cat([image.expand(-1, -1, 3), torch.ones_like(image[..., :1])], -1).clamp_(0, 1)
    if not image.numel():
        return image
    low, high = image.aminmax()
    return image if low >= 0 and high <= 1 else image.clamp(0, 1)


# The blend modes of ComfyUI 0.33's LAYERS (comfy_api/latest/_io.py), and what stands in for the others there.
_CORE_HAS_NOT = {"dissolve": "normal", "darker-color": "darken", "lighter-color": "lighten"}


def from_core(layers: Mapping[str, Any]) -> Document:
    """ComfyUI's `LAYERS` -> a document. A batch becomes consecutive layers; masks are 1 where transparent there. Raises ValueError."""
    if not isinstance(layers, Mapping) or layers.get("version", 1) != 1:
        raise ValueError("layers is not a LAYERS document of version 1; connect Layers from Images, Load Layers or Add Layer")
    items = layers.get("layers") or []
    if not isinstance(items, list | tuple) or not all(isinstance(item, Mapping) for item in items):
        raise ValueError("layers has items that are no layers; connect Layers from Images, Load Layers or Add Layer")
    entries: list[tuple[tuple[Mapping[str, Any], ...], Layer]] = []
    for item in sorted(items, key=lambda item: _number(item, "z_index", 0)):
        if item.get("type", "raster") != "raster":
            raise ValueError(f"layers has an item of type {_brief(item['type'])}; only raster layers can be used")
        ours = item.get(_OURS)
        ours = ours if isinstance(ours, Mapping) else {}
        exact = {**item, **ours}
        *theirs, kept = ours.get("kept", (None, None, None))
        untouched = theirs[0] is item.get("image") and theirs[1] is item.get("mask")
        images = _pictures(item, "image", 4, "height, width, channels")  # core skips an item without a picture
        masks = _pictures(item, "mask", 3, "height, width")
        given_name = _text(item, "name", "")
        for index, picture in enumerate(images):
            name = clean_name(given_name) or f"Layer {len(entries) + 1}"
            mask = kept.mask if untouched else None
            if not untouched and len(masks) and (len(masks) == 1 or index < len(masks)):
                mask = 1 - masks[index if len(masks) > 1 else 0].float().clamp(0, 1)
                if mask.shape != picture.shape[:2]:
                    mask = F.interpolate(mask[None, None], picture.shape[:2], mode="bilinear")[0, 0]
            width, height = (max(int(_number(item, side, 0)), 0) for side in "wh")
            transform = Transform(
                width if width != picture.shape[1] else 0,
                height if height != picture.shape[0] else 0,
                float(_number(item, "rotation", 0)),
                bool(item.get("flip_h")),
                bool(item.get("flip_v")),
            )
            layer = Layer(
                name if len(images) == 1 or not given_name else f"{name} {index + 1}"[-MAX_NAME:],
                kept.image if untouched else rgba(picture),
                int(_number(item, "x", 0)),
                int(_number(item, "y", 0)),
                float(_number(exact, "opacity", 1)),
                _text(exact, "blend_mode", "normal"),
                bool(exact.get("visible", True)),
                mask,
                transform,
                kept.checked if untouched else (),
            )
            entries.append((tuple(ours.get("groups", ())), layer))
    canvas = layers.get("canvas") or _extent([layer for _, layer in entries])
    if not isinstance(canvas, list | tuple) or len(canvas) != 2 or not all(map(_is_number, canvas)):
        raise ValueError(f"layers has the canvas {canvas!r:.40}; use a width and a height in pixels")
    return Document(int(canvas[0]), int(canvas[1]), _grouped(entries))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and abs(value) < 1e300  # type: ignore[operator]  # NumPy's are Real; isfinite fails for huge whole ones


def _name(item: Mapping[str, Any]) -> str:
    """As messages say it."""
    return f"{item['name']!r:.40}" if item.get("name") else "without a name"


def _number(item: Mapping[str, Any], key: str, default: float) -> float:
    value: float | None = item.get(key)
    if value is None:
        return default
    if not _is_number(value):
        raise ValueError(f"layers has an item {_name(item)} with {key} {value!r:.40}; use a number")
    return value


def _text(item: Mapping[str, Any], key: str, default: str) -> str:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"layers has an item {_name(item)} with {key} {value!r:.40}; use a text")
    return value or default


def _pictures(item: Mapping[str, Any], key: str, axes: int, names: str) -> Tensor | tuple[()]:
    """A batch of `axes` axes, or nothing."""
    value = item.get(key)
    if value is None:
        return ()
    if not isinstance(value, Tensor) or value.ndim != axes or (len(value) and not min(value.shape)):
        found = tuple(value.shape) if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"layers has an item {_name(item)} with the {key} {found}; use one of (batch, {names})")
    return value


def _extent(layers: list[Layer]) -> tuple[int, int]:
    """As far right and down as the layers reach: what ComfyUI takes where no canvas is given."""
    boxes = [layer.bounds for layer in layers]
    return max([1, *(x + width for x, _, width, _ in boxes)]), max([1, *(y + height for _, y, _, height in boxes)])


def _grouped(entries: list[tuple[tuple[Mapping[str, Any], ...], Layer]], depth: int = 0) -> tuple[Node, ...]:
    """Consecutive layers of one group become that group again."""
    nodes: list[Node] = []
    while entries:
        groups, layer = entries[0]
        if len(groups) <= depth:
            nodes.append(layer)
            entries = entries[1:]
            continue
        group = groups[depth]
        count = next((i for i, (other, _) in enumerate(entries) if len(other) <= depth or other[depth]["id"] != group["id"]), len(entries))
        inside = _grouped(entries[:count], depth + 1)
        nodes.append(Group(group["name"], inside, group["opacity"], group["blend_mode"], group["visible"]))
        entries = entries[count:]
    return tuple(nodes)


def to_core(document: Document) -> dict[str, Any]:
    """A document -> ComfyUI's `LAYERS`, which shares its pictures; only the masks, which are the other way round there, are made anew.

    Groups, the three modes that it has not, and pictures and masks as they are travel beside it, under the key `tessera` of an item, and
    come back by `from_core`; other nodes see the nearest that there is: opacities of groups multiplied, hidden groups hidden, another mode.
    Empty groups are dropped.
    """
    items: list[dict[str, Any]] = []
    ids: dict[int, str] = {}  # of groups; unique, because documents may be joined
    for index, (groups, layer) in enumerate(document.walk()):
        item: dict[str, Any] = {"image": layer.image[None], "type": "raster", "x": layer.x, "y": layer.y, "z_index": index, "name": layer.name}
        opacity = layer.opacity
        for group in groups:
            opacity *= group.opacity
        item |= {"opacity": opacity, "blend_mode": _CORE_HAS_NOT.get(layer.blend_mode, layer.blend_mode)}
        item["visible"] = layer.visible and all(group.visible for group in groups)
        if layer.mask is not None:
            item["mask"] = 1 - layer.mask[None]
        shown = layer.transform
        item |= {"w": layer.size[0], "h": layer.size[1], "rotation": shown.rotation, "flip_h": shown.flip_h, "flip_v": shown.flip_v}
        item[_OURS] = {"kept": (item["image"], item.get("mask"), layer)}  # ours count for as long as the others are in their place
        if groups or layer.blend_mode in _CORE_HAS_NOT:
            path = [
                {"id": ids.setdefault(id(group), uuid4().hex)}
                | {"name": group.name, "opacity": group.opacity, "blend_mode": group.blend_mode, "visible": group.visible}
                for group in groups
            ]
            item[_OURS] |= {"groups": path, "blend_mode": layer.blend_mode, "opacity": layer.opacity, "visible": layer.visible}
        items.append(item)
    return {"version": 1, "canvas": (document.width, document.height), "layers": items}
