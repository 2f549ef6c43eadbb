"""Video file to video file, frame by frame: decode, apply an operator to RGB frames, encode. Memory does not depend on the clip's length."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import av
import torch
from torch import Tensor

from ..media.atomic import unfinished
from ..media.containers import BrokenVideoError, check_file, write_error
from .tiling import Operator, stream
from .video_reader import End, Frame, Reader, Source, Trim, open_reader
from .video_writer import CONTAINERS, VideoSummary, VideoWriter

OnFrame = Callable[[int, int | None, Tensor | None], None]


def upscale_video(
    source: Source | Reader,
    target: str | os.PathLike[str],
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
    part: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> VideoSummary:
    """Apply `operator` to the frames of a video file and write the result to another, with its sound, time stamps and colour tags.

    source: path, binary file object that can seek, Clip, or one of them opened, and trimmed, by `open_reader`. target: path in an existing
    folder, .mp4, .mov, .mkv or .webm.
    operator: maps `(frames, 3, height, width)` float32 in 0..1, R'G'B' in the stream's own transfer curve, to `(frames, 3, H, W)`.
    size: (W, H) in pixels; an odd one is made even by repeating the last column or row. window, overlap: frames at a time and shared by
    neighbours (`tiling.stream`). on_frame(done, total, frame): after each frame written, with frame `(3, H, W)`, and once before the first
    with None; total is an estimate or None. crf, codec: the encoder's quality and its name in FFmpeg. trim: seconds to start at, from the
    end if negative, and to take, 0 for all (files only). metadata: tags to write beside those of the source.

    The file gets its name when it is complete; until then, and after an error, `target` is as it was. An exception of class `interrupt`
    leaves what was finished, playable, as `part` (default `<stem>.part<suffix>`), says so in a note on the exception and goes on. So does
    a source that cannot be decoded to its end, as BrokenVideoError. resume: go on after the frames of `part` if it is there, and remove it
    at the end; that it was made of the same source by the same call is the caller's promise. Windows of several frames cannot.

    Raises ValueError for what cannot be done, FileError for a source that cannot be read, FileNotFoundError, PermissionError, and OSError
    where the disk is full.
    """
    target = Path(target)
    part = target.with_name(f"{target.stem}.part{target.suffix}") if part is None else Path(part)
    _check(source.source if isinstance(source, Reader) else source, target, part, size)
    if resume and window > 1:
        raise ValueError(f"window is {window}; windows of several frames cannot be resumed: use window 1 or no resume")
    show = on_frame or (lambda done, total, frame: None)
    with nullcontext(source) if isinstance(source, Reader) else open_reader(source, trim) as reader, _reserved(target) as temporary:
        facts, done = reader.facts, 0
        try:
            with closing(VideoWriter(temporary, target, reader, size, crf, codec, metadata or {})) as writer:
                done = kept = writer.go_on_from(part) if resume and part.is_file() else 0
                frames = _Frames(reader, writer, kept)
                results = stream(operator, frames, window, overlap) if window > 1 else (operator(frame[None])[0] for frame in frames)
                try:
                    with torch.no_grad():
                        show(done, facts.frames, None)
                        for result in results:
                            writer.write(result, frames.times.popleft())
                            done += 1
                            show(done, facts.frames, result)
                    writer.finish(frames.end.last_duration)
                except interrupt as error:
                    if done > kept:
                        with suppress(Exception):  # such as a full disk: it must not hide the interrupt
                            writer.finish(frames.end.last_duration)
                            os.replace(temporary, part)
                            _add_note(error, f"The {done} finished frames are in {part}")
                    raise
        except av.FFmpegError as error:
            raise write_error(error, target, done, "another codec or file type") from error
        if frames.end.broken is not None:
            os.replace(temporary, part)
            raise BrokenVideoError(f"{frames.end.broken}; the {done} frames before that are finished, in {part}")
        _replace(temporary, target, part)
        if kept:
            part.unlink()
        return writer.summary(done, [*facts.notes, *frames.end.notes])


class _Frames:
    """A reader's frames for the operator. What the reader has beside them goes to the writer, in the order of the file.

    kept: how many frames of the start the writer has already.
    """

    def __init__(self, reader: Reader, writer: VideoWriter, kept: int) -> None:
        self.reader, self.writer, self.kept = reader, writer, kept
        self.times: deque[int] = deque()  # pts of the frames that were given out and are not written yet
        self.end = End(reader.facts.step)

    def __iter__(self) -> Iterator[Tensor]:
        for item in self.reader:
            if isinstance(item, End):
                self.end = item
            elif not isinstance(item, Frame):
                self.writer.other_packet(item)
            elif self.kept:
                self.kept -= 1
                self.writer.copy_finished(item.pts)
            else:
                self.times.append(item.pts)
                yield item.rgb()


def _check(source: Source, target: Path, part: Path, size: tuple[int, int]) -> None:
    if target.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{target} ends in {target.suffix!r}, which is no video file that can be written; use {', '.join(CONTAINERS)}")
    if isinstance(source, str | os.PathLike):
        check_file(Path(source))
        # An interrupted run would put its part there.
        if any(path.exists() and Path(source).samefile(path) for path in (target, part)):
            raise ValueError(f"{target} is the source itself, or the source its unfinished part; choose another name for the result")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of the file to write; choose another name", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist; make it first", str(target.parent))
    if min(size) < 1:
        raise ValueError(f"{target}: a size of {size[0]} x {size[1]} was asked for; use at least 1 x 1")


@contextmanager
def _reserved(target: Path) -> Iterator[Path]:
    """`unfinished`, with an empty file there already, by which a folder that cannot be written into is known before any work."""
    with unfinished(target) as temporary:
        try:
            temporary.open("xb").close()
        except OSError as error:
            advice = f"nothing can be written into {target.parent} ({error.strerror}); choose another folder or change its permissions"
            raise type(error)(error.errno, advice, str(target)) from error
        yield temporary


def _replace(temporary: Path, target: Path, part: Path) -> None:
    try:
        os.replace(temporary, target)
    except OSError as error:  # Windows: another program has it open
        os.replace(temporary, part)
        raise type(error)(
            error.errno, f"the file cannot be replaced ({error.strerror}); the finished video is {part.name} beside it", str(target)
        ) from error


def _add_note(error: BaseException, note: str) -> None:
    """`error.add_note`, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
