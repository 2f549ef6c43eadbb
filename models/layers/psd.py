"""Photoshop files, written: groups, names, blend modes, opacity, masks and the merged picture, through `psd-tools`. `psd_reader` reads them.

8 bits a channel. Transforms become pixels: PSD has them for smart objects only. Opacity has 256 levels there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..media.atomic import finished
from .blend import PASS_THROUGH
from .compose import composite
from .document import MAX_SIDE, Document, Group, Node
from .pixels import eight_bit

# Adobe Photoshop File Formats Specification, layer records: blend mode keys.
BLEND_KEYS = {
    **{PASS_THROUGH: b"pass", "normal": b"norm", "dissolve": b"diss", "darken": b"dark", "multiply": b"mul ", "color-burn": b"idiv"},
    **{"linear-burn": b"lbrn", "darker-color": b"dkCl", "lighten": b"lite", "screen": b"scrn", "color-dodge": b"div "},
    **{"linear-dodge": b"lddg", "lighter-color": b"lgCl", "overlay": b"over", "soft-light": b"sLit", "hard-light": b"hLit"},
    **{"vivid-light": b"vLit", "linear-light": b"lLit", "pin-light": b"pLit", "hard-mix": b"hMix", "difference": b"diff"},
    **{"exclusion": b"smud", "subtract": b"fsub", "divide": b"fdiv", "hue": b"hue ", "saturation": b"sat ", "color": b"colr"},
    "luminosity": b"lum ",
}


def psd_tools() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        import psd_tools
        import psd_tools.constants
    except ImportError as error:
        raise ValueError(f"PSD needs psd-tools ({error}): pip install psd-tools; OpenRaster (.ora) needs nothing") from error
    return psd_tools


def write(document: Document, file: Path, merged: Tensor | None, before: Callable[[], None]) -> None:
    """merged: its composite, if it is made already. before: called for each layer.

    Raises ValueError for a blend mode or size that PSD has not, before anything is written.
    """
    psd_tools()
    from psd_tools.constants import Compression
    from psd_tools.psd import PSD, ChannelImageData, GlobalLayerMaskInfo, LayerInfo, LayerRecords
    from psd_tools.psd.header import FileHeader
    from psd_tools.psd.image_data import ImageData
    from psd_tools.psd.image_resources import ImageResources
    from psd_tools.psd.layer_and_mask import LayerAndMaskInformation

    _check(document.layers)
    header = FileHeader(width=document.width, height=document.height, channels=4)
    # Records, not psd-tools' layer objects: those take quadratic time, and compose the merged picture by themselves.
    records = [record for node in document.layers for record in _records(node, before)]
    layers = LayerInfo(
        -len(records),  # negative: the fourth channel of the merged picture is transparency
        LayerRecords(record for record, _ in records),
        ChannelImageData(channels for _, channels in records),
    )
    merged = composite(document) if merged is None else merged
    on_white = merged[..., :3] * merged[..., 3:] + (1 - merged[..., 3:])  # as Photoshop keeps it
    planes = eight_bit(torch.cat([on_white, merged[..., 3:]], -1))
    picture = ImageData(Compression.RLE)
    picture.set_data([np.ascontiguousarray(planes[..., channel]).tobytes() for channel in range(4)], header)
    psd = PSD(header, image_resources=ImageResources.new(), layer_and_mask_information=LayerAndMaskInformation(layers, GlobalLayerMaskInfo()))
    psd.image_data = picture
    with finished(file) as unfinished, open(unfinished, "wb") as stream:
        psd.write(stream)


def _check(nodes: tuple[Node, ...]) -> None:
    for node in nodes:
        if node.blend_mode not in BLEND_KEYS:
            raise ValueError(f"{node.name!r} has blend mode {node.blend_mode}, which PSD has not; choose another, or save as .ora")
        if isinstance(node, Group):
            _check(node.layers)
        elif max(node.bounds[2:]) > MAX_SIDE:
            width, height = node.bounds[2:]
            raise ValueError(f"{node.name!r} is {width} x {height} pixels, and PSD holds {MAX_SIDE} a side; make it smaller, or save as .ora")


def _records(node: Node, before: Callable[[], None]) -> Iterator[tuple[Any, Any]]:
    """Record and channels of each layer, bottom to top. A group is its layers between two dividers, the upper one with its properties."""
    from psd_tools.constants import SectionDivider, Tag

    if isinstance(node, Group):
        below, channels = _record("</Layer group>", 0, 0, {})
        below.tagged_blocks.set_data(Tag.SECTION_DIVIDER_SETTING, SectionDivider.BOUNDING_SECTION_DIVIDER)
        yield below, channels
        for inner in node.layers:
            yield from _records(inner, before)
        record, channels = _record(node.name, 0, 0, {})
        record.tagged_blocks.set_data(Tag.SECTION_DIVIDER_SETTING, SectionDivider.OPEN_FOLDER, b"8BIM", BLEND_KEYS[node.blend_mode])
    else:
        before()
        layer = node.baked()
        pixels = eight_bit(layer.image)
        planes = {-1: pixels[..., 3], **{channel: pixels[..., channel] for channel in range(3)}}
        if layer.mask is not None:
            planes[-2] = eight_bit(layer.mask)
        record, channels = _record(layer.name, layer.x, layer.y, planes)
    record.blend_mode = BLEND_KEYS["normal" if node.blend_mode == PASS_THROUGH else node.blend_mode]  # the divider tells that it passes through
    record.opacity, record.flags.visible = round(node.opacity * 255), node.visible
    yield record, channels


def _record(name: str, x: int, y: int, planes: dict[int, np.ndarray]) -> tuple[Any, Any]:
    """planes: by PSD's channel numbers, -1 transparency, -2 mask, all of one size. None, for a divider, is four channels without a pixel."""
    from psd_tools.constants import Compression, Tag
    from psd_tools.psd.layer_and_mask import ChannelData, ChannelDataList, ChannelInfo, LayerRecord, MaskData

    planes = planes or dict.fromkeys((-1, 0, 1, 2), np.empty((0, 0), np.uint8))
    height, width = planes[0].shape
    box = {"left": x, "top": y, "right": x + width, "bottom": y + height}
    record, channels = LayerRecord(**box, name=name.encode("mac_roman", "replace").decode("mac_roman")), ChannelDataList()
    record.tagged_blocks.set_data(Tag.UNICODE_LAYER_NAME, name)
    for number, plane in planes.items():
        channel = ChannelData(Compression.RLE if plane.size else Compression.RAW)
        channel.set_data(np.ascontiguousarray(plane).tobytes(), width, height, 8)
        record.channel_info.append(ChannelInfo(number, len(channel.data) + 2))
        channels.append(channel)
    if -2 in planes:
        record.mask_data = MaskData(**box)
    return record, channels
