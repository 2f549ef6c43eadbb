"""Transparent video out of files, frame by frame: what `video_writer` and other programs wrote."""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..errors import FileError
from ..media.containers import BrokenVideoError, Ending, check_file, check_size, failure, first_video, open_video, reading_video
from ..media.picture_files import read_picture
from ..media.sound import Sound
from ..media.ycbcr import Colour, bit_depth, colour_tags, plane_codes, to_rgb
from .compose import straight
from .document import rgba
from .video_writer import ALPHA, ALPHA_TAG, FASTEST, RATE_TAG, SLOWEST, SOUND_FILE


@dataclass(frozen=True)
class AlphaVideo:
    """A clip in a file or folder. Each iteration reads it anew: frames `(height, width, 4)` float32 in 0..1 with straight alpha.

    frames: how many there are, an estimate in large files, None where they have no times. transparent: whether it has an alpha channel.
    premultiplied: how its colours are stored; they are divided by alpha when they are read. notes: sentences on what was assumed or left out.
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
        with reading_video(str(self.path)):
            for number, frame in enumerate(read(self.path)):
                if frame.shape[:2] != (self.height, self.width):
                    sizes = f"{self.width} x {self.height} to {frame.shape[1]} x {frame.shape[0]}"
                    raise BrokenVideoError(f"{self.path} changes its size from {sizes} at frame {number}; export it with one size")
                yield straight(frame) if self.premultiplied else frame

    def sound(self) -> Sound | None:
        """The first sound track from the time of the first frame on, or None. Raises FileError."""
        path = self.path / SOUND_FILE if self.path.is_dir() else self.path
        if self.codec == "webp" or not path.is_file():
            return None
        with reading_video(str(path)), open_video(path) as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                return None
            stream, pictures = container.streams.audio[0], container.streams.video
            start = (pictures[0].start_time or 0) * pictures[0].time_base if pictures else Fraction(0)
            parts: list[np.ndarray] = []
            shift = None  # samples before the first frame; below 0: how many are missing at the beginning
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            try:
                for frame in itertools.chain(container.decode(stream), (None,)):
                    if shift is None and frame is not None:
                        shift = round((start - (frame.pts or 0) * frame.time_base) * stream.rate)
                    parts.extend(part.to_ndarray() for part in resampler.resample(frame))
            except av.FFmpegError as error:
                raise BrokenVideoError(f"the sound of {path} {failure(error, 'damaged')}") from error
            if shift is None or not parts:
                return None
            if -shift > MOST_SILENT:
                raise FileError(f"the sound of {path} begins {-shift / stream.rate:.0f} seconds after its first frame; cut it")
            silent = min(max(-shift, 0), round((self.frames or 0) / self.rate * stream.rate))  # not longer than the picture
            return Sound(F.pad(torch.from_numpy(np.concatenate(parts, 1))[:, max(shift, 0) :], (silent, 0)), stream.rate)


def load(path: str | os.PathLike[str], alpha: str = "auto") -> AlphaVideo:
    """Open a clip: a video file, animated WebP, APNG, or a folder of numbered PNG files. Alpha of VP8 and VP9 is read, by libvpx.

    alpha: "straight" or "premultiplied" says how the file's colours are stored; "auto": as its tag says, which is that of `save`, and
    without one straight.

    Raises FileNotFoundError, PermissionError, or FileError for what is no clip, not a whole one, or has no decoder.
    """
    path = Path(path)
    if alpha not in ("auto", *ALPHA):
        raise ValueError(f"alpha is {alpha!r}; use auto, {' or '.join(ALPHA)}")
    if not path.is_dir():
        check_file(path)
    read = _folder_facts if path.is_dir() else _webp_facts if path.suffix.lower() == ".webp" else _video_facts
    with reading_video(str(path)):
        facts, tags = read(path)
        found, facts["rate"] = facts["rate"], min(max(facts["rate"], SLOWEST), Fraction(FASTEST))
        if found != facts["rate"]:
            facts["notes"] = (*facts["notes"], f"its frame rate is {float(found):g}; {float(facts['rate']):g} was taken")
    premultiplied = (tags.get(ALPHA_TAG) if alpha == "auto" else alpha) == "premultiplied"
    return AlphaVideo(path, premultiplied=premultiplied and facts["transparent"], **facts)


def _folder_files(path: Path) -> list[Path]:
    """In the order of the numbers in their names, whether or not these have zeros in front."""
    files = [file for file in path.iterdir() if file.suffix.lower() == ".png" and not file.name.startswith(".")]
    return sorted(files, key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])


def _folder_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    files = _folder_files(path)
    if not files:
        raise FileError(f"{path} has no .png file in it; choose a folder of numbered PNG files")
    for file in files:
        check_file(file)
    picture = read_picture(files[0])
    rate, notes = _tagged_rate(picture.text)
    channels, height, width = picture.pixels.shape
    facts = {"codec": "png", "bits": picture.bits, "transparent": channels == 4, "frames": len(files), "rate": rate, "notes": notes}
    return facts | {"width": width, "height": height}, picture.text


MOST_SILENT = 1 << 28  # samples: an hour and a half
LOOKED_AT = 1 << 30  # bytes of a file whose times are looked through before it is read: some seconds on a slow disk
NO_RATE = ("there is no frame rate in it; 24 was assumed",)


def _tagged_rate(tags: Mapping[str, str]) -> tuple[Fraction, tuple[str, ...]]:
    with suppress(KeyError, ValueError, ZeroDivisionError):  # ours, or somebody else's tag of that name
        rate = Fraction(tags[RATE_TAG])
        if SLOWEST <= rate <= FASTEST:
            return rate, ()
    return Fraction(24), NO_RATE


def _simplest_rate(frames: int, seconds: Fraction, error: Fraction) -> Fraction:
    """Of the rates at which so many frames last so long, the one of the smallest denominator."""
    low, high = frames / (seconds + error), frames / (seconds - error)
    if high < SLOWEST:
        return high
    candidates = (Fraction(round((low + high) / 2 * denominator), denominator) for denominator in itertools.count(1))
    return next(rate for rate in candidates if low <= rate <= high)


def _mean_noted(shortest: float, longest: float) -> tuple[str, ...]:
    return (f"its frames last {shortest:.0f} to {longest:.0f} ms; they were given one rate, the mean",)


def _folder_frames(path: Path) -> Iterator[Tensor]:
    for file in _folder_files(path):
        yield rgba(read_picture(file).pixels.movedim(0, -1))


def _webp_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with _open_webp(path) as image:
        check_size(str(path), image.width, image.height, path.stat().st_size)
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
        return rate, [1] * len(durations), _mean_noted(min(durations), max(durations))
    if not unknown:
        return tagged, repeats, ()
    return _simplest_rate(sum(repeats), Fraction(total, 1000), Fraction(1, 2000)), repeats, ()


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


def _video_facts(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with open_video(path) as container:
        video = first_video(container, str(path))
        frame = next(_frames(container, video, path), None)
        if frame is None:
            raise BrokenVideoError(f"{path} has a video stream, but not one frame of it can be decoded; export it again")
        tags = {key.lower(): value for key, value in {**container.metadata, **video.metadata}.items()}
        declared = video.average_rate or video.guessed_rate
        if container.format.name in ("apng", "png_pipe"):
            with Image.open(path) as image:  # FFmpeg reads no texts
                tags = {key: value for key, value in image.info.items() if isinstance(value, str)}
            tagged, unknown = _tagged_rate(tags)
            if not unknown or container.format.name == "png_pipe":  # a still picture, for which FFmpeg makes up a rate
                declared = None if unknown else tagged
        facts = {"width": frame.width, "height": frame.height, "codec": video.codec_context.codec.canonical_name}
        facts |= {"bits": bit_depth(frame.format), "transparent": _has_alpha(frame.format)}
        marked = {key.lower(): value for key, value in video.metadata.items()}.get("alpha_mode") == "1"
    rate, count, notes = _video_times(path, declared)
    if marked and not facts["transparent"]:  # a tag that programs copy, or a second picture that only libvpx decodes
        notes = (*notes, f"it is marked as transparent, but no alpha could be read of its {facts['codec']}; export it as VP9, ProRes 4444 or FFV1")
    return facts | {"rate": rate, "frames": count, "notes": notes}, tags


def _video_times(path: Path, declared: Fraction | None) -> tuple[Fraction, int | None, tuple[str, ...]]:
    """The rate, and how many frames there are, by their times: headers may know neither. declared: the rate where these agree."""
    lengths: dict[int, int] = {}  # hidden frames of VP8 have the time of the next one
    share = 1.0
    with open_video(path) as container:
        video = first_video(container, str(path))
        tick = video.time_base
        with suppress(av.FFmpegError):  # whoever reads the frames is told
            for packet in container.demux(video):
                if packet.pts is not None and not packet.is_discard:
                    lengths[packet.pts] = packet.duration or 0
                if packet.pos is not None and packet.pos > LOOKED_AT:
                    share = packet.pos / container.size
                    break
    times = sorted(lengths)
    count = round(len(times) / share) or None
    if len(times) < 2:
        return declared or Fraction(24), count, () if declared else NO_RATE
    steps = [after - before for before, after in itertools.pairwise(times)]
    span = times[-1] - times[0]
    if declared:
        step = float(1 / (declared * tick))
        even = all(abs(each - step) <= 2 for each in steps)  # times are rounded
        if even and abs(span - len(steps) * step) <= max(2, span / 2000):
            return declared, count, ()
    seconds = (span + (lengths[times[-1]] or steps[-1])) * tick
    rate = _simplest_rate(len(times), seconds, max(tick, seconds / 100_000))
    shortest, longest = (float(each * tick * 1000) for each in (min(steps), max(steps)))
    return rate, count, _mean_noted(shortest, longest) if max(steps) - min(steps) > 2 else ()


def _decoded(path: Path) -> Iterator[Tensor]:
    with open_video(path) as container:
        video, colour = first_video(container, str(path)), None
        for frame in _frames(container, video, path):
            colour = colour or colour_tags(video, frame)[0]
            yield _picture(frame, colour)


LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def _frames(container: Any, video: Any, path: Path) -> Iterator[Any]:
    """FFmpeg's own decoders of VP8 and VP9 leave the second picture, alpha, unread; libvpx's do not."""
    decoder = video.codec_context
    if {key.lower(): value for key, value in video.metadata.items()}.get("alpha_mode") == "1":
        name = LIBVPX.get(decoder.codec.canonical_name)
        try:
            decoder = decoder if name is None else av.CodecContext.create(name, "r")
        except ValueError as error:
            raise FileError(f"{path} is transparent, and this build of PyAV has no {name} to read that with; install av from PyPI") from error
    count, ending = 0, Ending(container, video)
    try:
        for packet in container.demux([video, *(item for item in container.streams if item.type in ("audio", "subtitle"))]):
            ending.see(packet)
            if packet.stream.index != video.index:
                continue
            for frame in decoder.decode(packet if packet.size else None):
                yield frame
                count += 1
    except av.FFmpegError as error:
        raise BrokenVideoError(f"{path} {failure(error, f'damaged or cut off after {count} frames')}") from error
    if where := ending.cut_off():
        raise BrokenVideoError(f"{path} is cut off after {count} frames, at {where}; get a complete copy of it")


def _has_alpha(format: Any) -> bool:
    return format.has_palette or any(component.is_alpha for component in format.components)


def _picture(frame: Any, colour: Colour) -> Tensor:
    """`(height, width, 4)` of a decoded frame, as stored."""
    clear, bits = _has_alpha(frame.format), bit_depth(frame.format)
    if clear and not frame.format.name.startswith(("yuva", "gbrap")):
        bits = 8 if bits == 8 else 16
        plane: Any = frame.reformat(format="rgba" if bits == 8 else "rgba64le").planes[0]
        codes = np.frombuffer(plane, np.uint8 if bits == 8 else "<u2").reshape(frame.height, -1)[:, : frame.width * 4]
        return torch.from_numpy(codes.reshape(frame.height, frame.width, 4).astype(np.float32)).div_(2**bits - 1)
    out = torch.ones(frame.height, frame.width, 4)
    out[..., :3] = to_rgb(frame, colour).movedim(0, -1)
    if clear:
        out[..., 3] = torch.from_numpy(plane_codes(frame.planes[3], bits).astype(np.float32)).div_(2**bits - 1)
    return out
