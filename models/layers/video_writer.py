"""Transparent video into files, frame by frame.

Frames are float32 `(height, width, 4)` in 0..1, sRGB with straight alpha. Memory does not depend on the clip's length, but for its
sound, and in WebP the compressed frames, which libwebp holds until the end.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..media.atomic import finished
from ..media.containers import write_error
from ..media.picture_files import Picture, write_picture
from ..media.png_text import insert_chunks, text_chunks
from ..media.sound import LAYOUTS, Sound, SoundWriter
from ..media.ycbcr import BT709, FULL, LIMITED, RGB, SRGB, Colour, to_codes, to_planes
from .compose import straight

ALPHA = ("straight", "premultiplied")
SOUND_FILE = "sound.wav"  # beside the pictures of a sequence
_VIDEO = Colour(BT709, LIMITED, BT709, BT709)
RATE_TAG, ALPHA_TAG = "fps", "alpha"  # our tags: the rate where a format does not keep it exactly, and that colours are premultiplied
SLOWEST, FASTEST = Fraction(1, 100), 1000  # rates


@dataclass(frozen=True)
class ClipFormat:
    """How FFmpeg is to write one kind of file. pixels: bits a channel -> its name of the pixel format, the default first."""

    suffix: str
    container: str
    codec: str
    pixels: dict[int, str]
    sound: str | None
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    lossless: bool = True
    premultiplied: bool = True
    longest: int = 65535


CLIP_FORMATS = {
    "ProRes 4444": ClipFormat(
        ".mov",
        "mov",
        "prores_ks",
        {10: "yuva444p10le"},
        "pcm_s24le",
        {"profile": "4444", "alpha_bits": "16", "vendor": "apl0"},  # some of Apple's programs refuse other vendors
        {"movflags": "+faststart+use_metadata_tags"},
        lossless=False,
    ),
    "VP9 WebM": ClipFormat(
        ".webm",
        "webm",
        "libvpx-vp9",
        {8: "yuva420p"},
        "libopus",
        {"auto-alt-ref": "0", "deadline": "good", "cpu-used": "3", "lag-in-frames": "8", "row-mt": "1"},  # hidden frames have no alpha
        lossless=False,
    ),
    # Its encoder puts any colour under pixels without alpha, which premultiplied would show. PNG is straight by definition (12.4).
    "animated WebP": ClipFormat(".webp", "webp", "libwebp_anim", {8: "bgra"}, None, {}, {"loop": "0"}, premultiplied=False, longest=16383),
    "APNG": ClipFormat(".png", "apng", "apng", {8: "rgba", 16: "rgba64be"}, None, {"pred": "mixed"}, {"plays": "0"}, premultiplied=False),
    "FFV1": ClipFormat(".mkv", "matroska", "ffv1", {8: "bgra", 16: "gbrap16le"}, "flac", {"level": "3", "slicecrc": "1"}),
    "PNG sequence": ClipFormat("", "", "", {8: "", 16: ""}, "pcm_s24le", premultiplied=False),
}


@dataclass
class Saved:
    """What was written. notes: sentences on what is not in it."""

    frames: int
    width: int
    height: int
    bits: int
    notes: list[str] = field(default_factory=list)


def save(
    target: str | os.PathLike[str],
    frames: Iterable[Tensor],
    rate: Fraction | int,
    format: str,
    *,
    alpha: str = "straight",
    sound: Sound | None = None,
    bits: int | None = None,
    crf: int = 14,
    quality: int | None = None,
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> Saved:
    """Write a clip with transparency.

    target: a path with the ending of the format, or the new folder of a PNG sequence. frames: `(height, width, 4)`, straight alpha, 0..1,
    all of one size. rate: frames a second. format: one of `CLIP_FORMATS`. alpha: how colours are stored; where they are premultiplied the file
    gets a tag that `load` reads. sound: cut off where the frames end. bits: 8 or 16 a channel for APNG, FFV1 and PNG. crf: of VP9, 0 (best)
    to 63. quality: of WebP, 0 to 100; None is lossless. metadata: texts to keep in the file. options: for FFmpeg's encoder, over ours.
    What `frames` raises ends the run and leaves no file.

    The lossy formats, ProRes and VP9, do not keep the colour of pixels without any alpha: it is that of the nearest visible ones, so that
    neither the coarser chroma nor the transform mixes another into an edge. Y'CbCr is BT.709, limited range, and tagged so.

    Raises ValueError for what cannot be written, before the file is begun where it can be known; OSError where the disk is full.
    """
    target = Path(target)
    kind, bits, rate = _checked(target, format, rate, alpha, sound, bits)
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"the clip for {target.name} has no frame; give one at least")
    if first.ndim != 3 or first.shape[2] != 4 or not min(first.shape):
        raise ValueError(f"the frames for {target.name} are {tuple(first.shape)} (height, width, channels); give RGBA, 4 channels")
    height, width, _ = first.shape
    if max(height, width) > kind.longest:
        raise ValueError(
            f"the frames are {width} x {height}, and {format} holds {kind.longest} pixels a side; make them smaller, or use APNG or FFV1"
        )
    texts = dict(metadata or {})
    if alpha == "premultiplied":
        texts[ALPHA_TAG] = alpha
    settings = {"crf": str(crf)} if format == "VP9 WebM" else {}
    if format == "animated WebP":
        settings = {"lossless": "1"} if quality is None else {"quality": str(quality)}
    settings = {**kind.options, **settings, **(options or {})}
    done = 0
    with finished(target) as unfinished:
        try:
            writer: _FileWriter | _FolderWriter
            if kind.codec:
                writer = _FileWriter(unfinished, kind, bits, rate, (width, height), settings, sound, texts)
            else:
                writer = _FolderWriter(unfinished, bits, rate, sound, texts)
            with closing(writer):
                for frame in _prepared(itertools.chain((first,), iterator), first.shape, kind, alpha):
                    writer.write(frame)
                    done += 1
                writer.finish()
        except av.FFmpegError as error:
            raise write_error(error, target, done, "another format or size") from error
    notes = [f"the sound was left out: {format} has none"] if sound is not None and kind.sound is None else []
    return Saved(done, width, height, bits, notes)


def _prepared(frames: Iterable[Tensor], shape: tuple[int, ...], kind: ClipFormat, alpha: str) -> Iterator[Tensor]:
    """As they are stored: float32 on the CPU, in 0..1. Raises ValueError."""
    for number, frame in enumerate(frames):
        if frame.shape != shape:
            raise ValueError(f"frame {number} is {tuple(frame.shape)} and the first {tuple(shape)}; give all frames one size")
        frame = frame.detach().float().cpu()
        if not frame.isfinite().all():
            raise ValueError(f"frame {number} has values that are not finite numbers; look for the node that made them")
        frame = frame.clamp(0, 1)
        yield _premultiplied(frame) if alpha == "premultiplied" else frame if kind.lossless else pull_push(frame)


def _premultiplied(frame: Tensor) -> Tensor:
    return torch.cat([frame[..., :3] * frame[..., 3:], frame[..., 3:]], -1)


def save_preview(target: str | os.PathLike[str], frames: Iterable[Tensor], rate: Fraction | int, side: int = 512) -> None:
    """A small VP9 WebM of a clip, which browsers play, of no more than `side` pixels a side. frames: as for `save`."""

    def small(frame: Tensor) -> Tensor:
        height, width = frame.shape[:2]
        scale = min(1.0, side / max(height, width))
        size = [max(round(length * scale / 2), 1) * 2 for length in (height, width)]
        premultiplied = _premultiplied(frame).float().cpu().clamp(0, 1)
        resized = F.interpolate(premultiplied.movedim(-1, 0)[None], size, mode="bilinear", antialias=True)[0]
        return straight(resized.movedim(0, -1))

    save(target, map(small, frames), rate, "VP9 WebM", crf=30, options={"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"})


def _checked(target: Path, format: str, rate: Fraction | int, alpha: str, sound: Sound | None, bits: int | None) -> tuple[ClipFormat, int, Fraction]:
    kind = CLIP_FORMATS.get(format)
    if kind is None:
        raise ValueError(f"format is {format!r}; use one of {', '.join(CLIP_FORMATS)}")
    endings = {other.suffix for other in CLIP_FORMATS.values() if other.suffix}
    if target.suffix.lower() in endings if not kind.suffix else target.suffix.lower() != kind.suffix:
        advice = f"end it in {kind.suffix}" if kind.suffix else "it is a folder, so give it no ending"
        raise ValueError(f"the name {target.name} is not one of {format}; {advice}")
    if alpha not in ALPHA:
        raise ValueError(f"alpha is {alpha!r}; use {' or '.join(ALPHA)}")
    if alpha == "premultiplied" and not kind.premultiplied:
        raise ValueError(f"alpha is premultiplied, and {format} holds straight alpha only; use straight, or another format")
    if not SLOWEST <= rate <= FASTEST:
        raise ValueError(f"the frame rate is {float(rate):g}; use {float(SLOWEST):g} to {FASTEST} a second")
    bits = next(iter(kind.pixels)) if bits is None else bits
    if bits not in kind.pixels:
        raise ValueError(f"bits is {bits}; {format} has {' or '.join(map(str, kind.pixels))} a channel")
    if sound is not None:
        _check_sound(sound)
    if kind.codec:
        try:
            av.codec.Codec(kind.codec, "w")
        except ValueError as error:
            others = ", ".join(name for name in CLIP_FORMATS if name != format)
            message = f"{format} needs the encoder {kind.codec}, which this build of PyAV has not; install av from PyPI, or use another of {others}"
            raise ValueError(message) from error
    return kind, bits, Fraction(rate).limit_denominator(1001)


def _check_sound(sound: Sound) -> None:
    if sound.samples.ndim != 2 or len(sound.samples) not in LAYOUTS:
        raise ValueError(f"the sound is {tuple(sound.samples.shape)} (channels, samples); give 1, 2, 6 or 8 channels")
    if not sound.samples.isfinite().all():
        raise ValueError("the sound has values that are not finite numbers; look for the node that made them")


def pull_push(picture: Tensor) -> Tensor:
    """`(height, width, 4)` -> the same, where pixels without alpha have the colour of those around them; no visible pixel changes.

    Holes are filled from pictures of half the size each, where every pixel is the mean by alpha (Gortler et al., The Lumigraph, SIGGRAPH
    1996, section 3.4).
    """
    planes = picture.movedim(-1, 0)[None].contiguous()
    alpha = planes[:, 3:]
    if alpha.amin() > 0:
        return picture
    levels = [torch.cat([planes[:, :3] * alpha, alpha], 1)]
    while max(levels[-1].shape[2:]) > 1 and levels[-1][:, 3:].amin() == 0:
        levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=True, count_include_pad=False))
    filled = torch.zeros(1, 3, 1, 1)  # of a picture that is empty
    for level in reversed(levels[1:]):
        weight = level[:, 3:]
        coarser = F.interpolate(filled, level.shape[2:], mode="bilinear")
        filled = torch.where(weight > 0, level[:, :3] / weight.clamp_min(1e-12), coarser)
    colour = torch.where(alpha > 0, planes[:, :3], F.interpolate(filled, alpha.shape[2:], mode="bilinear"))
    return torch.cat([colour, alpha], 1)[0].movedim(0, -1)


def _sound_writer(container: Any, codec: str, sound: Sound, rate: Fraction) -> SoundWriter:
    # Opus has few rates; PyAV resamples.
    stream = container.add_stream(codec, rate=48000 if codec == "libopus" else sound.rate)
    stream.layout = LAYOUTS[len(sound.samples)]
    if codec in ("flac", "pcm_s24le"):
        stream.format = "s32"
    return SoundWriter(container, stream, Sound(sound.samples.clamp(-1, 1), sound.rate), rate)


class _FileWriter:
    def __init__(
        self,
        path: Path,
        kind: ClipFormat,
        bits: int,
        rate: Fraction,
        size: tuple[int, int],
        options: dict[str, str],
        sound: Sound | None,
        texts: dict[str, str],
    ) -> None:
        self.path, self.kind, self.bits, self.rate, self.texts, self.done = path, kind, bits, rate, texts, 0
        self.size, self.pixel_format = size, kind.pixels[bits]
        # "file:" because of names with a colon, which would be taken for a protocol.
        self.container: Any = av.open(f"file:{path}", "w", format=kind.container, container_options=kind.container_options)
        self.container.metadata.update(texts)
        video: Any = self.container.add_stream(kind.codec, rate=rate, options=options)
        video.width, video.height, video.pix_fmt, video.bit_rate = *size, self.pixel_format, 0
        video.codec_context.time_base = 1 / rate
        video.codec_context.thread_type = "SLICE"  # threads by frames would each hold some
        self.video, self.colour = video, _VIDEO if self.pixel_format.startswith("yuv") else Colour(RGB, FULL, BT709, SRGB)
        self._tag(video.codec_context)
        self.sound = _sound_writer(self.container, kind.sound, sound, rate) if sound is not None and kind.sound is not None else None

    def _tag(self, thing: Any) -> None:
        """The codec, which the container listens to, and each frame, which ProRes does."""
        thing.colorspace, thing.color_range = self.colour.matrix, self.colour.range
        if hasattr(thing, "color_trc"):  # frames of PyAV 14 have no more tags than those two
            thing.color_primaries, thing.color_trc = self.colour.primaries, self.colour.transfer

    def write(self, picture: Tensor) -> None:
        frame = av.VideoFrame(*self.size, self.pixel_format)
        self._tag(frame)
        for plane, codes in zip(frame.planes, _codes(picture, self.pixel_format, self.bits), strict=True):
            memory: Any = plane
            rows = np.frombuffer(memory, codes.dtype).reshape(plane.height, -1)
            rows[:, : codes.shape[1]] = codes
        frame.pts, frame.time_base = self.done, 1 / self.rate
        self.container.mux(self.video.encode(frame))
        self.done += 1
        if self.sound is not None:
            self.sound.until(self.done)

    def finish(self) -> None:
        self.container.mux(self.video.encode(None))
        if self.sound is not None:
            self.sound.finish()
        self.container.close()
        if self.kind.container == "apng":
            _add_png_texts(self.path, {**self.texts, RATE_TAG: str(self.rate)})
        elif self.kind.container == "webp":
            _add_webp_texts(self.path, {**self.texts, RATE_TAG: str(self.rate)})

    def close(self) -> None:
        with suppress(Exception):  # whatever state it is in; nothing where it is closed
            self.container.close()


class _FolderWriter:
    """PNG files numbered from 0, and a WAV file."""

    def __init__(self, path: Path, bits: int, rate: Fraction, sound: Sound | None, texts: dict[str, str]) -> None:
        self.path, self.bits, self.done = path, bits, 0
        self.texts = {**texts, RATE_TAG: str(rate)}
        path.mkdir()
        self.container: Any = None
        self.sound = None
        if sound is not None:
            self.container = av.open(f"file:{path / SOUND_FILE}", "w", format="wav")
            self.sound = _sound_writer(self.container, "pcm_s24le", sound, rate)

    def write(self, picture: Tensor) -> None:
        write_picture(self.path / f"{self.done:05}.png", Picture(picture.movedim(-1, 0), self.bits, text=self.texts))
        self.done += 1
        if self.sound is not None:
            self.sound.until(self.done)

    def finish(self) -> None:
        if self.sound is not None:
            self.sound.finish()
            self.container.close()

    def close(self) -> None:
        if self.container is not None:
            with suppress(Exception):
                self.container.close()


def _codes(picture: Tensor, pixel_format: str, bits: int) -> list[np.ndarray]:
    """The planes of a pixel format, a row each: (rows, numbers)."""
    if pixel_format.startswith("yuva"):
        coarse = 2 if "420" in pixel_format else 1
        height, width = picture.shape[:2]
        rgb = picture[..., :3].movedim(-1, 0)
        if coarse == 2:
            rgb = F.pad(rgb[None], (0, width % 2, 0, height % 2), mode="replicate")[0]
        luma, *chroma = to_planes(rgb, _VIDEO, bits, coarse, coarse)
        return [luma[:height, :width], *chroma, to_codes(picture[..., 3], 2**bits - 1, 0, bits)]
    levels = to_codes(picture, 2**bits - 1, 0, bits)
    if pixel_format.startswith("gbrap"):
        return [levels[..., channel] for channel in (1, 2, 0, 3)]
    if pixel_format == "bgra":
        levels = levels[..., [2, 1, 0, 3]]
    return [levels.reshape(len(levels), -1).astype(">u2" if pixel_format.endswith("be") else levels.dtype)]


def _add_png_texts(path: Path, texts: Mapping[str, str]) -> None:
    with finished(path) as whole, path.open("rb") as source, whole.open("wb") as file:
        insert_chunks(source, file, text_chunks(texts).chunks)


def _add_webp_texts(path: Path, texts: Mapping[str, str]) -> None:
    """An EXIF chunk of entries "key:value", as ComfyUI writes them, at the end of an extended WebP file (RFC 9649, section 2.7)."""
    exif = Image.Exif()
    for index, (key, value) in enumerate(texts.items()):
        exif[0x0110 - index] = f"{key}:{value}"
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    with path.open("r+b") as file:
        header = bytearray(file.read(21))
        if header[12:16] != b"VP8X":  # a still picture without a header for more: it has no rate either
            return
        file.seek(0, os.SEEK_END)
        file.write(b"EXIF" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2))
        header[4:8] = struct.pack("<I", file.tell() - 8)
        header[20] |= 0x08  # there is EXIF
        file.seek(0)
        file.write(header)
