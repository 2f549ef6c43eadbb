"""Photoshop files (PSD, and PSB up to PSD's sides) -> a document, through `psd-tools`. What cannot be read is named, a line each.

The parser's records are read, not its pixels: it counts in 4 to 8 times a layer's bytes, and keeps a user's mask beside a vector mask to itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError
from . import compare, profiles
from .blend import MODES
from .document import Box, Document, Group, Layer, Node, clean_name
from .pixels import MAX_PIXELS, check_pixels, decoding, eight_bit
from .psd import BLEND_KEYS, psd_tools

_KIND = "a Photoshop file"
_MODES = {key: mode for mode, key in BLEND_KEYS.items()}
# Whose fill opacity is not an opacity: Photoshop mixes the source with the mode's neutral colour, or fades it, before it blends.
_FILL_MODES = {"color-burn", "linear-burn", "color-dodge", "linear-dodge", "vivid-light", "linear-light", "hard-mix", "difference"}
_TRANSPARENCY, _MASK, _USER_MASK = -1, -2, -3  # channels of a layer; the third is there where the second is drawn of it and of a vector mask


def read(file: Path) -> tuple[Document, list[str]]:
    """The document, and what was left out or looks different. RGB and grey of 8 or 16 bits. Raises FileError, and ValueError without the name."""
    tools = psd_tools()
    from psd_tools.compression import PSDDecompressionWarning
    from psd_tools.constants import CompatibilityMode

    with warnings.catch_warnings():  # psd-tools would warn and give black for a channel that it cannot unpack
        warnings.simplefilter("error", PSDDecompressionWarning)
        with decoding(file.name, _KIND):
            psd = tools.PSDImage.open(file)
            psd.compatibility_mode = CompatibilityMode.CLIP_STUDIO_PAINT  # the default hides that a group is clipped
        return _Reader(psd, file.name).document()


class _Reader:
    def __init__(self, psd: Any, name: str):
        self.psd, self.name = psd, name
        self.notes: list[str] = []
        self.channels = {"RGB": 3, "GRAYSCALE": 1}.get(psd.color_mode.name, 0)
        self.convert: profiles.Convert | None = None

    def document(self) -> tuple[Document, list[str]]:
        """See `read`."""
        psd = self.psd
        if not self.channels or psd.depth not in (8, 16):
            raise ValueError(f"it is {psd.color_mode.name} with {psd.depth} bits a channel; convert it to RGB with 8 or 16")
        document = Document(psd.width, psd.height)  # refuses other sizes before anything is unpacked
        with decoding(self.name, _KIND):
            pixels = sum(_pixels_of(item) for item in psd.descendants())
            self._look_at_profile()
        check_pixels(pixels if len(psd) else self._merged_pixels())
        if psd.depth == 16:
            self.notes.append("its 16 bits a channel become 8 where the layers are saved")
        if extra := psd.channels - self.channels - (self._alpha() is not None):
            self.notes.append(f"its extra channels (saved selections or spot colours) are not read: {extra}")
        if len(psd):
            document = Document(psd.width, psd.height, self._nodes(psd))
            self._compare(document)
        else:
            document = Document(psd.width, psd.height, self._flattened())
        return document, self.notes

    def _look_at_profile(self) -> None:
        from psd_tools.constants import Resource

        profile = self.psd.image_resources.get_data(Resource.ICC_PROFILE)
        if not isinstance(profile, bytes):
            return
        try:
            self.convert, name = profiles.to_srgb(profile, self.channels)
        except ValueError as error:
            self.notes.append(f"{error}; the values are taken as sRGB")
            return
        if self.convert is not None:
            with_loss = ", in 8 bits a channel" if self.psd.depth == 16 else ""
            self.notes.append(f"its colours are converted from {clean_name(name)!r} to sRGB{with_loss}; edges and blend modes may shift a little")

    # The merged picture

    def _alpha(self) -> int | None:
        """The merged picture's channel of transparency."""
        from psd_tools.api.utils import get_transparency_index, has_transparency

        if not has_transparency(self.psd):
            return None
        index = get_transparency_index(self.psd)
        return index if index >= self.channels else self.channels

    def _merged(self, step: int) -> Tensor | None:
        """Every step-th pixel of it, over white, with alpha where it has any; None where it does not unpack."""
        psd = self.psd
        try:
            data = psd._record.image_data.get_data(psd._record.header, False)
        except (ValueError, IndexError, OSError, Warning):
            return None
        every = np.frombuffer(data, _dtype(psd.depth)).reshape(psd.channels, psd.height, psd.width)[:, ::step, ::step]
        picture = self._in_srgb(every[: self.channels].transpose(1, 2, 0))
        index = self._alpha()
        if index is None:
            return picture
        alpha = _float(every[index, ..., None])
        return torch.cat([picture.maximum(1 - alpha), alpha], -1)  # no darker than the paper lets it be: some leave black where nothing is

    def _merged_pixels(self) -> int:
        return int(self.psd.width * self.psd.height * ceil(self.psd.channels / 4))  # all channels are unpacked

    def _compare(self, document: Document) -> None:
        if not self.psd.has_preview():
            self.notes.append("no merged picture is in it to check the layers against")
            return
        if self._merged_pixels() > MAX_PIXELS:
            self.notes.append("its merged picture is too large to check the layers against")
            return
        with decoding(self.name, _KIND):
            merged = self._merged(compare.stride(document.width, document.height))
        if merged is None:
            self.notes.append("its merged picture is damaged, and the layers could not be checked against it")
        elif found := compare.difference(document, merged):
            self.notes.append(found)

    def _flattened(self) -> tuple[Node, ...]:
        """The merged picture as a layer, unless nothing is on it."""
        with decoding(self.name, _KIND):
            merged = self._merged(1)
        if merged is None:
            raise ValueError("it has no layers, and its merged picture does not unpack; make or download it again")
        if merged.shape[2] == 3:
            picture = torch.cat([merged, torch.ones_like(merged[..., :1])], -1)
        else:  # off the white paper again
            alpha = merged[..., 3:]
            picture = torch.cat([torch.where(alpha > 0, (merged[..., :3] - 1 + alpha) / alpha.clamp_min(1e-12), 0).clamp(0, 1), alpha], -1)
        if not picture[..., 3].any():
            return ()
        self.notes.append("it has no layers; its merged picture is read as one")
        return (Layer("Background", picture),)

    # Layers

    def _nodes(self, parent: Any) -> tuple[Node, ...]:
        nodes: list[Node] = []
        for item in parent:
            with decoding(self.name, _KIND):
                name, mode, visible = clean_name(item.name), _MODES[item.blend_mode.value], bool(item.visible)
                opacity = item.opacity / 255 * (item.fill_opacity / 255)
                self.notes += [f"{name}: {what}" for what in _unread(item, mode)]
                there = not item.is_group() and item.has_pixels() and _area(_box(item._record))
                picture, mask = (self._picture(item), self._mask(item)) if there else (None, None)
            if item.is_group():
                inside = self._nodes(item)
                nodes.append(Group(name, self._on_artboard(item, inside) if item.kind == "artboard" else inside, opacity, mode, visible))
            elif picture is None:
                self.notes.append(f"{name}: a layer of kind {item.kind} without pixels is left out")
            else:
                left, top, _, _ = _box(item._record)
                nodes.append(
                    Layer(name, picture, left, top, opacity, mode if mode in MODES else "normal", visible, mask)
                )  # pass-through is for groups
        return tuple(nodes)

    def _plane(self, item: Any, number: int, box: Box) -> np.ndarray | None:
        """One channel of a layer, `(height, width)` as stored; None where it is not stored."""
        psd = self.psd
        for info, channel in zip(item._record.channel_info, item._channels, strict=False):
            if info.id == number and channel.data and _area(box):
                try:
                    data = channel.get_data(box[2], box[3], psd.depth, psd.version)
                except (ValueError, IndexError, OSError, Warning) as error:
                    raise self._damaged(item) from error
                return np.frombuffer(data, _dtype(psd.depth)).reshape(box[3], box[2])
        return None

    def _damaged(self, item: Any) -> FileError:
        return FileError(f"{self.name} cannot be read: the pixels of {clean_name(item.name)!r} are damaged; make or download it again")

    def _picture(self, item: Any) -> Tensor:
        box = _box(item._record)
        planes = [self._plane(item, number, box) for number in range(self.channels)]
        colours = [plane for plane in planes if plane is not None]
        if len(colours) < len(planes):
            raise self._damaged(item)
        image = torch.ones(box[3], box[2], 4)
        image[..., :3] = self._in_srgb(np.stack(colours, -1))
        alpha = self._plane(item, _TRANSPARENCY, box)
        if alpha is not None:
            image[..., 3] = _float(alpha)
        return image

    def _in_srgb(self, pixels: np.ndarray) -> Tensor:
        """`(height, width, 1 or 3)` as stored -> float32 `(height, width, 3)`."""
        if self.convert is None:
            return _float(pixels).expand(-1, -1, 3)
        return _float(self.convert(np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else eight_bit(_float(pixels)))))

    def _mask(self, item: Any) -> Tensor | None:
        """The user's mask; for a layer with a vector mask, what Photoshop has drawn of both, unless a shape's alpha has it already."""
        data = item._record.mask_data
        if data is None:
            return None
        number, box, beyond, off = _MASK, _box(data), data.background_color, data.flags.mask_disabled
        density = data.parameters and data.parameters.user_mask_density
        if data.flags.user_mask_from_render:
            both = _both(data)
            if item.kind == "shape" and both:
                number, box, beyond, off = _USER_MASK, _real_box(data), data.real_background_color, data.real_flags.mask_disabled
            else:
                off, density = item.kind == "shape", None if both else data.parameters and data.parameters.vector_mask_density
        if off:
            return None
        left, top, width, height = _box(item._record)
        mask = torch.full((height, width), beyond / 255)
        stored = self._plane(item, number, box)
        if stored is None and beyond == 255:
            return None
        if stored is not None:
            over = _common(box, (left, top, width, height))
            part = stored[over[1] - box[1] : over[1] - box[1] + over[3], over[0] - box[0] : over[0] - box[0] + over[2]]
            mask[over[1] - top : over[1] - top + over[3], over[0] - left : over[0] - left + over[2]] = _float(part)
        return mask if density is None else 1 - (1 - mask) * (density / 255)

    def _on_artboard(self, item: Any, inside: tuple[Node, ...]) -> tuple[Node, ...]:
        """An artboard's layers with its colour as one below them, cut at its edges by masks."""
        with decoding(self.name, _KIND):
            (left, top, right, bottom), colour = item.bbox, _artboard_colour(item)
            board = (left, top, right - left, bottom - top)
            inside = tuple(_cut(node, board) for node in inside)
            over = _common(board, (0, 0, self.psd.width, self.psd.height))
            if colour is None or not _area(over):
                return inside
        paper = torch.tensor([*colour, 1.0]).expand(over[3], over[2], 4).contiguous()
        return (Layer("Artboard", paper, over[0], over[1]), *inside)


def _dtype(depth: int) -> str:
    return ">u2" if depth == 16 else "u1"


def _float(stored: np.ndarray) -> Tensor:
    """8 or 16 bits as stored -> float32 in 0..1."""
    out = np.empty(stored.shape, np.float32)
    return torch.from_numpy(np.divide(stored, np.float32(np.iinfo(stored.dtype).max), out=out, casting="unsafe"))


def _box(record: Any) -> Box:
    """Of a layer's record or of its mask's."""
    return record.left, record.top, max(record.right - record.left, 0), max(record.bottom - record.top, 0)


def _real_box(data: Any) -> Box:
    return data.real_left, data.real_top, max(data.real_right - data.real_left, 0), max(data.real_bottom - data.real_top, 0)


def _both(data: Any) -> bool:
    """Whether a mask that is drawn of a vector mask holds a user's mask too. An empty white one is left where that was removed."""
    return data.real_flags is not None and (_area(_real_box(data)) > 0 or data.real_background_color != 255)


def _area(box: Box) -> int:
    return box[2] * box[3]


def _common(a: Box, b: Box) -> Box:
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2], b[0] + b[2]), min(a[1] + a[3], b[1] + b[3])
    return left, top, max(right - left, 0), max(bottom - top, 0)


def _pixels_of(item: Any) -> int:
    """Those of its picture, or of its masks if they are larger."""
    if item.is_group():
        return 0
    data = item._record.mask_data
    masks = [] if data is None else [_box(data)] if data.real_flags is None else [_box(data), _real_box(data)]
    return max(_area(box) for box in (_box(item._record), *masks))


def _artboard_colour(item: Any) -> tuple[float, float, float] | None:
    """None where it is transparent. By Photoshop's own files the numbers are white, black, transparent, own colour; psd-tools has others."""
    from psd_tools.constants import Tag

    blocks = [item.tagged_blocks.get_data(tag) for tag in (Tag.ARTBOARD_DATA1, Tag.ARTBOARD_DATA2, Tag.ARTBOARD_DATA3)]
    data = [block for block in blocks if block is not None][-1]
    kind, own = int(data.get(b"artboardBackgroundType", 3)), data.get(b"Clr ")
    if kind == 4 and own is not None:
        red, green, blue = (min(max(float(own.get(key, 0)) / 255, 0.0), 1.0) for key in (b"Rd  ", b"Grn ", b"Bl  "))
        return red, green, blue
    return {1: (1.0, 1.0, 1.0), 2: (0.0, 0.0, 0.0)}.get(kind)


def _cut(node: Node, board: Box) -> Node:
    """The node with what lies outside the board masked."""
    if isinstance(node, Group):
        return replace(node, layers=tuple(_cut(inner, board) for inner in node.layers))
    shown = _common(board, node.bounds)
    if shown == node.bounds:
        return node
    mask = torch.zeros(node.image.shape[:2])
    part = slice(shown[1] - node.y, shown[1] - node.y + shown[3]), slice(shown[0] - node.x, shown[0] - node.x + shown[2])
    mask[part] = 1 if node.mask is None else node.mask[part]
    return replace(node, mask=mask)


# What a layer holds that a document does not


def _unread(item: Any, mode: str) -> Iterator[str]:
    from psd_tools.constants import Tag

    group, shape, blocks = item.is_group(), item.kind == "shape", item.tagged_blocks
    vector = item.vector_mask is not None and not item.vector_mask.disabled
    data, ranges = item._record.mask_data, item._record.blending_ranges
    drawn = data is not None and data.flags.user_mask_from_render  # the vector mask: into the mask, or a shape's into the alpha
    masks = None if data is None or group else data.parameters
    feathers = [] if masks is None else [masks.user_mask_feather, masks.vector_mask_feather]
    densities = [] if masks is None or not drawn or not (shape or _both(data)) else [masks.user_mask_density, masks.vector_mask_density]
    pairs = [*(ranges.composite_ranges or ()), *chain.from_iterable(ranges.channel_ranges or ())]
    lost = {
        "it is not clipped to the layer below": item.clipping,
        "layer effects are not read": _has_effects(item),
        "masks of groups are not read": group and (data is not None or vector),
        "its vector mask is not read": vector and not (group or shape or drawn),
        "the feather of its mask is not read": any(feathers),
        "the density of its vector mask is not read": any(density not in (None, 255) for density in densities[shape:]),
        "blend-if is not read, and hides nothing of it": any(tuple(pair) != (0, 0xFFFF) for pair in pairs),
        "its knockout is not read": blocks.get_data(Tag.KNOCKOUT_SETTING, 0),
        "it is blended into all channels, though some are switched off": blocks.get_data(Tag.CHANNEL_BLENDING_RESTRICTIONS_SETTING, None),
        "that its transparency should not shape it is not read": not blocks.get_data(Tag.TRANSPARENCY_SHAPES_LAYER, 1),
        f"its fill opacity acts as opacity, which looks different {'in a group' if group else f'with {mode}'}": 0 < item.fill_opacity < 255
        and (group or mode in _FILL_MODES),
    }
    return (what for what, is_lost in lost.items() if is_lost)


def _has_effects(item: Any) -> bool:
    """Whether one is switched on. psd-tools asks for a flag that files of before Photoshop CC 2015 do not have (its issue 831)."""
    from psd_tools.constants import Tag
    from psd_tools.psd.descriptor import Descriptor, List

    newer = (Tag.OBJECT_BASED_EFFECTS_LAYER_INFO, Tag.OBJECT_BASED_EFFECTS_LAYER_INFO_V0, Tag.OBJECT_BASED_EFFECTS_LAYER_INFO_V1)
    there = [item.tagged_blocks.get_data(tag) for tag in newer if tag in item.tagged_blocks]
    for block in there:
        if not isinstance(block, Descriptor):
            return True  # it could not be parsed: better said than lost
        entries = [entry for value in block.values() for entry in (value if isinstance(value, List) else [value])]
        on = [entry for entry in entries if isinstance(entry, Descriptor) and entry.get(b"enab", False) and entry.get(b"present", True)]
        if on and block.get(b"masterFXSwitch", True):
            return True
    oldest = None if there else item.tagged_blocks.get_data(Tag.EFFECTS_LAYER)  # Photoshop 5 and 6; a copy in later files
    return oldest is not None and any(getattr(entry, "enabled", False) for entry in getattr(oldest, "values", tuple)())
