"""A document's layers over one another, layer by layer and only where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from .blend import MODES, PASS_THROUGH, to_linear, to_srgb
from .document import Box, Document, Group, Layer, Node

_SQUARE = 512  # side of dissolve's pattern, in pixels

OnLayer = Callable[[int, int], None]
"""(done, total) in layers, before each one that is drawn or written, those in groups too; what it raises ends the work."""


def announcer(on_layer: OnLayer | None, total: int) -> Callable[[], None]:
    """To be called before each of `total` layers."""
    done = count()
    return (lambda: None) if on_layer is None else (lambda: on_layer(next(done), total))


def composite(document: Document, *, linear: bool = False, device: torch.device | None = None, on_layer: OnLayer | None = None) -> Tensor:
    """The visible layers over one another: float32 `(height, width, 4)`, sRGB, straight alpha, on the CPU.

    linear: blend in linear light instead of on sRGB values (which is what Photoshop and Krita do). Memory: the canvas, a copy of it for
    each open isolated group, and the box of one layer. on_layer: see `OnLayer`; hidden layers and those beyond the canvas do not count.
    """
    canvas = torch.zeros(document.height, document.width, 4, device=device)
    seen = [layer for groups, layer in document.walk() if all(map(_shows, groups)) and _shows(layer) and _clipped(layer.bounds, canvas, (0, 0))]
    _draw(canvas, (0, 0), document.layers, linear, announcer(on_layer, len(seen)))
    out = straight(canvas)
    if linear:
        out[..., :3] = to_srgb(out[..., :3])
    return out.clamp_(0, 1).cpu()


def without_faint_groups(document: Document) -> tuple[Document, list[str]]:
    """Without pass-through groups below full opacity, which not every format has; it looks the same. And a line about each one.

    A group of normal layers only, or one beyond the canvas, may as well be a normal group. Any other becomes one normal layer, of the colours
    that its layers take on over what lies below them now: without what does not show or lies beyond the canvas, which its line says.
    """
    notes: list[str] = []
    canvas = torch.zeros(document.height, document.width, 4)
    return replace(document, layers=_without_faint(document.layers, canvas, notes)), notes


def _without_faint(nodes: tuple[Node, ...], canvas: Tensor, notes: list[str]) -> tuple[Node, ...]:
    """canvas: what lies below the nodes; they are drawn onto it."""
    out: list[Node] = []
    for node in nodes:
        new: Node = node
        if isinstance(node, Group):
            through = node.blend_mode == PASS_THROUGH
            if not through or node.opacity == 1:
                new = replace(node, layers=_without_faint(node.layers, canvas.clone() if through else torch.zeros_like(canvas), notes))
            elif _all_normal(node) or _beyond(node, canvas):
                new = replace(node, blend_mode="normal", layers=_without_faint(node.layers, torch.zeros_like(canvas), notes))
                notes.append(f"{node.name}: a group that passed through at opacity {node.opacity:.2g} is a normal one, which looks the same")
            else:
                new = _as_layer(node, canvas)
                cut = ["what lay beyond the canvas"] if new.bounds != _bounds(node) else []
                lost = " and ".join([*cut, *(["its layers that do not show"] if _hides(node) else [])])
                notes.append(
                    f"{node.name}: a group that passed through at opacity {node.opacity:.2g} is one layer now{f', without {lost}' if lost else ''}"
                )
        out.append(new)
        _draw(canvas, (0, 0), (node,), False, lambda: None)
    return tuple(out)


def _all_normal(group: Group) -> bool:
    """Whether nothing in it looks at what is below."""
    return all(node.blend_mode in ("normal", "dissolve", PASS_THROUGH) and (isinstance(node, Layer) or _all_normal(node)) for node in group.layers)


def _beyond(group: Group, canvas: Tensor) -> bool:
    """Whether none of its layers is on the canvas."""
    return all(_beyond(node, canvas) if isinstance(node, Group) else _clipped(node.bounds, canvas, (0, 0)) is None for node in group.layers)


def _hides(group: Group) -> bool:
    """Whether something in it does not show."""
    return any(not _shows(node) or (isinstance(node, Group) and _hides(node)) for node in group.layers)


def _as_layer(group: Group, canvas: Tensor) -> Layer:
    """What of it is on the canvas, which is something. Its alpha does not depend on what is below; its colour is what it adds to that."""
    box = _clipped(_bounds(group), canvas, (0, 0))
    assert box is not None
    x, y, width, height = box
    below = canvas[y : y + height, x : x + width]
    over, alone = below.clone(), torch.zeros_like(below)
    for part in (over, alone):
        _draw(part, (x, y), group.layers, False, lambda: None)
    alpha = alone[..., 3:]
    picture = straight(torch.cat([over[..., :3] - (1 - alpha) * below[..., :3], alpha], -1))
    return Layer(group.name, picture, x, y, group.opacity, "normal", group.visible)


def _shows(node: Node) -> bool:
    return node.visible and node.opacity > 0


def _draw(canvas: Tensor, origin: tuple[int, int], nodes: tuple[Node, ...], linear: bool, before: Callable[[], None]) -> None:
    """Nodes onto a premultiplied canvas whose upper left pixel is at `origin` of the document. before: called for each layer."""
    for node in filter(_shows, nodes):
        box = _clipped(_bounds(node), canvas, origin)
        if box is None:
            continue
        x, y, width, height = box
        part = canvas[y - origin[1] : y - origin[1] + height, x - origin[0] : x - origin[0] + width]
        if isinstance(node, Layer):
            before()
            colour, alpha = _source(node, box, linear, canvas.device)
        elif node.blend_mode == PASS_THROUGH:
            old = part.clone() if node.opacity < 1 else None
            _draw(part, (x, y), node.layers, linear, before)
            if old is not None:
                part.copy_(old.lerp(part, node.opacity))
            continue
        else:
            group = torch.zeros_like(part)
            _draw(group, (x, y), node.layers, linear, before)
            colour, alpha = straight(group).split([3, 1], -1)
        alpha = alpha * node.opacity
        if node.blend_mode == "dissolve":
            alpha = _dissolved(alpha, box, _bounds(node))
        _paint(part, colour, alpha, node.blend_mode)


def _bounds(node: Node) -> Box:
    if isinstance(node, Layer):
        return node.bounds
    boxes = [_bounds(inner) for inner in node.layers]
    left, top = min((x for x, _, _, _ in boxes), default=0), min((y for _, y, _, _ in boxes), default=0)
    right, bottom = max((x + w for x, _, w, _ in boxes), default=0), max((y + h for _, y, _, h in boxes), default=0)
    return left, top, right - left, bottom - top


def _clipped(box: Box, canvas: Tensor, origin: tuple[int, int]) -> Box | None:
    left, top = max(box[0], origin[0]), max(box[1], origin[1])
    right, bottom = min(box[0] + box[2], origin[0] + canvas.shape[1]), min(box[1] + box[3], origin[1] + canvas.shape[0])
    return (left, top, right - left, bottom - top) if left < right and top < bottom else None


def _source(layer: Layer, box: Box, linear: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Colour and alpha (mask included, opacity not) of a layer in a box of the document."""
    layer = layer.baked(box)
    rows = slice(box[1] - layer.y, box[1] - layer.y + box[3])
    columns = slice(box[0] - layer.x, box[0] - layer.x + box[2])
    picture = layer.image[rows, columns].to(device)
    alpha = picture[..., 3:]
    if layer.mask is not None:
        alpha = alpha * layer.mask[rows, columns, None].to(device)
    return (to_linear(picture[..., :3]) if linear else picture[..., :3]), alpha


def _dissolved(alpha: Tensor, box: Box, bounds: Box) -> Tensor:
    """Pixels fully there with a chance of alpha. The pattern, a square again and again, moves with the node, and is the same in every run."""
    chance = torch.rand(_SQUARE, _SQUARE, generator=torch.Generator().manual_seed(0))
    rows, columns = ((torch.arange(box[axis + 2]) + box[axis] - bounds[axis]) % _SQUARE for axis in (1, 0))
    return (chance[rows[:, None], columns, None].to(alpha.device) < alpha).to(alpha.dtype)


def _paint(canvas: Tensor, colour: Tensor, alpha: Tensor, blend_mode: str) -> None:
    """W3C section 10: the part of the source over the backdrop is blended, the part beside it is the source. In place, premultiplied."""
    below = canvas[..., 3:]
    if blend_mode not in ("normal", "dissolve"):
        colour = (1 - below) * colour + below * MODES[blend_mode](straight(canvas)[..., :3], colour)
    canvas.mul_(1 - alpha)
    canvas[..., :3].add_(colour * alpha)
    canvas[..., 3:].add_(alpha)


def straight(premultiplied: Tensor) -> Tensor:
    """`(..., 4)` with colours times alpha -> colours as they are, in 0..1; black where alpha is 0."""
    alpha = premultiplied[..., 3:]
    colour = torch.where(alpha > 0, premultiplied[..., :3] / alpha.clamp_min(1e-12), 0)
    return torch.cat([colour.clamp(0, 1), alpha], -1)


def on_checkerboard(picture: Tensor, cell: int = 8) -> Tensor:
    """`(height, width, 4)` over grey squares, as editors show transparency -> `(height, width, 3)`."""
    rows, columns = (torch.arange(side, device=picture.device) // cell for side in picture.shape[:2])
    squares = torch.where((rows[:, None] + columns) % 2 == 0, 0.8, 0.6)[..., None]
    return picture[..., :3] * picture[..., 3:] + squares * (1 - picture[..., 3:])


def thumbnails(document: Document, layers: Sequence[Layer], side: int = 256, *, on_layer: OnLayer | None = None) -> Tensor:
    """The composite, then each of these layers of it alone where it lies, hidden ones too, on a checkerboard: `(1 + layers, height, width, 3)`.

    The longer side of the canvas is shown at `side` pixels at most. on_layer: see `OnLayer`; every layer of the document counts.
    """
    scale = min(side / max(document.width, document.height), 1.0)
    every = [layer for _, layer in document.walk()]
    small: dict[int, Layer] = {}
    for done, layer in enumerate(every):
        if on_layer is not None:
            on_layer(done, len(every))
        width, height = (max(round(pixels * scale), 1) for pixels in layer.size)
        x, y = round(layer.x * scale), round(layer.y * scale)
        # Four pixels a side for one are enough to shrink from, and a large picture takes a tenth of the time.
        thin = slice(None, None, max(min(layer.image.shape[0] // height, layer.image.shape[1] // width) // 4, 1))
        image, mask = layer.image[thin, thin], None if layer.mask is None else layer.mask[thin, thin]
        transform = replace(layer.transform, width=width, height=height)
        small[id(layer)] = replace(layer, image=image, mask=mask, x=x, y=y, transform=transform).baked()
    canvas = replace(document, width=max(round(document.width * scale), 1), height=max(round(document.height * scale), 1))
    alone = [replace(canvas, layers=(replace(small[id(layer)], visible=True),)) for layer in layers]
    return torch.stack([on_checkerboard(composite(one)) for one in (canvas.map(lambda layer: small[id(layer)]), *alone)])
