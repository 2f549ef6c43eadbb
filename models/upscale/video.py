"""Video file to video file, frame by frame: decode, apply an operator to RGB frames, encode. Memory does not depend on the clip's length.

The conversion between the file's Y'CbCr and RGB is done here in float32, with the matrix and the range of the source in both directions:
nothing between decoder and encoder has fewer bits than the file. Time stamps go over frame by frame, other streams packet by packet.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import torch
from torch import Tensor

from .tiling import Operator, stream

OnFrame = Callable[[int, int | None, Tensor | None], None]

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
INDEXED = ("matroska", "mov", "avi")  # know their length and their key frames
LONGEST = 250  # a last frame is taken to last no more than this many frames of the average rate
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Numbers of ISO/IEC 23091-2 (H.273), as the files and FFmpeg use them.
RGB, BT709, UNSPECIFIED, BT601, BT2020 = 0, 1, 2, 6, 9
SRGB = 13  # transfer
CLIP = -1  # index of the sound of a clip in memory, which is no stream of a file
LIMITED, FULL = 1, 2
# Matrix: weights of red and blue in luma (H.273, table 4).
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}


class BrokenVideoError(ValueError):
    """A file that cannot be decoded, or not to its end."""


@dataclass(frozen=True)
class Clip:
    """A clip in memory, as a source.

    frames: `(frames, height, width, channels)` in 0..1, R'G'B' with the curve of sRGB; what follows the third channel is left out.
    rate: frames a second. sound: `(channels, samples)` float32, cut off where the frames end, or None. bits: 8, or more for a 10-bit file.
    """

    frames: Tensor
    rate: Fraction
    sound: Tensor | None = None
    sample_rate: int = 48000
    bits: int = 8


Source = str | os.PathLike | IO[bytes] | Clip
Trim = tuple[float, float]


@dataclass(frozen=True)
class Encoder:
    """How an encoder of FFmpeg is set up. All look a few frames ahead at most: frames that wait in an encoder are memory."""

    crf: int
    options: dict[str, str]


ENCODERS = {
    "libx264": Encoder(16, {"preset": "medium", "x264-params": "rc-lookahead=4:sync-lookahead=0:threads=3:bframes=2:ref=2"}),
    "libx265": Encoder(17, {"preset": "medium", "x265-params": "rc-lookahead=5:bframes=3:ref=2:frame-threads=1:log-level=error"}),
    "libvpx-vp9": Encoder(18, {"deadline": "good", "cpu-used": "3", "lag-in-frames": "8", "row-mt": "1"}),
    "libsvtav1": Encoder(20, {"preset": "7"}),
    "libaom-av1": Encoder(18, {"cpu-used": "6", "lag-in-frames": "8", "row-mt": "1"}),
}
# First choices for 8 bit and for more, by container.
PREFERRED = {
    ("mp4", False): ("libx264", "libopenh264"),
    ("mp4", True): ("libx265", "libx264", "libsvtav1", "libaom-av1"),
    ("webm", False): ("libvpx-vp9", "libsvtav1", "libaom-av1"),
    ("webm", True): ("libvpx-vp9", "libsvtav1", "libaom-av1"),
}
FORMATS = {False: ("yuv420p", "yuv422p", "yuv444p"), True: ("yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le", "yuv422p12le", "yuv444p12le")}


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


@dataclass(frozen=True)
class VideoFacts:
    """What a video stream says of itself. Width and height in pixels as coded, that is, before `rotation` (degrees, counter-clockwise)."""

    width: int
    height: int
    frames: int | None  # from the header or duration * rate, so an estimate; None: unknown
    rate: Fraction
    time_base: Fraction
    bits: int
    colour: Colour
    rotation: int
    notes: tuple[str, ...] = ()
    display_matrix: bytes | None = field(default=None, repr=False)
    start: Fraction = Fraction(0)  # seconds on the file's clock that become 0
    stop: Fraction | None = None  # where a trimmed clip ends on that clock; None: with the file
    trimmed: bool = False


@dataclass
class VideoSummary:
    """What was written. notes: sentences for the user on whatever is not as it was in the source."""

    frames: int
    width: int
    height: int
    codec: str
    pixel_format: str
    audio: str  # "copied", "re-encoded", "encoded" (that of a Clip) or "none"
    notes: list[str] = field(default_factory=list)


def upscale_video(
    source: Source,
    target: str | os.PathLike,
    operator: Operator,
    size: tuple[int, int],
    *,
    window: int = 1,
    overlap: int = 0,
    on_frame: OnFrame | None = None,
    interrupt: type[BaseException] | tuple[type[BaseException], ...] = KeyboardInterrupt,
    crf: int | None = None,
    codec: str | None = None,
    trim: Trim = (0.0, 0.0),
    metadata: Mapping[str, str] | None = None,
    part: str | os.PathLike | None = None,
    resume: bool = False,
) -> VideoSummary:
    """Apply `operator` to the frames of a video file and write the result to another, with its sound, time stamps and colour tags.

    source: path, binary file object that can seek, or Clip. target: path in an existing folder, .mp4, .mov, .mkv or .webm.
    operator: maps `(frames, 3, height, width)` float32 in 0..1, R'G'B' in the stream's own transfer curve, to `(frames, 3, H, W)`.
    size: (W, H) in pixels; an odd one is made even by repeating the last column or row. window, overlap: frames at a time and shared by
    neighbours (`tiling.stream`). on_frame(done, total, frame): after each frame written, with frame `(3, H, W)`, and once before the first
    with None; total is an estimate or None. crf, codec: the encoder's quality and its name in FFmpeg. trim: seconds to start at, from the
    end if negative, and to take, 0 for all (files only). metadata: tags to write beside those of the source.

    The file gets its name when it is complete; until then, and after an error, `target` is as it was. An exception of class `interrupt`
    leaves what was finished, playable, as `part` (default `<stem>.part<suffix>`), says so in a note on the exception and goes on. So does
    a source that cannot be decoded to its end, as BrokenVideoError. resume: go on after the frames of `part` if it is there, and remove it
    at the end; that it was made of the same source by the same call is the caller's promise. Windows of several frames cannot.

    Raises ValueError for what cannot be done, FileNotFoundError, PermissionError, and OSError where the disk is full.
    """
    target = Path(target)
    part = target.with_name(f"{target.stem}.part{target.suffix}") if part is None else Path(part)
    _check_paths(source, target, part)
    if resume and window > 1:
        raise ValueError(f"window is {window}; windows of several frames cannot be resumed: use window 1 or no resume")
    if min(size) < 1:
        raise ValueError(f"{target}: a size of {size[0]} x {size[1]} was asked for; use at least 1 x 1")
    facts = inspect_video(source, trim)
    temporary = _reserve(target)
    done = kept = 0
    writer: _Writer | None = None
    try:
        with nullcontext() if isinstance(source, Clip) else _open(source) as container:
            reader = _ClipReader(source) if isinstance(source, Clip) else _Reader(container, _name(source))
            writer = _Writer(temporary, target, reader, facts, size, crf, codec, metadata or {})
            if resume and part.is_file():
                done = kept = writer.go_on_from(part)
            frames = reader.rgb_frames(facts, writer, kept)
            results = stream(operator, frames, window, overlap) if window > 1 else (operator(frame[None])[0] for frame in frames)
            with torch.no_grad():
                if on_frame is not None:
                    on_frame(done, facts.frames, None)
                for result in results:
                    writer.write(result, reader.times.popleft())
                    done += 1
                    if on_frame is not None:
                        on_frame(done, facts.frames, result)
            writer.finish(reader.last_duration)
        if reader.broken is not None:
            os.replace(temporary, part)
            raise BrokenVideoError(f"{reader.broken}; the {done} frames before that are finished, in {part}")
        _replace(temporary, target, part)
        if kept:
            part.unlink()
        return writer.summary(done, [*facts.notes, *reader.notes()])
    except interrupt as error:
        if writer is not None and done > kept:
            with suppress(Exception):  # such as a full disk: it must not hide the interrupt
                writer.finish(reader.last_duration)
                os.replace(temporary, part)
                _add_note(error, f"The {done} finished frames are in {part}")
        raise
    except av.FFmpegError as error:
        what = f"{target} could not be written after {done} frames: {error.strerror}"
        if not isinstance(error, OSError):
            raise ValueError(f"{what}; try another codec or file type") from error
        if error.errno in NO_SPACE:
            raise OSError(error.errno, f"{what}; make room there or choose another folder") from error
        raise OSError(error.errno, what) from error
    finally:
        if writer is not None:
            writer.abandon()
        with suppress(OSError):
            temporary.unlink()


def inspect_video(source: Source, trim: Trim = (0.0, 0.0)) -> VideoFacts:
    """Read the header and decode the first frame. trim: as for `upscale_video`.

    Raises FileNotFoundError, PermissionError, BrokenVideoError, or ValueError: no video in it, or none within the trim.
    """
    if isinstance(source, Clip):
        return _clip_facts(source)
    name = _name(source)
    if isinstance(source, str | os.PathLike) and not Path(source).is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such video file; check the path", name)
    with _open(source) as container:
        reader = _Reader(container, name)
        video = reader.video
        declared = video.duration * video.time_base if video.duration else Fraction(container.duration or 0, av.time_base)
        # A broadcast clock starts anywhere; other files mean what they say.
        start = Fraction(container.start_time or 0, av.time_base) if container.format.name in ("mpegts", "mpeg") else Fraction(0)
        stop: Fraction | None = None
        if any(trim):
            begin = Fraction(trim[0]).limit_denominator(av.time_base)
            begin = max(declared + begin, Fraction(0)) if begin < 0 else begin
            length = Fraction(trim[1]).limit_denominator(av.time_base)
            start += begin
            stop = start + length if length else None
            declared = max(min(declared - begin, length or declared), Fraction(0))
            reader.seek(start)
        frames = reader.decoded((video,), lambda packet: None)
        frame = next((frame for frame in frames if not any(trim) or (frame.time is not None and frame.time >= float(start) - 1e-6)), None)
        if frame is None and any(trim):
            raise ValueError(f"{name} has no frame from second {float(start):.2f} on; start the trim earlier")
        if frame is None:
            raise BrokenVideoError(f"{name} has a video stream, but not one frame of it can be decoded; export it again")
        if any(trim):
            start = frame.pts * frame.time_base
        rate = video.average_rate or video.guessed_rate or Fraction(24)
        colour, notes = _colour(video, frame)
        if any(component.is_alpha for component in frame.format.components):
            notes.append("the transparency of the source was left out: this form carries opaque video")
        if frame.interlaced_frame:
            notes.append("the source is interlaced; its frames were treated as whole pictures")
        side_data = {item.type.name: bytes(item) for item in (frame.side_data[index] for index in range(len(frame.side_data)))}
        if side_data.keys() & {"MASTERING_DISPLAY_METADATA", "DOVI_METADATA", "DYNAMIC_HDR_PLUS"}:
            notes.append("HDR mastering data was left out; the colour tags were kept")
        return VideoFacts(
            width=frame.width,
            height=frame.height,
            frames=(0 if any(trim) else video.frames) or round(declared * rate) or None,
            rate=rate,
            time_base=frame.time_base or video.time_base,
            bits=_bits(frame.format),
            colour=colour,
            rotation=frame.rotation,
            notes=tuple(notes),
            display_matrix=side_data.get("DISPLAYMATRIX"),
            start=start,
            stop=stop,
            trimmed=any(trim),
        )


def _clip_facts(clip: Clip) -> VideoFacts:
    if clip.frames.ndim != 4 or not len(clip.frames) or min(clip.frames.shape) < 1 or clip.frames.shape[3] < 3:
        raise ValueError(f"the clip is {tuple(clip.frames.shape)} (frames, height, width, channels); give at least one frame of 3 channels")
    rate = clip.rate.limit_denominator(1001)
    count, height, width, channels = clip.frames.shape
    notes = ("the transparency of the source was left out: this form carries opaque video",) if channels > 3 else ()
    return VideoFacts(width, height, count, rate, 1 / rate, clip.bits, Colour(BT709, LIMITED, BT709, SRGB), 0, notes)


def _check_paths(source: Source, target: Path, part: Path) -> None:
    if target.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{target} ends in {target.suffix!r}, which is no video file that can be written; use {', '.join(CONTAINERS)}")
    if isinstance(source, str | os.PathLike):
        if not Path(source).is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such video file; check the path", str(source))
        # An interrupted run would put its part there.
        if any(path.exists() and Path(source).samefile(path) for path in (target, part)):
            raise ValueError(f"{target} is the source itself, or the source its unfinished part; choose another name for the result")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of the file to write; choose another name", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist; make it first", str(target.parent))


def _reserve(target: Path) -> Path:
    """An empty file beside the target, of a name that nobody else has."""
    temporary = target.with_name(f".{target.stem[:64]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        temporary.open("xb").close()
    except OSError as error:
        advice = f"nothing can be written into {target.parent} ({error.strerror}); choose another folder or change its permissions"
        raise type(error)(error.errno, advice, str(target)) from error
    return temporary


def _replace(temporary: Path, target: Path, part: Path) -> None:
    try:
        os.replace(temporary, target)
    except OSError as error:  # Windows: another program has it open
        os.replace(temporary, part)
        raise type(error)(
            error.errno, f"the file cannot be replaced ({error.strerror}); the finished video is {part.name} beside it", str(target)
        ) from error


def _name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the video given as data"))


def _open(source: Source) -> Any:
    # "file:" because of names with a colon, which would be taken for a protocol.
    file: Any = f"file:{os.fspath(source)}" if isinstance(source, str | os.PathLike) else source
    if not isinstance(file, str):
        file.seek(0)
    try:
        return av.open(file, metadata_errors="replace")
    except PermissionError as error:
        raise PermissionError(errno.EACCES, "the video may not be read; change its permissions", _name(source)) from error
    except av.FFmpegError as error:
        what = f"{_name(source)} is no video, or its beginning or end is missing"
        raise BrokenVideoError(f"{what} ({error.strerror}); export or copy it again") from error


def _add_note(error: BaseException, note: str) -> None:
    """`error.add_note`, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]


# Reading


class _Reader:
    """Frames of the first video stream that is not a cover picture, and the packets of the others in between."""

    def __init__(self, container: Any, name: str) -> None:
        self.container, self.name = container, name
        self.videos = [item for item in container.streams.video if not _is_cover(item)]
        if not self.videos:
            found = ", ".join(sorted({item.type for item in container.streams})) or "nothing"
            raise ValueError(f"{name} has no video stream, only {found}; choose a video file")
        self.video = self.videos[0]
        self.others: list[Any] = [item for item in container.streams if item.type in ("audio", "subtitle")]
        self.metadata, self.video_metadata = container.metadata, self.video.metadata
        self.chapters: list[Any] = container.chapters() if hasattr(container, "chapters") else []
        self.aspect_ratio = self.video.sample_aspect_ratio
        self.left_out = []
        for item in container.streams:
            if item.type not in ("audio", "subtitle") and item is not self.video:
                self.left_out.append("a cover picture" if _is_cover(item) else f"another {item.type} stream")
        if container.format.name.startswith("mov") and self.chapters:
            self.left_out = [what for what in self.left_out if what != "another data stream"]  # the chapters, which are kept
        self.video.thread_type = "AUTO"
        self.video.codec_context.thread_count = 4  # each holds a frame, and a default would be the number of cores
        self.broken: str | None = None  # why the end was not reached
        self.times: deque[int] = deque()  # pts of the frames that were given out and are not written yet
        self.last_duration = 1  # of the last frame, in its time base
        self.damaged = self.moved = 0

    def decoded(self, streams: tuple[Any, ...], other_packet: Callable[[Any], None]) -> Iterator[Any]:
        """Packets before the first frame may fail: recordings start between key frames."""
        packets = self.container.demux(streams)
        time, end, seen = 0.0, Fraction(0), False
        while True:
            packet = None
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode() if packet.stream.index == self.video.index else None
            except av.FFmpegError as error:
                if not seen and packet is not None:
                    continue
                self.broken = f"{self.name} is damaged or cut off at second {time:.2f} ({error.strerror}); get a complete copy of it"
                return
            if packet.pts is not None and packet.duration:
                end = max(end, (packet.pts + packet.duration) * packet.time_base)
            if frames is None:
                other_packet(packet)
                continue
            for frame in frames:
                seen = True
                time = frame.time or time
                yield frame
        # A file that was cut off ends like a complete one, but its header may know the length.
        declared = Fraction(self.container.duration or 0, av.time_base)
        knows = self.container.format.name.startswith(INDEXED) and len(self.videos) == 1
        if knows and declared - end > max(Fraction(1, 4), declared / 100):
            self.broken = f"{self.name} is cut off at second {float(end):.2f} of {float(declared):.2f}; get a complete copy of it"

    def seek(self, start: Fraction) -> None:
        """To the key frame at or before a time on the file's clock, in files that know where it is; the others are read from their start."""
        if self.container.format.name.startswith(INDEXED):
            self.container.seek(int(start / self.video.time_base), stream=self.video)

    def rgb_frames(self, facts: VideoFacts, writer: _Writer, kept: int) -> Iterator[Tensor]:
        """(3, height, width) float32 in 0..1; the times of each are put into `times`. kept: frames at the start that are finished."""
        if facts.trimmed:
            self.seek(facts.start)
        last: int | None = None
        shown: int | None = None
        step = max(round(1 / (facts.rate * facts.time_base)), 1)
        self.last_duration = step
        for frame in self.decoded((self.video, *self.others), writer.other_packet):
            if facts.trimmed and frame.time is not None:
                if frame.pts * frame.time_base < facts.start:
                    continue
                if facts.stop is not None and frame.time >= float(facts.stop) - 1e-6:
                    self._rest_of_sound(facts.stop, writer)
                    break
            if (frame.width, frame.height) != (facts.width, facts.height):
                sizes = f"{facts.width} x {facts.height} to {frame.width} x {frame.height}"
                self.broken = f"{self.name} changes its size from {sizes} at second {frame.time or 0:.2f}; export it with one size"
                return
            pts = None if frame.pts is None else frame.pts - round(facts.start / facts.time_base)
            if pts is None or (last is not None and pts <= last):
                self.moved += 1
                pts = 0 if last is None else last + (step if pts is None else 1)
            last = pts
            self.damaged += frame.is_corrupt
            shown = frame.pts
            if kept:
                kept -= 1
                writer.copy_finished(pts)
                continue
            self.times.append(pts)
            yield _to_rgb(frame, facts.colour)
        # Packets know durations in the order of decoding only; the frame shown last lasts until the stream ends.
        if self.broken is None and self.video.duration and shown is not None and facts.stop is None:
            remaining = (self.video.start_time or 0) + self.video.duration - shown
            self.last_duration = remaining if 0 < remaining <= LONGEST * step else step

    def _rest_of_sound(self, stop: Fraction, writer: _Writer) -> None:
        """Sound before `stop` that lies behind the picture in the file."""
        missing = {item.index for item in self.others if item.type == "audio"}
        packets = self.container.demux(self.others)
        with suppress(av.FFmpegError):  # damage after the picture that was asked for
            while missing and (packet := next(packets, None)) is not None:
                writer.other_packet(packet)
                if packet.pts is not None and packet.pts * packet.time_base >= stop:
                    missing.discard(packet.stream.index)

    def notes(self) -> list[str]:
        notes = []
        if self.damaged:
            notes.append(f"{self.damaged} frames of the source are damaged; the decoder filled them in")
        if self.moved:
            notes.append(f"{self.moved} frames of the source had no time stamp or one that does not rise; they were given new ones")
        if self.left_out:
            notes.append(f"left out: {', '.join(sorted(self.left_out))}")
        return notes


class _ClipReader:
    """The same of a clip in memory."""

    others: tuple[Any, ...] = ()
    metadata: Mapping[str, str] = {}
    video_metadata = metadata
    chapters: tuple[Any, ...] = ()
    aspect_ratio = None
    broken: str | None = None
    last_duration = 1

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.times: deque[int] = deque()

    def rgb_frames(self, facts: VideoFacts, writer: _Writer, kept: int) -> Iterator[Tensor]:
        clip, written = self.clip, 0
        for number, frame in enumerate(clip.frames):
            if clip.sound is not None:
                until = min(ceil((number + 1) * clip.sample_rate / facts.rate), clip.sound.shape[1])
                writer.sound(clip.sound[:, written:until], written)
                written = until
            if number < kept:
                writer.copy_finished(number)
                continue
            self.times.append(number)
            yield frame[..., :3].movedim(-1, 0).float().cpu()

    def notes(self) -> list[str]:
        return []


def _is_cover(item: Any) -> bool:
    return bool(item.disposition & item.disposition.attached_pic)


def _bits(format: Any) -> int:
    return max(component.bits for component in format.components)


# Colour


def _colour(video: Any, frame: Any) -> tuple[Colour, list[str]]:
    """The colour tags to read and write with, and notes on what was assumed."""
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


_PLANAR = re.compile(r"(yuv[aj]?4\d\dp|gbra?p|gray)(?:(\d+)le)?")


def _planar(format: Any) -> str:
    """The name of a planar little-endian format that holds all that `format` does."""
    if _PLANAR.fullmatch(format.name):
        return format.name
    depth = next((bits for bits in (8, 9, 10, 12, 14, 16) if bits >= _bits(format)), 16)
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


def _to_rgb(frame: Any, colour: Colour) -> Tensor:
    """(3, height, width) float32 in 0..1 of a decoded frame."""
    name = _planar(frame.format)
    if name != frame.format.name:
        frame = frame.reformat(format=name)
    match = _PLANAR.fullmatch(name)
    assert match is not None
    kind, bits = match[1], int(match[2] or 8)
    codes = [_rows(plane, bits) for plane in frame.planes[: 1 if kind == "gray" else 3]]
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


def _to_planes(rgb: Tensor, colour: Colour, bits: int, across: int, down: int) -> list[np.ndarray]:
    """Y, Cb and Cr codes of (3, height, width) in 0..1; chroma is 1 or 2 times coarser `across` and `down`."""
    red, green, blue = rgb.float().clamp(0, 1)
    kr, kb = colour.luma
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    black, white, neutral, unit = colour.scale(bits)
    codes = [_codes(luma, white - black, black, bits)]
    for chroma in ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))):
        if across == 2:  # on the even columns: a quarter, a half, a quarter
            left = torch.cat((chroma[:, :1], chroma[:, 1:-1:2]), 1)
            chroma = chroma[:, ::2] / 2 + (left + chroma[:, 1::2]) / 4
        if down == 2:
            chroma = (chroma[::2] + chroma[1::2]) / 2
        codes.append(_codes(chroma, unit, neutral, bits))
    return codes


def _codes(plane: Tensor, unit: float, zero: float, bits: int) -> np.ndarray:
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


def _rows(plane: Any, bits: int) -> np.ndarray:
    """The plane's memory as (height, width) codes, the padding cut off."""
    kind = np.dtype(np.uint8 if bits == 8 else "<u2")
    rows = np.frombuffer(plane, kind).reshape(plane.height, -1)[:, : plane.width]
    return rows if plane.line_size > 0 else rows[::-1]


# Writing


class _Writer:
    """The file that is being written: a video stream that is encoded, and the other streams of the source."""

    def __init__(
        self,
        path: Path,
        target: Path,
        reader: _Reader | _ClipReader,
        facts: VideoFacts,
        size: tuple[int, int],
        crf: int | None,
        codec: str | None,
        metadata: Mapping[str, str],
    ) -> None:
        self.target, self.facts, self.size = target, facts, (size[0], size[1])
        self.notes: list[str] = []
        self.pixel_format = ""
        self._durations: dict[int, int] = {}
        self._lost = 0  # packets of other streams that could not be written
        self._rounded = False
        self._part: Any | None = None  # what an interrupted run finished
        self._finished: Iterator[Any] = iter(())
        self._shift: Fraction | None = None  # from its stamps to ours, in seconds
        self._copied_dts: Fraction | None = None
        self._waiting: Any | None = None  # a frame whose duration is not known yet
        self._written = self._last_duration = 0
        self._open_video(path, reader, crf, codec)
        self._copied: dict[int, Any] = {}
        self._recoded: dict[int, Any] = {}
        for item in reader.others:
            self._add_other(item)
        if isinstance(reader, _ClipReader) and reader.clip.sound is not None:
            self._add_clip_sound(reader.clip.sound.shape[0], reader.clip.sample_rate)
        self.container.metadata.update({key: value for key, value in reader.metadata.items() if not _TECHNICAL.fullmatch(key)})
        self.container.metadata.update(metadata)
        if reader.chapters and not facts.trimmed:
            self.container.set_chapters(reader.chapters)
        self.container.start_encoding()

    def _open_video(self, path: Path, reader: _Reader | _ClipReader, crf: int | None, codec: str | None) -> None:
        """Open the file with the first encoder that there is."""
        deep = self.facts.bits > 8
        suffix = self.target.suffix.lower()
        names = (codec,) if codec is not None else PREFERRED["webm" if suffix == ".webm" else "mp4", deep]
        reasons = []
        for name in names:
            try:
                encoder = av.codec.Codec(name, "w")
            except ValueError:
                reasons.append(f"{name} is not in this build of PyAV")
                continue
            offered = [format.name for format in encoder.video_formats or ()]
            wanted = FORMATS[True] if deep else FORMATS[False] + FORMATS[True]
            self.pixel_format = next((format for format in wanted if format in offered), "")
            if not self.pixel_format:
                reasons.append(f"{name} writes no {'more than 8 bit ' if deep else ''}Y'CbCr")
                continue
            try:
                self._open_encoder(path, reader, encoder, crf)
                return
            except (ValueError, av.FFmpegError) as error:
                reasons.append(f"{name} refused {self._even[0]} x {self._even[1]} {self.pixel_format} in {suffix} ({error})")
        raise ValueError(f"{self.target} cannot be written with {self.facts.bits} bit: {'; '.join(reasons)}. Use another codec, size or file type")

    def _open_encoder(self, path: Path, reader: _Reader | _ClipReader, encoder: Any, crf: int | None) -> None:
        format = av.VideoFormat(self.pixel_format)
        self._bits = _bits(format)
        self._across, self._down = round(64 / format.chroma_width(64)), round(64 / format.chroma_height(64))
        self._even = ceil(self.size[0] / self._across) * self._across, ceil(self.size[1] / self._down) * self._down
        kind = CONTAINERS[self.target.suffix.lower()]
        # Tags beside the few that MP4 knows, such as a workflow, need their own table.
        options = {"movflags": "+faststart+use_metadata_tags"} if kind in ("mp4", "mov") else {}
        self.container: Any = av.open(f"file:{path}", "w", format=kind, container_options=options)
        settings = ENCODERS.get(encoder.name)
        video: Any = self.container.add_stream(encoder.name, rate=self.facts.rate, options=dict(settings.options) if settings else {})
        quality = crf if crf is not None else settings.crf if settings else None
        context = video.codec_context
        if quality is not None:
            context.options = {**context.options, "crf": str(quality)}
        video.width, video.height = self._even
        video.pix_fmt = self.pixel_format
        video.time_base = context.time_base = self.facts.time_base
        colour = self.facts.colour
        context.colorspace, context.color_range = colour.matrix, colour.range
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        if reader.aspect_ratio:
            context.sample_aspect_ratio = reader.aspect_ratio
        if encoder.name == "libx265" and kind in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # the form that Apple's players take
        if self.facts.display_matrix is not None:
            if hasattr(video, "set_display_matrix"):
                video.set_display_matrix(np.frombuffer(self.facts.display_matrix, np.int32).tolist())
            else:
                self.notes.append(f"the rotation by {self.facts.rotation} degrees was left out: this PyAV cannot write it")
        video.metadata.update({key: value for key, value in reader.video_metadata.items() if not _TECHNICAL.fullmatch(key)})
        context.open()
        if crf is not None and "crf" in context.options:
            self.notes.append(f"crf was left out: {encoder.name} has no such setting")
        self.video = video
        self.codec = encoder.canonical_name
        self._frames = [av.VideoFrame(*self._even, self.pixel_format) for _ in range(2)]
        if self._even != self.size:
            self.notes.append(f"{self.size[0]} x {self.size[1]} became {self._even[0]} x {self._even[1]}: {self.pixel_format} has even sizes only")

    def _add_other(self, item: Any) -> None:
        """Copy a stream of sound or subtitles where the container takes it; encode sound anew where not."""
        kind = self.container.format.name
        if item.codec_context is None:  # FFmpeg has no decoder for it, and neither copies nor decodes it
            self.notes.append(f"a stream of {item.type} in an unknown format was left out")
            return
        name = item.codec_context.name
        if _takes(kind, item):
            out = self._copied[item.index] = self.container.add_stream_from_template(item)
        elif item.type == "subtitle":
            self.notes.append(f"subtitles in {name} were left out: {self.target.suffix} does not take them; .mkv does")
            return
        else:
            source = item.codec_context
            out = self._add_sound(source.sample_rate, source.layout)
            if out is None:
                self.notes.append(f"sound in {name} was left out: it can neither be copied into {self.target.suffix} nor encoded for it")
                return
            self._recoded[item.index] = out
            self.notes.append(f"sound was encoded anew, {name} to {out.codec_context.name}: {self.target.suffix} does not take it as it is")
        out.metadata.update({key: value for key, value in item.metadata.items() if not _TECHNICAL.fullmatch(key)})
        out.disposition = item.disposition.value

    def _add_clip_sound(self, channels: int, sample_rate: int) -> None:
        self._layout = {1: "mono", 6: "5.1", 8: "7.1"}.get(channels, "stereo")
        out = self._add_sound(sample_rate, av.AudioLayout(self._layout))
        if out is None:
            raise ValueError(f"sound of {channels} channels at {sample_rate} Hz cannot be encoded for {self.target}; give 1, 2, 6 or 8 channels")
        self._recoded[CLIP] = out
        self._sample_rate = sample_rate

    def _add_sound(self, sample_rate: int, source: Any) -> Any:
        """A stream to encode sound into, in the first layout that the encoder takes; None: it takes none."""
        codec = "libopus" if self.container.format.name == "webm" else "aac"
        rates = av.codec.Codec(codec, "w").audio_rates
        rate = sample_rate if rates is None or sample_rate in rates else 48000
        usual = {6: "5.1", 8: "7.1"}.get(source.nb_channels, "stereo")
        for layout in dict.fromkeys((source.name, usual, "stereo")):
            trial: Any = av.codec.CodecContext.create(codec, "w")
            trial.sample_rate, trial.layout, trial.format = rate, layout, trial.codec.audio_formats[0]
            try:
                trial.open()
            except (ValueError, av.FFmpegError):
                continue
            out = self.container.add_stream(codec, rate=rate)
            out.layout = layout
            out.bit_rate = 96000 * trial.layout.nb_channels
            if layout != source.name:
                self.notes.append(f"sound in {source.name} became {layout}: {codec} does not take it as it is")
            return out
        return None

    def other_packet(self, packet: Any) -> None:
        """Take a packet of another stream than the picture."""
        index = packet.stream.index
        start, stop = self.facts.start, self.facts.stop
        if self.facts.trimmed and packet.pts is not None:
            time = packet.pts * packet.time_base
            if time < start or (stop is not None and time >= stop):
                return
        try:
            if index in self._recoded:
                for frame in packet.decode():
                    if frame.pts is not None and start:
                        frame.pts -= round(start / frame.time_base)
                    self.container.mux(self._recoded[index].encode(frame))
            elif index in self._copied and packet.size and (packet.dts is not None or packet.pts is not None):
                if start:
                    shift = round(start / packet.time_base)
                    packet.pts = None if packet.pts is None else packet.pts - shift
                    packet.dts = None if packet.dts is None else packet.dts - shift
                packet.stream = self._copied[index]
                self.container.mux(packet)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            self._lost += 1

    def sound(self, samples: Tensor, start: int) -> None:
        """Encode `(channels, samples)` of a clip in memory, of which the first has the number `start`."""
        if not samples.shape[1]:
            return
        frame = av.AudioFrame.from_ndarray(samples.float().cpu().contiguous().numpy(), format="fltp", layout=self._layout)
        frame.sample_rate, frame.pts, frame.time_base = self._sample_rate, start, Fraction(1, self._sample_rate)
        self.container.mux(self._recoded[CLIP].encode(frame))

    def go_on_from(self, part: Path) -> int:
        """Take the picture's packets from the finished part of a run with the same settings, one with each `copy_finished`. Returns how many."""
        with av.open(f"file:{part}") as container:
            times = [packet.pts * packet.time_base for packet in container.demux(video=0) if packet.size]
        self._part = av.open(f"file:{part}")
        video = self._part.streams.video[0]
        self._finished = (packet for packet in self._part.demux(video) if packet.size)
        # MP4 and Matroska have it in another form, which the packets that the encoder will add are not in.
        if self.codec in ("h264", "hevc"):
            annex_b = av.bitstream.BitStreamFilterContext(f"{self.codec}_mp4toannexb", video)
            self._finished = itertools.chain.from_iterable(map(annex_b.filter, self._finished))
        self._part_start = min(times)
        return len(times)

    def copy_finished(self, pts: int) -> None:
        """Write the next packet of the finished part, in the order of decoding. pts: of a frame of the source, in the order of display."""
        packet = next(self._finished)
        if self._shift is None:  # Matroska moves all stamps where one of the sound is negative
            self._shift = pts * self.facts.time_base - self._part_start
        shift = round(self._shift / packet.time_base)
        packet.pts += shift
        if packet.dts is not None:
            packet.dts += shift
            self._copied_dts = packet.dts * packet.time_base
        packet.stream = self.video
        self.container.mux(packet)

    def write(self, rgb: Tensor, pts: int) -> None:
        """Encode (3, height, width) in 0..1."""
        width, height = self.size
        if tuple(rgb.shape) != (3, height, width):
            raise ValueError(f"the operator made frames of shape {tuple(rgb.shape)} for {self.target}; they should be {(3, height, width)}")
        if self._even != self.size:
            rgb = torch.cat((rgb, rgb[..., -1:].expand(-1, -1, self._even[0] - width)), -1)
            rgb = torch.cat((rgb, rgb[..., -1:, :].expand(-1, self._even[1] - height, -1)), -2)
        # Two in turn, one of which waits: a new one each time would leave holes in the heap, which then grows.
        frame = self._frames[self._written % 2]
        frame.make_writable()
        self._written += 1
        planes = [_rows(plane, self._bits) for plane in frame.planes]
        # Bands, because the steps in between need several times the memory of what they convert.
        band = 128 if rgb.device.type == "cpu" else rgb.shape[1]
        for top in range(0, rgb.shape[1], band):
            codes = _to_planes(rgb[:, top : top + band], self.facts.colour, self._bits, self._across, self._down)
            for plane, part, coarser in zip(planes, codes, (1, self._down, self._down), strict=True):
                plane[top // coarser : top // coarser + len(part)] = part
        frame.pts, frame.time_base = pts, self.facts.time_base
        self._rounded |= (pts * self.facts.time_base * 1000).denominator > 1
        self._encode(frame)

    def _encode(self, frame: Any | None) -> None:
        """Encode the frame before this one, which lasts until this one. None: it was the last."""
        waiting, self._waiting = self._waiting, frame
        if waiting is not None:
            self._durations[waiting.pts] = self._last_duration if frame is None else frame.pts - waiting.pts
            self._mux(self.video.encode(waiting))
        if frame is None:
            self._mux(self.video.encode(None))

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            if self._written <= 2:
                packet.dts = packet.pts  # x265 leaves memory that it did not write in there; two frames are never reordered
            if self._copied_dts is not None:  # an encoder that starts anew may count from before the end of the finished part
                packet.dts = max(packet.dts, floor(self._copied_dts / packet.time_base) + 1)
                self._copied_dts = packet.dts * packet.time_base
            self.container.mux(packet)

    def finish(self, last_duration: int) -> None:
        """Write what the encoders still hold, and the file's index. last_duration: of the last frame, in the time base."""
        self._last_duration = last_duration
        if self._waiting is not None:
            self._encode(None)
        for out in self._recoded.values():
            self.container.mux(out.encode(None))
        self.container.close()
        if self._part is not None:
            self._part.close()

    def abandon(self) -> None:
        """Close the file, whatever state it is in; nothing where it is closed."""
        with suppress(Exception):
            self.container.close()
        if self._part is not None:
            self._part.close()

    def summary(self, frames: int, notes: list[str]) -> VideoSummary:
        copied = any(out.type == "audio" for out in self._copied.values())
        audio = "encoded" if CLIP in self._recoded else "re-encoded" if self._recoded else "copied" if copied else "none"
        notes = [*notes, *self.notes]
        if self._lost:
            notes.append(f"{self._lost} damaged packets of sound or subtitles were left out")
        if self._rounded and self.container.format.name in ("matroska", "webm"):
            notes.append(f"time stamps were rounded to milliseconds: {self.target.suffix} has no finer ones")
        return VideoSummary(frames, *self._even, self.codec, self.pixel_format, audio, notes)


# Tags that describe the old file, not the work in it.
_TECHNICAL = re.compile(
    r"(?i)(major_brand|minor_version|compatible_brands|encoder|vendor_id|rotate|(duration|bps|number_of_.*|_statistics_.*)(-\w+)?)"
)


def _takes(kind: str, item: Any) -> bool:
    """Whether a container writes its header with a copy of this stream in it."""
    try:
        with av.open(io.BytesIO(), "w", format=kind) as trial:
            trial.add_stream_from_template(item)
            trial.start_encoding()
    except (ValueError, av.FFmpegError):
        return False
    return True
