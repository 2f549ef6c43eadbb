"""Containers of video and sound, opened by FFmpeg, and what is said of those that are broken or cannot be written."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av

from ..errors import FileError, reading

INDEXED = ("matroska", "mov", "avi")  # know their length and their key frames
DENSEST, SMALL = 1 << 13, 1 << 26  # pixels of a frame for a byte of the file, as a codec may make of an empty one; and what is read in any case
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
File = str | os.PathLike[str] | IO[bytes]  # to read; one that is open can seek


class BrokenVideoError(FileError):
    """A file that cannot be decoded, or not to its end."""


@contextmanager
def reading_video(name: str) -> Iterator[None]:
    """`errors.reading` for FFmpeg, which says of damaged bytes what others say of disks and memory."""
    with reading(name, "a video that can be read", "get a complete copy of it, or export it again"):
        try:
            yield
        except av.FFmpegError as error:
            if isinstance(error, PermissionError):
                raise
            raise BrokenVideoError(f"{name} {failure(error, 'damaged')}") from error


def failure(error: Exception, damage: str) -> str:
    """The rest of a sentence about a file that a decoder fails at. damage: what is to be said unless the decoder knows the kind and lacks it."""
    if isinstance(error, av.error.PatchWelcomeError):
        return f"is of a kind that FFmpeg {av.ffmpeg_version_info} does not decode; export it with 8 bits a channel, or as another kind of file"
    return f"is {damage} ({getattr(error, 'strerror', None) or 'the decoder failed'}); get a complete copy of it, or export it again"


def check_size(name: str, width: int, height: int, size: int) -> None:
    """Raises FileError for a frame of more pixels than a file of `size` bytes holds, which would be made room for."""
    if width * height > max(DENSEST * size, SMALL):
        raise FileError(f"{name} claims frames of {width} x {height} pixels in {size:,} bytes, which is no video; export it again")


def check_file(path: Path) -> None:
    """Raises FileNotFoundError, or FileError for a folder and for what has no end, such as a pipe."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file; check the path", str(path))
    if not path.is_file():
        raise FileError(f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'} and no file; choose a video file")


def source_name(source: File) -> str:
    """What messages call it."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "the video given as data"))


def open_video(source: File) -> Any:
    """The `av` container of a path or file object. Raises FileNotFoundError, PermissionError, FileError."""
    file: Any = source
    if isinstance(source, str | os.PathLike):
        check_file(Path(source))
        file = f"file:{os.fspath(source)}"  # because of names with a colon, which would be taken for a protocol
    else:
        file.seek(0)
    try:
        container = av.open(file, metadata_errors="replace")
    except PermissionError as error:
        raise PermissionError(errno.EACCES, "the video may not be read; change its permissions", source_name(source)) from error
    except av.FFmpegError as error:
        what = f"{source_name(source)} is no video, or its beginning or end is missing"
        raise BrokenVideoError(f"{what} ({error.strerror}); export or copy it again") from error
    for item in container.streams.video:
        if item.codec_context is not None:
            check_size(source_name(source), item.codec_context.width, item.codec_context.height, container.size)
    return container


def first_video(container: Any, name: str) -> Any:
    """The first video stream that is not a cover picture. Raises FileError where there is none, or no decoder for it."""
    videos = [item for item in container.streams.video if not is_cover(item)]
    if not videos:
        found = ", ".join(sorted({item.type for item in container.streams})) or "nothing"
        raise FileError(f"{name} has no video stream, only {found}; choose a video file")
    if videos[0].codec_context is None:
        raise FileError(f"{name} has video of a kind that FFmpeg {av.ffmpeg_version_info} does not decode; export it as H.264 or ProRes")
    return videos[0]


def is_cover(item: Any) -> bool:
    return bool(item.disposition & item.disposition.attached_pic)


class Ending:
    """Tells a file that was cut off, which ends like a complete one, by what its header knows of its length.

    `see` all packets of sound, subtitles and `video`, which is its first one. Two lengths count, that of the picture and that of the file.
    """

    def __init__(self, container: Any, video: Any) -> None:
        self.container, self.video = container, video
        self._start: Fraction = (video.start_time or 0) * video.time_base
        self._picture = self._file = self._start  # where they end, in seconds on the file's clock
        self._last: int | None = None
        self._longest = 0  # a frame, in the time base

    def see(self, packet: Any) -> None:
        if packet.pts is None:
            return
        end = (packet.pts + (packet.duration or 0)) * packet.time_base
        self._file = max(self._file, end)
        if packet.stream.index == self.video.index:
            self._picture = max(self._picture, end)
            # By dts, because frames are not stored in the order in which they are shown.
            gap = 0 if packet.dts is None or self._last is None else packet.dts - self._last
            self._longest, self._last = max(self._longest, packet.duration or 0, gap), packet.dts

    def cut_off(self) -> str | None:
        """Where the file ended, "second 1.00 of 2.00"; None: it is whole, or nobody knows."""
        alone = sum(not is_cover(item) for item in self.container.streams.video) == 1
        picture, whole = self._declared(), Fraction(self.container.duration or 0, av.time_base) if self._is_indexed and alone else Fraction(0)
        longest = self._longest * self.video.time_base  # Matroska does not keep how long the last frame lasts
        if picture is not None and self._picture > self._start and picture - self._picture > max(longest, picture / 100):
            return f"second {float(self._picture):.2f} of {float(picture):.2f}"
        if whole - self._file > max(longest, whole / 100, Fraction(1, 4)):
            return f"second {float(self._file):.2f} of {float(whole):.2f}"
        return None

    @property
    def _is_indexed(self) -> bool:
        return bool(self.container.format.name.startswith(INDEXED))

    def _declared(self) -> Fraction | None:
        """Where the picture ends by the header: Matroska has that as a text."""
        match = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", self.video.metadata.get("DURATION", ""))
        if match is not None:
            hours, minutes, seconds = (Fraction(part) for part in match.groups())
            return hours * 3600 + minutes * 60 + seconds
        if self.video.duration and self._is_indexed:  # elsewhere it is an estimate
            length: Fraction = self.video.duration * self.video.time_base
            return self._start + length
        return None


def write_error(error: av.FFmpegError, target: Path, frames: int, advice: str) -> ValueError | OSError:
    """What to raise for FFmpeg's error after so many frames. advice: what to try where neither the disk nor the system is to blame."""
    what = f"{target} could not be written after {frames} frames: {error.strerror}"
    if not isinstance(error, OSError):
        return ValueError(f"{what}; try {advice}")
    return OSError(error.errno, f"{what}; make room there or choose another folder" if error.errno in NO_SPACE else what)
