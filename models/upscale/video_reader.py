"""Video files and clips in memory as sources: what they are, their frames as RGB, the packets of their other streams, and how they end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import av
import torch
from torch import Tensor

from ..errors import FileError
from ..media.containers import INDEXED, BrokenVideoError, Ending, File, first_video, is_cover, open_video, reading_video, source_name
from ..media.ycbcr import BT709, LIMITED, SRGB, Colour, bit_depth, colour_tags, to_rgb

TOLERANCE = Fraction(1, 10**6)  # seconds, of a trim
LONGEST = 250  # a last frame is taken to last no more than this many frames of the average rate


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


Source = File | Clip
Trim = tuple[float, float]


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

    @property
    def step(self) -> int:
        """A frame at the average rate, in the time base."""
        return max(round(1 / (self.rate * self.time_base)), 1)


@dataclass(frozen=True)
class Frame:
    """A frame of a source. pts: in the time base of its facts, rising. rgb: makes `(3, height, width)` float32 in 0..1 of it."""

    pts: int
    rgb: Callable[[], Tensor]


@dataclass(frozen=True)
class End:
    """The end of a source, as far as it was read.

    last_duration: of the last frame, in the time base. broken: why the rest could not be read, a sentence but for its full stop. notes:
    sentences for the user on what is not as it was in the source.
    """

    last_duration: int
    broken: str | None = None
    notes: tuple[str, ...] = ()


class VideoReader:
    """The first video stream that is not a cover picture: frames, and the packets of sound and subtitles in between.

    Reads up to the first frame at once, the rest when it is iterated, once. trim: as for `upscale_video`.
    """

    def __init__(self, container: Any, source: File, trim: Trim = (0.0, 0.0)) -> None:
        self.container, self.source, self.name = container, source, source_name(source)
        self.video = first_video(container, self.name)
        self.others: list[Any] = [item for item in container.streams if item.type in ("audio", "subtitle")]
        self.metadata, self.video_metadata = container.metadata, self.video.metadata
        self.chapters: list[Any] = container.chapters() if hasattr(container, "chapters") else []
        self.aspect_ratio = self.video.sample_aspect_ratio
        self.video.thread_type = "AUTO"
        self.video.codec_context.thread_count = 4  # each holds a frame, and a default would be the number of cores
        self._broken: str | None = None
        self._items = self._decoded()
        self._first: Iterator[Any] = iter(())  # what was read to know the facts
        self.facts = self._inspect(trim)

    def _inspect(self, trim: Trim) -> VideoFacts:
        container, video, trimmed = self.container, self.video, any(trim)
        declared = video.duration * video.time_base if video.duration else Fraction(container.duration or 0, av.time_base)
        # A broadcast clock starts anywhere; other files mean what they say.
        start = Fraction(container.start_time or 0, av.time_base) if container.format.name in ("mpegts", "mpeg") else Fraction(0)
        stop: Fraction | None = None
        if trimmed:
            begin = Fraction(trim[0]).limit_denominator(av.time_base)
            begin = max(declared + begin, Fraction(0)) if begin < 0 else begin
            length = Fraction(trim[1]).limit_denominator(av.time_base)
            start += begin
            stop = start + length if length else None
            declared = max(min(declared - begin, length or declared), Fraction(0))
            if container.format.name.startswith(INDEXED):  # to the key frame before; the others are read from their start
                container.seek(int(start / video.time_base), stream=video)
        first = self._up_to_frame(start if trimmed else None)
        frame, self._first = first[-1], iter(first)
        rate = video.average_rate or video.guessed_rate or Fraction(24)
        colour, notes = colour_tags(video, frame)
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
            frames=(0 if trimmed else video.frames) or round(declared * rate) or None,
            rate=rate,
            time_base=frame.time_base or video.time_base,
            bits=bit_depth(frame.format),
            colour=colour,
            rotation=frame.rotation,
            notes=tuple(notes),
            display_matrix=side_data.get("DISPLAYMATRIX"),
            start=frame.pts * frame.time_base if trimmed else start,
            stop=stop,
            trimmed=trimmed,
        )

    def _up_to_frame(self, start: Fraction | None) -> list[Any]:
        """From a time on, None: of all, to the first frame. Raises FileError where there is none."""
        found = []
        for item in self._items:
            time = _time(item)
            if start is None or (time is not None and time >= start - TOLERANCE):
                found.append(item)
                if not isinstance(item, av.Packet):
                    return found
        if start is not None:
            raise FileError(f"{self.name} has no frame from second {float(start):.2f} on; start the trim earlier")
        raise BrokenVideoError(f"{self.name} has a video stream, but not one frame of it can be decoded; export it again")

    def _decoded(self) -> Iterator[Any]:
        """Frames of the picture and packets of the others. Packets before the first frame may fail: recordings start between key frames."""
        packets = self.container.demux((self.video, *self.others))
        time, seen, ending = 0.0, False, Ending(self.container, self.video)
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
                self._broken = f"{self.name} is damaged or cut off at second {time:.2f} ({error.strerror}); get a complete copy of it"
                return
            ending.see(packet)
            if frames is None:
                yield packet
                continue
            for frame in frames:
                seen = True
                time = frame.time or time
                yield frame
        if where := ending.cut_off():
            self._broken = f"{self.name} is cut off at {where}; get a complete copy of it"

    def _within(self) -> Iterator[Any]:
        """The same from the first frame on, as far as was asked for."""
        start, stop = self.facts.start, self.facts.stop
        for item in itertools.chain(self._first, self._items):
            time = _time(item) if self.facts.trimmed else None
            if time is None or (time >= start and (stop is None or time < stop - TOLERANCE)):
                yield item
            elif stop is not None and time >= start and not isinstance(item, av.Packet):
                yield from self._rest_of_sound(start, stop)
                return

    def _rest_of_sound(self, start: Fraction, stop: Fraction) -> Iterator[Any]:
        """Sound before `stop` that lies behind the picture in the file."""
        missing = {item.index for item in self.others if item.type == "audio"}
        packets = self.container.demux(self.others)
        with suppress(av.FFmpegError):  # damage after the picture that was asked for
            while missing and (packet := next(packets, None)) is not None:
                time = _time(packet)
                if time is None or start <= time < stop:
                    yield packet
                elif time >= stop:
                    missing.discard(packet.stream.index)

    def __iter__(self) -> Iterator[Frame | av.Packet[Any] | End]:
        facts = self.facts
        last = shown = None
        damaged = moved = 0
        for item in self._within():
            if isinstance(item, av.Packet):
                yield item
                continue
            if (item.width, item.height) != (facts.width, facts.height):
                sizes = f"{facts.width} x {facts.height} to {item.width} x {item.height}"
                self._broken = f"{self.name} changes its size from {sizes} at second {item.time or 0:.2f}; export it with one size"
                break
            pts = None if item.pts is None else item.pts - round(facts.start / facts.time_base)
            if pts is None or (last is not None and pts <= last):
                moved += 1
                pts = 0 if last is None else last + (facts.step if pts is None else 1)
            damaged += item.is_corrupt
            last, shown = pts, item.pts
            yield Frame(pts, partial(to_rgb, item, facts.colour))
        yield End(self._last_duration(shown), self._broken, tuple(self._notes(damaged, moved)))

    def _last_duration(self, shown: int | None) -> int:
        """Packets know durations in the order of decoding only; the frame shown last lasts until the stream ends."""
        step = self.facts.step
        if self._broken is not None or not self.video.duration or shown is None or self.facts.stop is not None:
            return step
        remaining = (self.video.start_time or 0) + self.video.duration - shown
        return remaining if 0 < remaining <= LONGEST * step else step

    def _notes(self, damaged: int, moved: int) -> Iterator[str]:
        if damaged:
            yield f"{damaged} frames of the source are damaged; the decoder filled them in"
        if moved:
            yield f"{moved} frames of the source had no time stamp or one that does not rise; they were given new ones"
        others = [item for item in self.container.streams if item.type not in ("audio", "subtitle") and item is not self.video]
        left_out = ["a cover picture" if is_cover(item) else f"another {item.type} stream" for item in others]
        if self.container.format.name.startswith("mov") and self.chapters:
            left_out = [what for what in left_out if what != "another data stream"]  # the chapters, which are kept
        if left_out:
            yield f"left out: {', '.join(sorted(left_out))}"


class ClipReader:
    """The same of a clip in memory, which has no packets."""

    others: tuple[Any, ...] = ()
    metadata: Mapping[str, str] = {}
    video_metadata = metadata
    chapters: tuple[Any, ...] = ()
    aspect_ratio = None

    def __init__(self, clip: Clip) -> None:
        self.source, self.facts = clip, _clip_facts(clip)

    def __iter__(self) -> Iterator[Frame | av.Packet[Any] | End]:
        for number, frame in enumerate(self.source.frames):
            yield Frame(number, partial(frame[..., :3].movedim(-1, 0).to, "cpu", torch.float32))
        yield End(1)


def _clip_facts(clip: Clip) -> VideoFacts:
    if clip.frames.ndim != 4 or not len(clip.frames) or min(clip.frames.shape) < 1 or clip.frames.shape[3] < 3:
        raise ValueError(f"the clip is {tuple(clip.frames.shape)} (frames, height, width, channels); give at least one frame of 3 channels")
    rate = clip.rate.limit_denominator(1001)
    count, height, width, channels = clip.frames.shape
    notes = ("the transparency of the source was left out: this form carries opaque video",) if channels > 3 else ()
    return VideoFacts(width, height, count, rate, 1 / rate, clip.bits, Colour(BT709, LIMITED, BT709, SRGB), 0, notes)


Reader = VideoReader | ClipReader


@contextmanager
def open_reader(source: Source, trim: Trim = (0.0, 0.0)) -> Iterator[Reader]:
    """Open a source and decode its first frame. trim: as for `upscale_video`.

    Raises FileNotFoundError, PermissionError, FileError, or ValueError: no frame within the trim.
    """
    if isinstance(source, Clip):
        yield ClipReader(source)
        return
    with reading_video(source_name(source)):
        container = open_video(source)
    with container:
        with reading_video(source_name(source)):
            reader = VideoReader(container, source, trim)
        yield reader


def inspect_video(source: Source, trim: Trim = (0.0, 0.0)) -> VideoFacts:
    """What `open_reader` finds out, and nothing kept open."""
    with open_reader(source, trim) as reader:
        return reader.facts


def _time(item: Any) -> Fraction | None:
    """When a frame or packet is shown, in seconds on the file's clock."""
    return None if item.pts is None else item.pts * item.time_base
