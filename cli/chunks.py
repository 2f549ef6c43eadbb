"""The chunks of a clip, computed by servers that may fail, ahead of the one that is wanted next."""

from __future__ import annotations

import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from threading import Condition, Thread

import torch
from torch import Tensor

from ..models.media.containers import NO_SPACE
from ..models.upscale.tiling import stream
from .comfy_client import ComfyClient, PromptFailedError, PromptRefusedError, ServerError, ServerGoneError, ServerStartError
from .comfy_server import ComfyServer
from .diffusion_workflow import NODE, SAVE, Workflow, read_frame, takes_16_bits, write_frames

SUBFOLDER = "tessera"  # of the servers' folders: files at their top would show up in the menus of the nodes
AHEAD = 2  # chunks for each server that are sent, computed or waiting for those before them
ATTEMPTS = 3  # for a chunk, and failures in a row of a server
# What a node raises for its inputs, and would again on any server.
OF_THE_WORKFLOW = ("ValueError", "TypeError", "KeyError")


class ServersError(ValueError):
    """Servers that failed more often than is put up with."""


@dataclass(eq=False)
class _Chunk:
    """folder: on the disk, for the files that are sent and the pictures that come back."""

    number: int
    frames: int
    folder: Path
    sent: list[Path]
    attempts: int = 0
    failed_on: set[ComfyClient] = field(default_factory=set)
    received: list[Path] | None = None


class _Closed(Exception):  # noqa: N818  (no error: how the thread that reads ahead ends)
    pass


class Chunks:
    """The chunks of a clip, given to servers ahead of the one that is wanted next. Use it in a `with` statement.

    A chunk whose server fails or vanishes is computed by another. A server is left out after three failures in a row, when it does not
    answer any more, or when it refuses the workflow; one of this machine that does not answer is started anew.
    """

    def __init__(self, servers: Sequence[ComfyClient], workflow: Workflow, folder: Path) -> None:
        self.notes: list[str] = []  # what failed and was done again, for the user
        self.finished = 0
        self._workflow, self._folder = workflow, folder
        self._deep = all(takes_16_bits(server) for server in servers)
        self._token = secrets.token_hex(4)
        self._changed = Condition()  # guards all that follows
        self._servers = list(servers)
        self._limit = AHEAD * len(servers)
        self._chunks: deque[_Chunk] = deque()  # read and not yet taken, in order
        self._waiting: list[_Chunk] = []  # those of them that no server has
        self._running: dict[ComfyClient, str] = {}  # prompts
        self._read = self._taken = 0
        self._total: int | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [Thread(target=self._serve, args=(server,), daemon=True) for server in servers]

    def __len__(self) -> int:
        return len(self._servers)

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            running = dict(self._running)
        for server, prompt_id in running.items():
            with suppress(ServerError):
                server.cancel(prompt_id)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(60)  # one may wait for a server that is silent

    def begin(self, frames: Iterator[Tensor], chunk: int, overlap: int) -> None:
        """Start to read, and to compute."""

        def read() -> None:
            try:
                deque(stream(self._submit, frames, chunk, overlap), maxlen=0)  # for its windows; the blending takes place elsewhere
                with self._changed:
                    self._total = self._read
                    self._changed.notify_all()
            except _Closed:
                pass
            except Exception as error:
                self._fail(error)

        self._threads.append(Thread(target=read, daemon=True))
        for thread in self._threads:
            thread.start()

    def next(self, frames: int, size: tuple[int, int], on_chunk: Callable[[int, int | None], None]) -> Tensor:
        """The next chunk, `(frames, 3, height, width)`. frames, size (width, height): what it has to be. Raises what made it impossible."""
        with self._changed:
            while not (self._chunks and self._chunks[0].received is not None):
                if self._error is not None:
                    raise self._error
                if self._total == self._taken:
                    raise ValueError("the source changed while it was read; leave it alone until the end")
                on_chunk(self.finished, self._total)
                self._changed.wait(1)
            chunk = self._chunks[0]
        assert chunk.received is not None
        if chunk.frames != frames:
            raise ValueError("the source changed while it was read; leave it alone until the end")
        out = torch.empty(frames, 3, size[1], size[0])
        for index, file in enumerate(chunk.received):
            frame = read_frame(file, self._deep)
            if frame.shape != out.shape[1:]:
                found = f"{frame.shape[2]} x {frame.shape[1]}"
                raise ValueError(f"the servers' node {NODE} made {found} and not {size[0]} x {size[1]}; use the same version of Tessera everywhere")
            out[index] = frame
        shutil.rmtree(chunk.folder)
        with self._changed:
            self._chunks.popleft()
            self._taken += 1
            self._changed.notify_all()
            on_chunk(self.finished, self._total)
        return out

    def _submit(self, window: Tensor) -> Tensor:
        """Put a window of the source on the disk as a chunk, when there is room for one."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._chunks) < self._limit or self._closed)
            if self._closed:
                raise _Closed
        folder = self._folder / str(self._read)
        folder.mkdir()
        chunk = _Chunk(self._read, len(window), folder, write_frames(window, folder, self._deep))
        with self._changed:
            self._read += 1
            self._chunks.append(chunk)
            self._waiting.append(chunk)
            self._changed.notify_all()
        return torch.zeros(len(window))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _serve(self, server: ComfyClient) -> None:
        """The life of a server's thread."""
        failures = 0
        try:
            while (chunk := self._take(server)) is not None:
                try:
                    received = self._compute(server, chunk)
                except (OSError, RuntimeError) as error:
                    if getattr(error, "errno", None) in NO_SPACE:
                        raise
                    if isinstance(error, PromptFailedError) and error.body["exception_type"] in OF_THE_WORKFLOW:
                        raise ServersError(f"chunk {chunk.number + 1} on {server.url}: {error}") from error
                    failures += 1
                    self._put_back(chunk, server, error)
                    if isinstance(error, PromptRefusedError) or failures == ATTEMPTS or not self._is_up(server):
                        self._leave_out(server, error)
                        return
                else:
                    failures = 0
                    with self._changed:
                        chunk.received = received
                        self.finished += 1
                        self._changed.notify_all()
        except Exception as error:
            self._fail(error)

    def _take(self, server: ComfyClient) -> _Chunk | None:
        """The first chunk that waits for this server; not one that failed on it, as long as others may do that. None: the end."""

        def find() -> _Chunk | None:
            mine = (chunk for chunk in self._waiting if server not in chunk.failed_on or chunk.failed_on.issuperset(self._servers))
            return next(mine, None)

        with self._changed:
            self._changed.wait_for(lambda: self._closed or find() is not None)
            chunk = None if self._closed else find()
            if chunk is not None:
                self._waiting.remove(chunk)
            return chunk

    def _put_back(self, chunk: _Chunk, server: ComfyClient, error: BaseException) -> None:
        with self._changed:
            if self._closed:
                return
            chunk.attempts += 1
            chunk.failed_on.add(server)
            self._waiting.insert(0, chunk)
            self.notes.append(f"chunk {chunk.number + 1} failed on {server.url} and was computed again: {_first_line(error)}")
            if chunk.attempts == ATTEMPTS:
                self._error = ServersError(f"chunk {chunk.number + 1} failed {ATTEMPTS} times, the last time on {server.url}: {error}")
            self._changed.notify_all()

    def _leave_out(self, server: ComfyClient, error: BaseException) -> None:
        with self._changed:
            if self._closed:
                return
            self._servers.remove(server)
            self.notes.append(f"{server.url} was left out from then on")
            if not self._servers and self._error is None:
                self._error = ServersError(f"no server is left; the last one, {server.url}, failed with: {error}")
            self._changed.notify_all()

    def _is_up(self, server: ComfyClient) -> bool:
        """Whether it may go on. One of this machine that is silent is started anew."""
        if server.answers():
            return True
        if not isinstance(server, ComfyServer) or self._closed:
            return False
        try:
            server.__exit__()
            server.__enter__()
        except ServerStartError:
            return False
        return True

    def _compute(self, server: ComfyClient, chunk: _Chunk) -> list[Path]:
        """The pictures that the server made of a chunk, as files in its folder."""
        name = f"{self._token}_{chunk.number}_{chunk.attempts}"
        there = [{"filename": f"{name}_{path.name}", "subfolder": SUBFOLDER, "type": "temp"} for path in chunk.sent]
        graph = self._workflow.with_frames([f"{SUBFOLDER}/{file['filename']} [temp]" for file in there], f"{SUBFOLDER}/{name}", self._deep)
        for path, file in zip(chunk.sent, there, strict=True):
            server.upload(path.read_bytes(), file)
        prompt_id = server.queue(graph)
        with self._changed:
            self._running[server] = prompt_id
            closed = self._closed
        try:
            if closed:
                server.cancel(prompt_id)
            pictures = server.wait(prompt_id, inf).outputs.get(SAVE, {}).get("images", [])
        except ServerGoneError:
            with suppress(ServerError):  # it may have come back, and be at it still
                server.cancel(prompt_id)
            raise
        finally:
            with self._changed:
                del self._running[server]
        if len(pictures) != chunk.frames:
            raise RuntimeError(f"{len(pictures)} pictures came back for {chunk.frames} frames")
        received = []
        for index, picture in enumerate(pictures):
            received.append(chunk.folder / f"{index:05}.png")
            received[-1].write_bytes(server.fetch(picture))
        with suppress(ServerError):
            for file in (*there, *pictures):
                server.upload(b"", file)  # ComfyUI has no way to remove a file, but an empty one takes no room
        return received


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
