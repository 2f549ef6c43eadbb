"""Video file to video file, frame by frame: decode, apply an operator to RGB frames, encode. Memory does not depend on the clip's length."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

import av
import torch
from torch import Tensor

from ..media.containers import BrokenVideoError, check_file, open_video, source_name, write_error
from .tiling import Operator, stream
from .video_reader import Clip, ClipReader, Source, Trim, VideoReader, inspect_video
from .video_writer import CONTAINERS, VideoSummary, VideoWriter

OnFrame = Callable[[int, int | None, Tensor | None], None]


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

    Raises ValueError for what cannot be done, FileError for a source that cannot be read, FileNotFoundError, PermissionError, and OSError
    where the disk is full.
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
    writer: VideoWriter | None = None
    try:
        with nullcontext() if isinstance(source, Clip) else open_video(source) as container:
            reader = ClipReader(source) if isinstance(source, Clip) else VideoReader(container, source_name(source))
            writer = VideoWriter(temporary, target, reader, facts, size, crf, codec, metadata or {})
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
        raise write_error(error, target, done, "another codec or file type") from error
    finally:
        if writer is not None:
            writer.abandon()
        with suppress(OSError):
            temporary.unlink()


def _check_paths(source: Source, target: Path, part: Path) -> None:
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


def _add_note(error: BaseException, note: str) -> None:
    """`error.add_note`, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
