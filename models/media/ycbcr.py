"""Decoded frames as RGB, and RGB as planes to encode.

The conversion between the file's Y'CbCr and RGB is done here in float32, with the matrix and the range of the stream in both directions:
nothing between decoder and encoder has fewer bits than the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

# Numbers of ISO/IEC 23091-2 (H.273), as the files and FFmpeg use them.
RGB, BT709, UNSPECIFIED, BT601, BT2020 = 0, 1, 2, 6, 9
SRGB = 13  # transfer
LIMITED, FULL = 1, 2
# Matrix: weights of red and blue in luma (H.273, table 4).
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}


@dataclass(frozen=True)
class Colour:
    """The colour tags of a stream, with what was assumed where there were none. Numbers of H.273; range: LIMITED or FULL."""

    matrix: int
    range: int
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED

    @property
    def luma(self) -> tuple[float, float]:
        """Weights of red and blue. Of BT.2020 for matrices that are not one (ICtCp, YCgCo): the way there and back still cancel out."""
        return LUMA.get(self.matrix, LUMA[BT2020])

    def scale(self, bits: int) -> tuple[float, float, float, float]:
        """Codes of luma 0, luma 1, chroma 0, and one unit of chroma (which goes from -0.5 to 0.5)."""
        if self.range == FULL:
            return 0.0, 2.0**bits - 1, 2.0 ** (bits - 1), 2.0**bits - 1
        step = 2.0 ** (bits - 8)
        return 16 * step, 235 * step, 128 * step, 224 * step


def colour_tags(video: Any, frame: Any) -> tuple[Colour, list[str]]:
    """The colour tags of a stream and its first frame, to read and write with, and notes on what was assumed."""
    context = video.codec_context

    def tag(name: str, unspecified: int) -> int:
        value = int(getattr(context, name))
        return value if value != unspecified else int(getattr(frame, name, unspecified))

    primaries, transfer = tag("color_primaries", UNSPECIFIED), tag("color_trc", UNSPECIFIED)
    if frame.format.is_rgb or frame.format.has_palette:
        return Colour(BT709, LIMITED, primaries, transfer), ["the source is RGB; it was written as BT.709 Y'CbCr"]
    notes = []
    matrix, value_range = tag("colorspace", UNSPECIFIED), tag("color_range", 0)
    if matrix in (UNSPECIFIED, RGB):
        by_primaries = {1: BT709, 5: 5, 6: BT601, 7: 7, 9: BT2020}
        large = frame.height >= 720 or frame.width >= 1280
        matrix = by_primaries.get(primaries, BT709 if large else BT601)
        names = {BT709: "BT.709", BT2020: "BT.2020"}
        # The result says so, because a player would guess by its size, which is another one.
        notes.append(f"the source does not name its colour matrix; it was read, written and tagged as {names.get(matrix, 'BT.601')}")
    elif matrix not in LUMA:
        notes.append(f"the colour matrix of the source (H.273 number {matrix}) was treated as BT.2020; the tag was kept")
    if frame.format.name.startswith("yuvj"):
        value_range = FULL
    elif value_range not in (LIMITED, FULL):
        value_range = FULL if frame.format.name.startswith("gray") else LIMITED
    return Colour(matrix, value_range, primaries, transfer), notes


def bit_depth(format: Any) -> int:
    """Bits a channel of an `av.VideoFormat`."""
    return max(int(component.bits) for component in format.components)


_PLANAR = re.compile(r"(yuv[aj]?4\d\dp|gbra?p|gray)(?:(\d+)le)?")


def _planar(format: Any) -> str:
    """The name of a planar little-endian format that holds all that `format` does."""
    name: str = format.name
    if _PLANAR.fullmatch(name):
        return name
    depth = next((bits for bits in (8, 9, 10, 12, 14, 16) if bits >= bit_depth(format)), 16)
    rgb = format.is_rgb or format.has_palette
    if rgb:
        kind = "gbrp"
    elif not any(component.is_chroma for component in format.components):
        kind = "gray"
    else:
        steps = {(64, 64): "444", (32, 64): "422", (32, 32): "420", (64, 32): "440", (16, 64): "411", (16, 16): "410"}
        kind = f"yuv{steps.get((format.chroma_width(64), format.chroma_height(64)), '444')}p"
    name = kind if depth == 8 else f"{kind}{depth}le"
    try:
        return av.VideoFormat(name).name
    except ValueError:
        return "gbrp16le" if rgb else "yuv444p16le"


def to_rgb(frame: Any, colour: Colour) -> Tensor:
    """`(3, height, width)` float32 in 0..1 of a decoded frame, without its alpha."""
    name = _planar(frame.format)
    if name != frame.format.name:
        frame = frame.reformat(format=name)
    match = _PLANAR.fullmatch(name)
    assert match is not None
    kind, bits = match[1], int(match[2] or 8)
    codes = [plane_codes(plane, bits) for plane in frame.planes[: 1 if kind == "gray" else 3]]
    rgb = torch.empty(3, frame.height, frame.width)
    red, green, blue = rgb
    if kind.startswith("gb"):
        for part, plane in zip((green, blue, red), codes, strict=True):
            part.copy_(torch.from_numpy(plane.astype(np.float32)))
        return rgb.div_(2**bits - 1)
    black, white, neutral, unit = colour.scale(bits)
    luma = green.copy_(torch.from_numpy(codes[0].astype(np.float32))).sub_(black).div_(white - black)
    if kind == "gray":
        return rgb.copy_(luma.clone().expand_as(rgb)).clamp_(0, 1)
    across, down = round(64 / frame.format.chroma_width(64)), round(64 / frame.format.chroma_height(64))
    kr, kb = colour.luma
    for part, plane, weight in ((blue, codes[1], kb), (red, codes[2], kr)):
        chroma = torch.from_numpy(plane.astype(np.float32)).sub_(neutral).div_(unit)
        # The chroma samples of MPEG video lie on every other column, and between two rows.
        chroma = _finer(_finer(chroma, -1, across, frame.width, 0), -2, down, frame.height, 0.5)
        torch.add(luma, chroma, alpha=2 * (1 - weight), out=part)
    green.add_(red, alpha=-kr).add_(blue, alpha=-kb).div_(1 - kr - kb)
    return rgb.clamp_(0, 1)


def to_planes(rgb: Tensor, colour: Colour, bits: int, across: int, down: int) -> list[np.ndarray]:
    """Y, Cb and Cr codes, uint8 or uint16, of `(3, height, width)` in 0..1; chroma is 1 or 2 times coarser `across` and `down`."""
    red, green, blue = rgb.float().clamp(0, 1)
    kr, kb = colour.luma
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    black, white, neutral, unit = colour.scale(bits)
    codes = [to_codes(luma, white - black, black, bits)]
    for chroma in ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))):
        if across == 2:  # on the even columns: a quarter, a half, a quarter
            left = torch.cat((chroma[:, :1], chroma[:, 1:-1:2]), 1)
            chroma = chroma[:, ::2] / 2 + (left + chroma[:, 1::2]) / 4
        if down == 2:
            chroma = (chroma[::2] + chroma[1::2]) / 2
        codes.append(to_codes(chroma, unit, neutral, bits))
    return codes


def to_codes(plane: Tensor, unit: float, zero: float, bits: int) -> np.ndarray:
    """plane * unit + zero, rounded and clamped to `bits`: uint8 for 8, else uint16."""
    rounded = (plane * unit + zero).round_().clamp_(0, 2**bits - 1)
    return rounded.to(torch.uint8 if bits == 8 else torch.int32).cpu().numpy().astype(np.uint8 if bits == 8 else np.uint16, copy=False)


def _finer(plane: Tensor, axis: int, factor: int, size: int, offset: float) -> Tensor:
    """Linear interpolation of an axis to `size` positions; sample i lies at position factor * i + offset * (factor - 1)."""
    if factor == 1:
        return plane
    position = (torch.arange(size, dtype=torch.float32) - offset * (factor - 1)) / factor
    low = position.floor()
    share = (position - low).view(-1, *(1,) * (-1 - axis))
    last = plane.shape[axis] - 1
    first = plane.index_select(axis, low.long().clamp(0, last))
    return first.lerp_(plane.index_select(axis, (low.long() + 1).clamp(0, last)), share)


def plane_codes(plane: Any, bits: int) -> np.ndarray:
    """The plane's memory as (height, width) codes, the padding cut off."""
    kind = np.dtype(np.uint8 if bits == 8 else "<u2")
    rows = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width]
    return rows if plane.line_size > 0 else rows[::-1]
