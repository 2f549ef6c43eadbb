"""The video file that is written: frames encoded from RGB, other streams packet by packet, time stamps as they were."""

from __future__ import annotations

import io
import itertools
import re
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ..media.sound import LAYOUTS, Sound, SoundWriter
from ..media.ycbcr import bit_depth, plane_codes, to_planes
from .encoders import ENCODERS, PIXEL_FORMATS, PREFERRED
from .video_reader import Clip, ClipReader, Reader

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
CLIP = -1  # index of the sound of a clip in memory, which is no stream of a file


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


class VideoWriter:
    """The file that is being written: a video stream that is encoded, and the other streams of the source."""

    def __init__(
        self,
        path: Path,
        target: Path,
        reader: Reader,
        size: tuple[int, int],
        crf: int | None,
        codec: str | None,
        metadata: Mapping[str, str],
    ) -> None:
        self.target, self.facts, self.size = target, reader.facts, (size[0], size[1])
        self.notes: list[str] = []
        self.pixel_format = ""
        self._durations: dict[int, int] = {}
        self._lost = 0  # packets of other streams that could not be written
        self._rounded = False
        self._part: Any | None = None  # what an interrupted run finished
        self._finished: Iterator[Any] = iter(())
        self._shift: Fraction | None = None  # from its stamps to ours, in seconds
        self._times: deque[int] = deque()  # pts of the frames from which the next packets get their dts
        self._waiting: Any | None = None  # a frame whose duration is not known yet
        self._written = self._last_duration = 0
        self._open_video(path, reader, crf, codec)
        self._copied: dict[int, Any] = {}
        self._recoded: dict[int, Any] = {}
        for item in reader.others:
            self._add_other(item)
        self.sound = self._add_clip_sound(reader.source) if isinstance(reader, ClipReader) else None
        self.container.metadata.update({key: value for key, value in reader.metadata.items() if not _TECHNICAL.fullmatch(key)})
        self.container.metadata.update(metadata)
        if reader.chapters and not self.facts.trimmed:
            self.container.set_chapters(reader.chapters)
        self.container.start_encoding()

    def _open_video(self, path: Path, reader: Reader, crf: int | None, codec: str | None) -> None:
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
            smallest = ENCODERS[name].smallest if name in ENCODERS else 1
            if min(self.size) < smallest:
                reasons.append(f"{name} is unsafe below {smallest} x {smallest} pixels, and this is {self.size[0]} x {self.size[1]}")
                continue
            offered = [format.name for format in encoder.video_formats or ()]
            wanted = PIXEL_FORMATS[True] if deep else PIXEL_FORMATS[False] + PIXEL_FORMATS[True]
            self.pixel_format = next((format for format in wanted if format in offered), "")
            if not self.pixel_format:
                reasons.append(f"{name} writes no {'more than 8 bit ' if deep else ''}Y'CbCr")
                continue
            try:
                self._open_encoder(path, reader, encoder, crf)
                return
            except (ValueError, av.FFmpegError) as error:
                found = getattr(error, "strerror", None) or error  # without the call of FFmpeg's that failed
                reasons.append(f"{name} refused {self._even[0]} x {self._even[1]} {self.pixel_format} in {suffix} ({found})")
        raise ValueError(f"{self.target} cannot be written with {self.facts.bits} bit: {'; '.join(reasons)}. Use another codec, size or file type")

    def _open_encoder(self, path: Path, reader: Reader, encoder: Any, crf: int | None) -> None:
        format = av.VideoFormat(self.pixel_format)
        self._bits = bit_depth(format)
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
        self._early = settings.reordered if settings else 2 * context.has_b_frames  # packets before the first frame's time
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

    def _add_clip_sound(self, clip: Clip) -> SoundWriter | None:
        if clip.sound is None:
            return None
        channels, rate = len(clip.sound), clip.sample_rate
        layout = LAYOUTS.get(channels)
        out = None if layout is None else self._add_sound(rate, av.AudioLayout(layout))
        if out is None:
            raise ValueError(f"sound of {channels} channels at {rate} Hz cannot be encoded for {self.target}; give 1, 2, 6 or 8 channels")
        self._recoded[CLIP] = out
        return SoundWriter(self.container, out, Sound(clip.sound, rate), self.facts.rate)

    def _add_sound(self, sample_rate: int, source: Any) -> Any:
        """A stream to encode sound into, in the first layout that the encoder takes; None: it takes none."""
        if not source.nb_channels:  # in a damaged header
            return None
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
        index, start = packet.stream.index, self.facts.start
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

    def go_on_from(self, part: Path) -> int:
        """Take the picture's packets from the finished part of a run with the same settings, one with each `copy_finished`.

        Returns how many there are; 0, and a note, where the file is not such a part.
        """
        times: list[Fraction] = []
        with suppress(av.FFmpegError), av.open(f"file:{part}") as container:
            contexts = [(item.codec_context, item) for item in container.streams.video if item.codec_context is not None]
            for context, video in contexts[:1]:
                kind = context.codec.canonical_name, context.pix_fmt, context.width, context.height
                if kind == (self.codec, self.pixel_format, *self._even):
                    times = [packet.pts * packet.time_base for packet in container.demux(video) if packet.size]
        if not times:
            self.notes.append(f"{part.name} could not be continued, and all frames were made anew")
            return 0
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
        self._begin_frame(pts)
        self._mux_picture(packet)

    def write(self, rgb: Tensor, pts: int) -> None:
        """Encode `(3, height, width)` in 0..1. pts: in the time base of the source."""
        width, height = self.size
        if tuple(rgb.shape) != (3, height, width):
            raise ValueError(f"the operator made frames of shape {tuple(rgb.shape)} for {self.target}; they should be {(3, height, width)}")
        if self._even != self.size:
            rgb = torch.cat((rgb, rgb[..., -1:].expand(-1, -1, self._even[0] - width)), -1)
            rgb = torch.cat((rgb, rgb[..., -1:, :].expand(-1, self._even[1] - height, -1)), -2)
        # Two in turn, one of which waits: a new one each time would leave holes in the heap, which then grows.
        frame = self._frames[self._written % 2]
        frame.make_writable()
        planes = [plane_codes(plane, self._bits) for plane in frame.planes]
        # Bands, because the steps in between need several times the memory of what they convert.
        band = 128 if rgb.device.type == "cpu" else rgb.shape[1]
        for top in range(0, rgb.shape[1], band):
            codes = to_planes(rgb[:, top : top + band], self.facts.colour, self._bits, self._across, self._down)
            for plane, part, coarser in zip(planes, codes, (1, self._down, self._down), strict=True):
                plane[top // coarser : top // coarser + len(part)] = part
        frame.pts, frame.time_base = pts, self.facts.time_base
        self._begin_frame(pts)
        self._rounded |= (pts * self.facts.time_base * 1000).denominator > 1
        self._encode(frame)

    def _begin_frame(self, pts: int) -> None:
        self._times.append(pts)
        self._written += 1
        if self.sound is not None:
            self.sound.until(self._written)

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
            self._mux_picture(packet)

    def _mux_picture(self, packet: Any) -> None:
        """Write the next packet in the order of decoding, at the time of the frame shown so many before as the encoder reorders.

        The stamps of its own do not go on where a finished part ends, Matroska keeps none, and x265 leaves those of short clips unset.
        """
        if self._early:
            self._early -= 1
            time = self._times[0] - self.facts.step * (self._early + 1)
        else:
            time = self._times.popleft()
        packet.dts = min(floor(time * self.facts.time_base / packet.time_base), packet.pts)
        packet.stream = self.video
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

    def close(self) -> None:
        """Close the file, whatever state it is in; nothing where it is closed."""
        with suppress(Exception):
            self.container.close()
        if self._part is not None:
            self._part.close()

    def summary(self, frames: int, notes: list[str]) -> VideoSummary:
        """notes: the reader's, which come before ours."""
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
