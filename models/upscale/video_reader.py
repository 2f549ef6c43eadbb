"""Video files and clips in memory as sources: what they are, their frames as RGB, and the packets of their other streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
from torch import Tensor

from ..errors import FileError
from ..media.containers import INDEXED, BrokenVideoError, Ending, File, first_video, is_cover, open_video, reading_video, source_name
from ..media.ycbcr import BT709, LIMITED, SRGB, Colour, bit_depth, colour_tags, to_rgb

if TYPE_CHECKING:
    from .video_writer import VideoWriter

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


def inspect_video(source: Source, trim: Trim = (0.0, 0.0)) -> VideoFacts:
    """Read the header and decode the first frame. trim: as for `upscale_video`.

    Raises FileNotFoundError, PermissionError, FileError, or ValueError: no frame within the trim.
    """
    if isinstance(source, Clip):
        return _clip_facts(source)
    name = source_name(source)
    with reading_video(name), open_video(source) as container:
        reader = VideoReader(container, name)
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
            raise FileError(f"{name} has no frame from second {float(start):.2f} on; start the trim earlier")
        if frame is None:
            raise BrokenVideoError(f"{name} has a video stream, but not one frame of it can be decoded; export it again")
        if any(trim):
            start = frame.pts * frame.time_base
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
            frames=(0 if any(trim) else video.frames) or round(declared * rate) or None,
            rate=rate,
            time_base=frame.time_base or video.time_base,
            bits=bit_depth(frame.format),
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


class VideoReader:
    """Frames of the first video stream that is not a cover picture, and the packets of the others in between."""

    def __init__(self, container: Any, name: str) -> None:
        self.container, self.name = container, name
        self.video = first_video(container, name)
        self.others: list[Any] = [item for item in container.streams if item.type in ("audio", "subtitle")]
        self.metadata, self.video_metadata = container.metadata, self.video.metadata
        self.chapters: list[Any] = container.chapters() if hasattr(container, "chapters") else []
        self.aspect_ratio = self.video.sample_aspect_ratio
        self.left_out = []
        for item in container.streams:
            if item.type not in ("audio", "subtitle") and item is not self.video:
                self.left_out.append("a cover picture" if is_cover(item) else f"another {item.type} stream")
        if container.format.name.startswith("mov") and self.chapters:
            self.left_out = [what for what in self.left_out if what != "another data stream"]  # the chapters, which are kept
        self.video.thread_type = "AUTO"
        self.video.codec_context.thread_count = 4  # each holds a frame, and a default would be the number of cores
        self.broken: str | None = None  # why the end was not reached
        self.times: deque[int] = deque()  # pts of the frames that were given out and are not written yet
        self.last_duration = 1  # of the last frame, in its time base
        self.damaged = self.moved = 0

    def decoded(self, streams: tuple[Any, ...], other_packet: Callable[[Any], None]) -> Iterator[Any]:
        """Frames of the picture. Packets before the first one may fail: recordings start between key frames."""
        packets = self.container.demux(streams)
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
                self.broken = f"{self.name} is damaged or cut off at second {time:.2f} ({error.strerror}); get a complete copy of it"
                return
            ending.see(packet)
            if frames is None:
                other_packet(packet)
                continue
            for frame in frames:
                seen = True
                time = frame.time or time
                yield frame
        if where := ending.cut_off():
            self.broken = f"{self.name} is cut off at {where}; get a complete copy of it"

    def seek(self, start: Fraction) -> None:
        """To the key frame at or before a time on the file's clock, in files that know where it is; the others are read from their start."""
        if self.container.format.name.startswith(INDEXED):
            self.container.seek(int(start / self.video.time_base), stream=self.video)

    def rgb_frames(self, facts: VideoFacts, writer: VideoWriter, kept: int) -> Iterator[Tensor]:
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
            yield to_rgb(frame, facts.colour)
        # Packets know durations in the order of decoding only; the frame shown last lasts until the stream ends.
        if self.broken is None and self.video.duration and shown is not None and facts.stop is None:
            remaining = (self.video.start_time or 0) + self.video.duration - shown
            self.last_duration = remaining if 0 < remaining <= LONGEST * step else step

    def _rest_of_sound(self, stop: Fraction, writer: VideoWriter) -> None:
        """Sound before `stop` that lies behind the picture in the file."""
        missing = {item.index for item in self.others if item.type == "audio"}
        packets = self.container.demux(self.others)
        with suppress(av.FFmpegError):  # damage after the picture that was asked for
            while missing and (packet := next(packets, None)) is not None:
                writer.other_packet(packet)
                if packet.pts is not None and packet.pts * packet.time_base >= stop:
                    missing.discard(packet.stream.index)

    def notes(self) -> list[str]:
        """Sentences for the user on what of the source is not as it was."""
        notes = []
        if self.damaged:
            notes.append(f"{self.damaged} frames of the source are damaged; the decoder filled them in")
        if self.moved:
            notes.append(f"{self.moved} frames of the source had no time stamp or one that does not rise; they were given new ones")
        if self.left_out:
            notes.append(f"left out: {', '.join(sorted(self.left_out))}")
        return notes


class ClipReader:
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

    def rgb_frames(self, facts: VideoFacts, writer: VideoWriter, kept: int) -> Iterator[Tensor]:
        for number, frame in enumerate(self.clip.frames):
            if writer.sound is not None:
                writer.sound.until(number + 1)
            if number < kept:
                writer.copy_finished(number)
                continue
            self.times.append(number)
            yield frame[..., :3].movedim(-1, 0).float().cpu()

    def notes(self) -> list[str]:
        return []


Reader = VideoReader | ClipReader
