"""Transparent video in and out of files, frame by frame, and clips of layers.

Frames are float32 `(height, width, 4)` in 0..1, sRGB with straight alpha. Memory does not depend on the clip's length, but for its
sound, and in WebP the compressed frames, which libwebp holds until the end.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..upscale.picture_files import Picture, read_picture, write_picture
from ..upscale.video import BT709, FULL, LIMITED, NO_SPACE, RGB, SRGB, BrokenVideoError, Colour, _bits, _colour, _rows, _to_planes, _to_rgb
from .compose import _straight, composite
from .document import Document, Layer, rgba
from .files import finished

ALPHA = ("straight", "premultiplied")
SOUND_FILE = "sound.wav"  # beside the pictures of a sequence
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_VIDEO = Colour(BT709, LIMITED, BT709, BT709)
_RATE, _ALPHA = "fps", "alpha"  # our tags: the rate where a format has none of its own, and that colours are premultiplied


@dataclass(frozen=True)
class Format:
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


FORMATS = {
    "ProRes 4444": Format(
        ".mov",
        "mov",
        "prores_ks",
        {10: "yuva444p10le"},
        "pcm_s24le",
        {"profile": "4444", "alpha_bits": "16", "vendor": "apl0"},  # some of Apple's programs refuse other vendors
        {"movflags": "+faststart+use_metadata_tags"},
        lossless=False,
    ),
    "VP9 WebM": Format(
        ".webm",
        "webm",
        "libvpx-vp9",
        {8: "yuva420p"},
        "libopus",
        {"auto-alt-ref": "0", "deadline": "good", "cpu-used": "3", "lag-in-frames": "8", "row-mt": "1"},  # hidden frames have no alpha
        lossless=False,
    ),
    # Its encoder puts any colour under pixels without alpha, which premultiplied would show.
    "animated WebP": Format(".webp", "webp", "libwebp_anim", {8: "bgra"}, None, {}, {"loop": "0"}, premultiplied=False),
    "APNG": Format(".png", "apng", "apng", {8: "rgba", 16: "rgba64be"}, None, {"pred": "mixed"}, {"plays": "0"}),
    "FFV1": Format(".mkv", "matroska", "ffv1", {8: "bgra", 16: "gbrap16le"}, "flac", {"level": "3", "slicecrc": "1"}),
    "PNG sequence": Format("", "", "", {8: "", 16: ""}, "pcm_s24le"),
}


@dataclass(frozen=True)
class Sound:
    """samples: float32 `(channels, samples)` in -1..1; 1, 2, 6 or 8 channels. rate: samples a second."""

    samples: Tensor
    rate: int


@dataclass
class Saved:
    """What was written. notes: sentences on what is not in it."""

    frames: int
    width: int
    height: int
    bits: int
    notes: list[str] = field(default_factory=list)


def save(
    target: str | os.PathLike,
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
    on_frame: Callable[[int], None] | None = None,
) -> Saved:
    """Write a clip with transparency.

    target: a path with the ending of the format, or the new folder of a PNG sequence. frames: `(height, width, 4)`, straight alpha, 0..1,
    all of one size. rate: frames a second. format: one of `FORMATS`. alpha: how colours are stored; where they are premultiplied the file
    gets a tag that `load` reads. sound: cut off where the frames end. bits: 8 or 16 a channel for APNG, FFV1 and PNG. crf: of VP9, 0 (best)
    to 63. quality: of WebP, 0 to 100; None is lossless. metadata: texts to keep in the file. options: for FFmpeg's encoder, over ours.
    on_frame(done): after each frame; what it raises ends the run and leaves no file.

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
    if "420" in kind.pixels[bits] and (width % 2 or height % 2):
        even = f"{width + width % 2} x {height + height % 2}"
        raise ValueError(
            f"the frames are {width} x {height}, and {format} has colour for blocks of 2 x 2 pixels only; crop or pad them to even sides, "
            f"such as {even}, or use another format"
        )
    texts = dict(metadata or {})
    if alpha == "premultiplied":
        texts[_ALPHA] = alpha
    done = 0
    writer: _FileWriter | _FolderWriter | None = None
    with finished(target) as unfinished:
        try:
            if kind.codec:
                settings = {"crf": str(crf)} if format == "VP9 WebM" else {}
                if format == "animated WebP":
                    settings = {"lossless": "1"} if quality is None else {"quality": str(quality)}
                writer = _FileWriter(unfinished, kind, bits, rate, width, height, {**kind.options, **settings, **(options or {})}, sound, texts)
            else:
                writer = _FolderWriter(unfinished, bits, rate, sound, texts)
            for frame in itertools.chain((first,), iterator):
                if frame.shape != first.shape:
                    raise ValueError(f"frame {done} is {tuple(frame.shape)} and the first {tuple(first.shape)}; give all frames one size")
                frame = frame.detach().float().cpu()
                if not frame.isfinite().all():
                    raise ValueError(f"frame {done} has values that are not finite numbers; look for the node that made them")
                frame = frame.clamp(0, 1)
                if alpha == "premultiplied":
                    frame = torch.cat([frame[..., :3] * frame[..., 3:], frame[..., 3:]], -1)
                elif not kind.lossless:
                    frame = bled(frame)
                writer.write(frame)
                done += 1
                if on_frame is not None:
                    on_frame(done)
            writer.finish()
        except av.FFmpegError as error:
            what = f"{target} could not be written after {done} frames: {error.strerror}"
            if not isinstance(error, OSError):
                raise ValueError(f"{what}; try another format or size") from error
            raise OSError(error.errno, f"{what}; make room there or choose another folder" if error.errno in NO_SPACE else what) from error
        finally:
            if writer is not None:
                writer.abandon()
    notes = [f"the sound was left out: {format} has none"] if sound is not None and kind.sound is None else []
    return Saved(done, width, height, bits, notes)


def save_preview(target: str | os.PathLike, frames: Iterable[Tensor], rate: Fraction | int, side: int = 512) -> None:
    """A small VP9 WebM of a clip, which browsers play, of no more than `side` pixels a side. frames: as for `save`."""

    def small(frame: Tensor) -> Tensor:
        height, width = frame.shape[:2]
        scale = min(1.0, side / max(height, width))
        size = [max(round(length * scale / 2), 1) * 2 for length in (height, width)]
        premultiplied = torch.cat([frame[..., :3] * frame[..., 3:], frame[..., 3:]], -1).float().cpu().clamp(0, 1)
        resized = F.interpolate(premultiplied.movedim(-1, 0)[None], size, mode="bilinear", antialias=True)[0]
        return _straight(resized.movedim(0, -1))

    save(target, map(small, frames), rate, "VP9 WebM", crf=30, options={"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"})


def _checked(target: Path, format: str, rate: Fraction | int, alpha: str, sound: Sound | None, bits: int | None) -> tuple[Format, int, Fraction]:
    kind = FORMATS.get(format)
    if kind is None:
        raise ValueError(f"format is {format!r}; use one of {', '.join(FORMATS)}")
    if target.suffix.lower() != kind.suffix:
        advice = f"end it in {kind.suffix}" if kind.suffix else "it is a folder, so give it no ending"
        raise ValueError(f"the name {target.name} is not one of {format}; {advice}")
    if alpha not in ALPHA:
        raise ValueError(f"alpha is {alpha!r}; use {' or '.join(ALPHA)}")
    if alpha == "premultiplied" and not kind.premultiplied:
        raise ValueError(f"alpha is premultiplied, and {format} holds straight alpha only; use straight, or another format")
    if not 0 < rate <= 1000:
        raise ValueError(f"the frame rate is {float(rate):g}; use more than 0 and at most 1000 a second")
    bits = next(iter(kind.pixels)) if bits is None else bits
    if bits not in kind.pixels:
        raise ValueError(f"bits is {bits}; {format} has {' or '.join(map(str, kind.pixels))} a channel")
    if sound is not None and (sound.samples.ndim != 2 or len(sound.samples) not in _LAYOUTS):
        raise ValueError(f"the sound is {tuple(sound.samples.shape)} (channels, samples); give 1, 2, 6 or 8 channels")
    if kind.codec:
        try:
            av.codec.Codec(kind.codec, "w")
        except ValueError as error:
            others = ", ".join(name for name in FORMATS if name != format)
            message = f"{format} needs the encoder {kind.codec}, which this build of PyAV has not; install av from PyPI, or use another of {others}"
            raise ValueError(message) from error
    return kind, bits, Fraction(rate).limit_denominator(1001)


def bled(picture: Tensor) -> Tensor:
    """`(height, width, 4)` -> the same, where pixels without alpha have the colour of those around them; no visible pixel changes.

    Pull-push: holes are filled from pictures of half the size each, where every pixel is the mean by alpha (Gortler et al., The Lumigraph,
    SIGGRAPH 1996, section 3.4).
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


# Writing


class _SoundWriter:
    """Encodes sound in step with the frames, so that a file can be played while it is read."""

    def __init__(self, container: Any, codec: str, sound: Sound, rate: Fraction) -> None:
        self.container, self.sound, self.rate, self.done = container, sound, rate, 0
        self.layout = _LAYOUTS[len(sound.samples)]
        # Opus has few rates; PyAV resamples.
        self.stream = container.add_stream(codec, rate=48000 if codec == "libopus" else sound.rate)
        self.stream.layout = self.layout
        if codec in ("flac", "pcm_s24le"):
            self.stream.format = "s32"

    def until(self, frames: int) -> None:
        """Up to where so many frames end."""
        stop = min(ceil(frames * self.sound.rate / self.rate), self.sound.samples.shape[1])
        if stop > self.done:
            part = self.sound.samples[:, self.done : stop].float().clamp(-1, 1).cpu().contiguous().numpy()
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts, frame.time_base = self.sound.rate, self.done, Fraction(1, self.sound.rate)
            self.container.mux(self.stream.encode(frame))
            self.done = stop

    def finish(self) -> None:
        self.container.mux(self.stream.encode(None))


class _FileWriter:
    def __init__(
        self,
        path: Path,
        kind: Format,
        bits: int,
        rate: Fraction,
        width: int,
        height: int,
        options: dict[str, str],
        sound: Sound | None,
        texts: dict[str, str],
    ) -> None:
        self.path, self.kind, self.bits, self.rate, self.texts, self.done = path, kind, bits, rate, texts, 0
        self.size, self.pixel_format = (width, height), kind.pixels[bits]
        # "file:" because of names with a colon, which would be taken for a protocol.
        self.container: Any = av.open(f"file:{path}", "w", format=kind.container, container_options=kind.container_options)
        self.container.metadata.update(texts)
        video: Any = self.container.add_stream(kind.codec, rate=rate, options=options)
        video.width, video.height, video.pix_fmt, video.bit_rate = width, height, self.pixel_format, 0
        video.codec_context.time_base = 1 / rate
        video.codec_context.thread_type = "SLICE"  # threads by frames would each hold some
        self.video, self.colour = video, _VIDEO if self.pixel_format.startswith("yuv") else Colour(RGB, FULL, BT709, SRGB)
        self._tag(video.codec_context)
        self.sound = _SoundWriter(self.container, kind.sound, sound, rate) if sound is not None and kind.sound is not None else None

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
            _add_png_texts(self.path, self.texts)
        elif self.kind.container == "webp":
            _add_webp_texts(self.path, {**self.texts, _RATE: str(self.rate)})

    def abandon(self) -> None:
        with suppress(Exception):  # whatever state it is in; nothing where it is closed
            self.container.close()


class _FolderWriter:
    """PNG files numbered from 0, and a WAV file."""

    def __init__(self, path: Path, bits: int, rate: Fraction, sound: Sound | None, texts: dict[str, str]) -> None:
        self.path, self.bits, self.done = path, bits, 0
        self.texts = {**texts, _RATE: str(rate)}
        path.mkdir()
        self.container: Any = None
        self.sound = None
        if sound is not None:
            self.container = av.open(f"file:{path / SOUND_FILE}", "w", format="wav")
            self.sound = _SoundWriter(self.container, "pcm_s24le", sound, rate)

    def write(self, picture: Tensor) -> None:
        write_picture(self.path / f"{self.done:05}.png", Picture(picture.movedim(-1, 0), self.bits, text=self.texts))
        self.done += 1
        if self.sound is not None:
            self.sound.until(self.done)

    def finish(self) -> None:
        if self.sound is not None:
            self.sound.finish()
            self.container.close()

    def abandon(self) -> None:
        if self.container is not None:
            with suppress(Exception):
                self.container.close()


def _codes(picture: Tensor, pixel_format: str, bits: int) -> list[np.ndarray]:
    """The planes of a pixel format, a row each: (rows, numbers)."""
    if pixel_format.startswith("yuva"):
        coarse = 2 if "420" in pixel_format else 1
        planes = _to_planes(picture[..., :3].movedim(-1, 0), _VIDEO, bits, coarse, coarse)
        return [*planes, _levels(picture[..., 3], bits)]
    levels = _levels(picture, bits)
    if pixel_format.startswith("gbrap"):
        return [levels[..., channel] for channel in (1, 2, 0, 3)]
    if pixel_format == "bgra":
        levels = levels[..., [2, 1, 0, 3]]
    return [levels.reshape(len(levels), -1).astype(">u2" if pixel_format.endswith("be") else levels.dtype)]


def _levels(x: Tensor, bits: int) -> np.ndarray:
    codes = (x * (2**bits - 1)).round_()
    return codes.to(torch.uint8).numpy() if bits == 8 else codes.to(torch.int32).numpy().astype("<u2")


def _add_png_texts(path: Path, texts: Mapping[str, str]) -> None:
    """tEXt chunks after the header of a PNG file (ISO/IEC 15948, 11.3.4.3)."""
    if not texts:
        return
    whole = path.with_name(f"{path.name}.texts")
    try:
        with path.open("rb") as source, whole.open("wb") as file:
            file.write(source.read(8 + 25))  # the signature and IHDR, which has to be first
            for key, value in texts.items():
                chunk = b"tEXt" + key.encode("latin-1", "replace") + b"\0" + value.encode("latin-1", "replace")
                file.write(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))
            shutil.copyfileobj(source, file)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


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


# Reading


@dataclass(frozen=True)
class AlphaVideo:
    """A clip in a file or folder. Each iteration reads it anew: frames `(height, width, 4)` float32 in 0..1 with straight alpha.

    frames: how many the file says there are, or None. transparent: whether it has an alpha channel. premultiplied: how its colours are
    stored; they are divided by alpha when they are read. notes: sentences on what was assumed or left out.
    """

    path: Path
    width: int
    height: int
    rate: Fraction
    frames: int | None
    codec: str
    bits: int
    transparent: bool
    premultiplied: bool
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Tensor]:
        read = _folder_frames if self.path.is_dir() else _webp_frames if self.codec == "webp" else _decoded
        for number, frame in enumerate(read(self.path)):
            if frame.shape[:2] != (self.height, self.width):
                sizes = f"{self.width} x {self.height} to {frame.shape[1]} x {frame.shape[0]}"
                raise BrokenVideoError(f"{self.path} changes its size from {sizes} at frame {number}; export it with one size")
            yield _straight(frame) if self.premultiplied else frame

    def sound(self) -> Sound | None:
        """The first sound track, all of it, or None. Raises BrokenVideoError."""
        path = self.path / SOUND_FILE if self.path.is_dir() else self.path
        if self.codec == "webp" or not path.is_file():
            return None
        with _open(path) as container:
            if not container.streams.audio:
                return None
            parts: list[np.ndarray] = []
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            try:
                for frame in itertools.chain(container.decode(stream), (None,)):
                    parts.extend(part.to_ndarray() for part in resampler.resample(frame))
            except av.FFmpegError as error:
                raise BrokenVideoError(f"the sound of {path} is damaged ({error.strerror}); get a complete copy of it") from error
            return Sound(torch.from_numpy(np.concatenate(parts, 1)), stream.rate) if parts else None


def load(path: str | os.PathLike, alpha: str = "auto") -> AlphaVideo:
    """Open a clip: a video file, animated WebP, APNG, or a folder of numbered PNG files. Alpha of VP8 and VP9 is read, by libvpx.

    alpha: "straight" or "premultiplied" says how the file's colours are stored; "auto": as its tag says, which is that of `save`, and
    without one straight.

    Raises FileNotFoundError, BrokenVideoError, or ValueError: no video in it, or no decoder for its alpha.
    """
    path = Path(path)
    if alpha not in ("auto", *ALPHA):
        raise ValueError(f"alpha is {alpha!r}; use auto, {' or '.join(ALPHA)}")
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder; check the path", str(path))
    if path.is_dir():
        facts, tags = _folder_facts(path)
    elif path.suffix.lower() == ".webp":
        facts, tags = _webp_facts(path)
    else:
        facts, tags = _video_facts(path)
    premultiplied = (tags.get(_ALPHA) if alpha == "auto" else alpha) == "premultiplied"
    return AlphaVideo(path, premultiplied=premultiplied and facts["transparent"], **facts)


def _folder_files(path: Path) -> list[Path]:
    """In the order of the numbers in their names, whether or not these have zeros in front."""
    files = [file for file in path.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith(".")]
    return sorted(files, key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])


def _folder_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    files = _folder_files(path)
    if not files:
        raise ValueError(f"{path} has no .png file in it; choose a folder of numbered PNG files")
    picture = read_picture(files[0])
    rate, notes = _tagged_rate(picture.text)
    channels, height, width = picture.pixels.shape
    facts = {"codec": "png", "bits": picture.bits, "transparent": channels == 4, "frames": len(files), "rate": rate, "notes": notes}
    return facts | {"width": width, "height": height}, picture.text


def _tagged_rate(tags: Mapping[str, str]) -> tuple[Fraction, tuple[str, ...]]:
    with suppress(KeyError, ValueError, ZeroDivisionError):  # ours, or somebody else's tag of that name
        rate = Fraction(tags[_RATE])
        if rate > 0:
            return rate, ()
    return Fraction(24), ("there is no frame rate in it; 24 was assumed",)


def _folder_frames(path: Path) -> Iterator[Tensor]:
    for file in _folder_files(path):
        yield rgba(read_picture(file).pixels.movedim(0, -1))


def _webp_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with _open_webp(path) as image:
        tags = _exif_tags(image)
        facts: dict[str, Any] = {"width": image.width, "height": image.height, "codec": "webp", "bits": 8, "transparent": image.mode == "RGBA"}
    rate, repeats, notes = _webp_times(path, tags)
    return facts | {"rate": rate, "frames": sum(repeats), "notes": notes}, tags


def _exif_tags(image: Any) -> dict[str, str]:
    entries = (value.partition(":") for value in image.getexif().values() if isinstance(value, str))
    return {key: value for key, _, value in entries}


def _webp_times(path: Path, tags: Mapping[str, str]) -> tuple[Fraction, list[int], tuple[str, ...]]:
    """The rate, and how many frames each stored picture stands for: encoders join equal ones. Durations are milliseconds (RFC 9649, 2.7.1.1)."""
    durations = []
    with path.open("rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            size = struct.unpack("<I", header[4:])[0]
            if header[:4] == b"ANMF":
                durations.append(int.from_bytes(file.read(16)[12:15], "little"))
                size -= 16
            file.seek(size + size % 2, os.SEEK_CUR)
    if not any(durations):
        rate, notes = _tagged_rate(tags)
        return rate, [1] * max(len(durations), 1), notes
    total, shortest = sum(durations), max(min(durations), 1)
    tagged, unknown = _tagged_rate(tags)
    repeats = [max(round(duration * tagged / 1000 if not unknown else duration / shortest), 1) for duration in durations]
    step = total / sum(repeats)
    if any(abs(duration - count * step) > 1.5 for duration, count in zip(durations, repeats, strict=True)):
        rate = Fraction(1000 * len(durations), total).limit_denominator(1001)
        return rate, [1] * len(durations), (f"its frames last {min(durations)} to {max(durations)} ms; they were given one rate, the mean",)
    if not unknown:
        return tagged, repeats, ()
    # The simplest rate that comes to this length in whole milliseconds.
    low, high = (Fraction(2000 * sum(repeats), 2 * total + error) for error in (1, -1))
    candidates = (Fraction(round((low + high) / 2 * denominator), denominator) for denominator in itertools.count(1))
    return next(rate for rate in candidates if low <= rate <= high), repeats, ()


def _webp_frames(path: Path) -> Iterator[Tensor]:
    with _open_webp(path) as image:
        _, repeats, _ = _webp_times(path, _exif_tags(image))
        for number, count in enumerate(repeats):
            try:
                image.seek(number)
                codes = np.asarray(image.convert("RGBA"), np.float32)
            except (OSError, EOFError) as error:
                raise BrokenVideoError(f"{path} is damaged or cut off after {number} frames ({error}); get a complete copy of it") from error
            for _ in range(count):
                yield torch.from_numpy(codes).div(255)


def is_animated_png(path: Path) -> bool:
    """Whether a file is an APNG: an acTL chunk comes before the pixels (PNG, third edition, 11.3.6.1)."""
    with path.open("rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
            if header[4:] == b"acTL":
                return True
            file.seek(struct.unpack(">I", header[:4])[0] + 4, os.SEEK_CUR)
    return False


def _open_webp(path: Path) -> Any:
    try:
        return Image.open(path, formats=["WEBP"])
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenVideoError(f"{path} is no WebP picture, or not all of it ({error}); export or copy it again") from error


def _open(path: Path) -> Any:
    try:
        return av.open(f"file:{path}", metadata_errors="replace")
    except av.FFmpegError as error:
        what = f"{path} is no video, or its beginning or end is missing"
        raise BrokenVideoError(f"{what} ({error.strerror}); export or copy it again") from error


def _video_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with _open(path) as container:
        video = _video(container, path)
        frame = next(_frames(container, video, path), None)
        if frame is None:
            raise BrokenVideoError(f"{path} has a video stream, but not one frame of it can be decoded; export it again")
        tags = {key.lower(): value for key, value in {**container.metadata, **video.metadata}.items()}
        if container.format.name in ("apng", "png_pipe"):
            with Image.open(path) as image:  # FFmpeg reads no texts
                tags = {key: value for key, value in image.info.items() if isinstance(value, str)}
        rate = video.average_rate or video.guessed_rate
        facts = {"width": frame.width, "height": frame.height, "rate": rate or Fraction(24), "codec": video.codec_context.codec.canonical_name}
        facts |= {"bits": _bits(frame.format), "transparent": _has_alpha(frame.format), "frames": _declared(video)}
        return facts | {"notes": () if rate else ("there is no frame rate in it; 24 was assumed",)}, tags


def _video(container: Any, path: Path) -> Any:
    if not container.streams.video:
        found = ", ".join(sorted({item.type for item in container.streams})) or "nothing"
        raise ValueError(f"{path} has no video stream, only {found}; choose a video file")
    return container.streams.video[0]


def _declared(video: Any) -> int | None:
    """The number of frames by the header: MOV counts them, Matroska has the length of each stream as text."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", video.metadata.get("DURATION", ""))
    if video.frames or match is None:
        return video.frames or None
    hours, minutes, seconds = (Fraction(part) for part in match.groups())
    return round((hours * 3600 + minutes * 60 + seconds) * (video.average_rate or 0)) or None


def _decoded(path: Path) -> Iterator[Tensor]:
    with _open(path) as container:
        video = _video(container, path)
        colour, count, declared = None, 0, _declared(video)
        for frame in _frames(container, video, path):
            colour = colour or _colour(video, frame)[0]
            yield _picture(frame, colour)
            count += 1
        # Matroska that was cut off ends like a complete one; its rounded times may be a frame wrong.
        if declared is not None and declared - count > max(1, declared / 100):
            raise BrokenVideoError(f"{path} is cut off after {count} of {declared} frames; get a complete copy of it")


def _frames(container: Any, video: Any, path: Path) -> Iterator[Any]:
    """FFmpeg's own decoders of VP8 and VP9 leave the second picture, alpha, unread; libvpx's do not."""
    decoder = video.codec_context
    if {key.lower(): value for key, value in video.metadata.items()}.get("alpha_mode") == "1":
        name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.codec.canonical_name]
        try:
            decoder = av.CodecContext.create(name, "r")
        except ValueError as error:
            raise ValueError(f"{path} is transparent, and this build of PyAV has no {name} to read that with; install av from PyPI") from error
    count = 0
    try:
        for packet in container.demux(video):
            for frame in decoder.decode(packet if packet.size else None):
                yield frame
                count += 1
    except av.FFmpegError as error:
        raise BrokenVideoError(f"{path} is damaged or cut off after {count} frames ({error.strerror}); get a complete copy of it") from error


def _has_alpha(format: Any) -> bool:
    return format.has_palette or any(component.is_alpha for component in format.components)


def _picture(frame: Any, colour: Colour) -> Tensor:
    """`(height, width, 4)` of a decoded frame, as stored."""
    clear, bits = _has_alpha(frame.format), _bits(frame.format)
    if clear and not frame.format.name.startswith(("yuva", "gbrap")):
        bits = 8 if bits == 8 else 16
        plane: Any = frame.reformat(format="rgba" if bits == 8 else "rgba64le").planes[0]
        codes = np.frombuffer(plane, np.uint8 if bits == 8 else "<u2").reshape(frame.height, -1)[:, : frame.width * 4]
        return torch.from_numpy(codes.reshape(frame.height, frame.width, 4).astype(np.float32)).div_(2**bits - 1)
    out = torch.ones(frame.height, frame.width, 4)
    out[..., :3] = _to_rgb(frame, colour).movedim(0, -1)
    if clear:
        out[..., 3] = torch.from_numpy(_rows(frame.planes[3], bits).astype(np.float32)).div_(2**bits - 1)
    return out


# Clips of layers


@dataclass(frozen=True, eq=False)
class ClipLayer:
    """A clip over others. frames: `(height, width, 4)` each, straight alpha; a tensor of them or an `AlphaVideo`, read once a composition.

    x, y: of the upper left corner on the canvas, in pixels. ending: what a shorter clip does at its end, "hold" its last frame, "loop", or
    "hide". opacity and blend_mode are those of `document.Layer`.
    """

    name: str
    frames: Iterable[Tensor]
    x: int = 0
    y: int = 0
    opacity: float = 1.0
    blend_mode: str = "normal"
    ending: str = "hold"

    def __post_init__(self) -> None:
        if self.ending not in ENDINGS:
            raise ValueError(f"layer {self.name!r} has ending {self.ending!r}; use one of {', '.join(ENDINGS)}")

    def on_canvas(self, width: int, height: int) -> Iterator[Tensor]:
        """The layer alone, at its place and with its opacity: `(height, width, 4)` a frame."""
        for frame in self.frames:
            yield composite(Document(width, height, (self._layer(frame),)))

    def _layer(self, frame: Tensor) -> Layer:
        return Layer(self.name, frame, self.x, self.y, self.opacity, self.blend_mode)


ENDINGS = ("hold", "loop", "hide")


@dataclass(frozen=True, eq=False)
class LayeredClip:
    """Clips over one another on a canvas of width x height pixels, the lowest first. As long as the longest; all have one frame rate."""

    width: int
    height: int
    layers: tuple[ClipLayer, ...]

    def __iter__(self) -> Iterator[Tensor]:
        """The composite, `(height, width, 4)` a frame, by the formulas of `compose.composite`."""
        running = [iter(layer.frames) for layer in self.layers]
        shown: list[Tensor | None] = [None] * len(running)
        ended = [False] * len(running)
        while True:
            for index, layer in enumerate(self.layers):
                frame = next(running[index], None)
                if frame is None:
                    ended[index] = True
                    if layer.ending == "loop":
                        running[index] = iter(layer.frames)
                        frame = next(running[index], None)
                    elif layer.ending == "hold":
                        frame = shown[index]
                shown[index] = frame
            if all(ended):
                return
            layers = tuple(layer._layer(frame) for layer, frame in zip(self.layers, shown, strict=True) if frame is not None)
            yield composite(Document(self.width, self.height, layers))
