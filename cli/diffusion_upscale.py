"""python -m tessera upscale --diffusion: a clip in chunks of time, each enlarged by a ComfyUI server that runs a diffusion workflow.

The servers run on this machine, one a GPU, or anywhere in the network. A chunk depends on its frames and on the workflow alone, so it does
not matter who computes it, nor how often. Chunks overlap and are blended with the weights of `tiling.stream`; those that are on their way
lie on the disk, so memory depends on neither the clip's length nor the number of servers.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Condition, Thread
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from ..models.media.containers import NO_SPACE, open_video
from ..models.media.picture_files import read_picture
from ..models.media.ycbcr import to_rgb
from ..models.upscale.pictures import NAMED
from ..models.upscale.tiling import stream
from ..models.upscale.video import upscale_video
from ..models.upscale.video_reader import VideoFacts, VideoReader, inspect_video
from ..models.upscale.video_writer import CONTAINERS
from .comfy_client import ComfyClient, PromptFailedError, PromptRefusedError, ServerError, ServerGoneError, ServerStartError
from .comfy_server import HOW_TO_GET, ComfyServer, find_comfy
from .upscale import ProgressLine, find_job, wanted_size
from .workflow_files import read_workflow

NODE = "TesseraPatchUpscaleVideo"
SAVE = "tessera_save"
SUBFOLDER = "tessera"  # of the servers' folders: files at their top would show up in the menus of the nodes
PIECE = 48 * 2**20  # bytes of a file that is sent, more or less: a server takes 100 MB unless it was told otherwise
AHEAD = 2  # chunks for each server that are sent, computed or waiting for those before them
ATTEMPTS = 3  # for a chunk, and failures in a row of a server
# What a node raises for its inputs, and would again on any server.
OF_THE_WORKFLOW = ("ValueError", "TypeError", "KeyError")


class ServersError(ValueError):
    """Servers that failed more often than is put up with."""


STOPS = (KeyboardInterrupt, SystemExit, ServersError)  # they leave what is finished


def run(options: argparse.Namespace) -> None:
    """Do what the command line says. Raises ValueError and OSError before any work where the request cannot be done."""
    _check(options)
    workflow = Workflow.read(options.diffusion)
    source, target = find_job(options.source, options.target, options.overwrite)
    if target.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{target}: --diffusion makes videos; write one of {', '.join(CONTAINERS)}")
    facts = inspect_video(source)
    size = wanted_size(options, facts.width, facts.height)
    workflow.graph[workflow.node]["inputs"] |= _size_inputs(options)
    start = time.monotonic()
    with ExitStack() as stack:
        servers = _connect(options, stack)
        # Beside the result, where there has to be room for a video anyway.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix=f".{target.stem[:64]}.", dir=target.parent)))
        pool = stack.enter_context(Chunks(servers, workflow, folder))
        line = stack.enter_context(ProgressLine(source.name))
        pool.begin(_frames(source, facts), options.chunk, options.chunk_overlap)
        estimate = ceil((facts.frames - options.chunk_overlap) / (options.chunk - options.chunk_overlap)) if facts.frames else 0

        def show(done: int, total: int | None) -> None:
            total = total or max(estimate, done + 1)
            line.show(done / total, f"{done} of {total} chunks on {len(pool)} server{'s'[: len(pool) != 1]}")

        def operator(frames: Tensor) -> Tensor:
            return pool.next(len(frames), size, show)

        try:
            summary = upscale_video(source, target, operator, size, window=options.chunk, overlap=options.chunk_overlap, interrupt=STOPS)
        except ServersError as error:
            raise ServersError(". ".join([str(error), *getattr(error, "__notes__", ())])) from error
    method = f"{pool.finished} chunks on {len(servers)} server{'s'[: len(servers) != 1]}, {time.monotonic() - start:.1f} s"
    print(f"{target}: {summary.width} x {summary.height}, {summary.frames} frames, {method}")
    for note in [*summary.notes, *pool.notes]:
        print(f"  {note}")


def _check(options: argparse.Namespace) -> None:
    if options.diffusion is None:
        raise ValueError("--servers are for diffusion; give the workflow that they shall run with --diffusion")
    for name, default in (("model", "catanet"), ("tile", 256), ("overlap", 32), ("threads", None), ("ray", None)):
        if getattr(options, name) != default:
            raise ValueError(f"--{name} is for networks; with --diffusion the workflow says how patches are made: leave it out")
    if options.workers is not None and (options.servers is not None or options.workers < 1):
        raise ValueError(f"--workers is {options.workers}; use at least 1 for servers on this machine, or name running ones with --servers")
    if not 0 <= options.chunk_overlap < options.chunk:
        raise ValueError(f"--chunk is {options.chunk} and --chunk-overlap {options.chunk_overlap}; the overlap must be from 0 to below the chunk")
    if options.source.is_dir():
        raise ValueError(f"{options.source} is a folder; --diffusion takes one video")


def _size_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about the size, as inputs of the node."""
    if options.size is not None:
        return {"size": "named", "size.name": next(name for name in NAMED if name.lower().startswith(options.size.strip().lower()))}
    kind = "factor" if options.factor is not None else "megapixels"
    return {"size": kind, f"size.{kind}": getattr(options, kind)}


def _connect(options: argparse.Namespace, stack: ExitStack) -> Sequence[ComfyClient]:
    """Servers that answer and have the nodes; those of this machine are started, and stopped with `stack`."""
    servers: Sequence[ComfyClient]
    if options.servers is not None:
        servers = [ComfyClient(url.strip()) for url in options.servers.split(",")]
        silent = [server.url for server in servers if not server.answers()]
        if silent:
            raise ConnectionError(f"no ComfyUI answers at {', '.join(silent)}; check the address, and start ComfyUI there with --listen")
    else:
        comfy = find_comfy()
        if comfy is None:
            raise FileNotFoundError(f"no ComfyUI was found; {HOW_TO_GET}, or name running servers with --servers")
        gpus = torch.cuda.device_count()
        devices = [["--cuda-device", str(index % gpus)] if gpus else [] for index in range(options.workers or max(gpus, 1))]
        servers = started = [ComfyServer(comfy, models=comfy.path / "models", arguments=device) for device in devices]
        for server in started:
            stack.push(server)
        with ThreadPoolExecutor(len(started)) as executor:
            list(executor.map(ComfyServer.__enter__, started))
    for each in servers:
        missing = [name for name in (NODE, "LoadVideo", "GetVideoComponents") if name not in each.get(f"/object_info/{name}")]
        if missing:
            raise ValueError(f"{each.url} has no node {missing[0]}; install Tessera and ComfyUI 0.18.1 or newer there")
    return servers


class Workflow:
    """An API-format workflow of which the upscaling node and what it needs is run, with other frames each time."""

    def __init__(self, graph: dict[str, Any], node: str) -> None:
        self.graph, self.node = graph, node

    @staticmethod
    def read(file: Path) -> Workflow:
        """Raises FileError or ValueError that names the file and what it lacks."""
        graph = read_workflow(file)
        nodes = [name for name, node in graph.items() if node["class_type"] == NODE]
        if len(nodes) != 1:
            raise ValueError(f"{file} has {len(nodes)} nodes of type {NODE} (Patch Upscale Video); it needs one, which gets the frames")
        inputs = graph[nodes[0]]["inputs"]
        for name in [name for name in inputs if name == "image" or name.partition(".")[0] == "size"]:
            del inputs[name]
        needed, links = set[str](), [nodes[0]]
        while links:
            name = links.pop()
            if name not in needed:
                needed.add(name)
                values = [value[0] for value in graph[name]["inputs"].values() if isinstance(value, list) and len(value) == 2]
                links += [value for value in values if isinstance(value, str) and value in graph]
        return Workflow({name: node for name, node in graph.items() if name in needed}, nodes[0])

    def with_frames(self, files: Sequence[str], prefix: str, deep: bool) -> dict[str, Any]:
        """To queue: the frames of these video files, one after the other, enlarged and saved as PNG files of `deep` 16 or of 8 bits."""
        frames, nodes = transfer_in(files)
        upscaled = self.graph[self.node]
        upscaled = {**upscaled, "inputs": {**upscaled["inputs"], "image": frames}}
        return {**self.graph, **nodes, self.node: upscaled, SAVE: transfer_out([self.node, 0], prefix, deep)}


# Frames on the wire, by nodes of ComfyUI itself. Newer servers read and write 16 bits, older ones 8.


def transfer_in(files: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The link to the frames of video files, and the nodes that load them. files: as in a Load Video node."""
    nodes: dict[str, Any] = {}
    frames: list[Any] = []
    for index, file in enumerate(files):
        nodes[f"tessera_video_{index}"] = {"class_type": "LoadVideo", "inputs": {"file": file}}
        nodes[f"tessera_frames_{index}"] = {"class_type": "GetVideoComponents", "inputs": {"video": [f"tessera_video_{index}", 0]}}
        part = [f"tessera_frames_{index}", 0]
        if frames:
            nodes[f"tessera_joined_{index}"] = {"class_type": "ImageBatch", "inputs": {"image1": frames, "image2": part}}
            part = [f"tessera_joined_{index}", 0]
        frames = part
    return frames, nodes


def transfer_out(images: list[Any], prefix: str, deep: bool) -> dict[str, Any]:
    """The node that saves images."""
    if not deep:
        return {"class_type": "PreviewImage", "inputs": {"images": images}}
    how = {"format": "png", "format.bit_depth": "16-bit", "format.input_color_space": "sRGB"}
    return {"class_type": "SaveImageAdvanced", "inputs": {"images": images, "filename_prefix": prefix, **how}}


def takes_16_bits(server: ComfyClient) -> bool:
    """Whether its core nodes hand over more than 8 bits, in and out."""
    components = server.get("/object_info/GetVideoComponents")["GetVideoComponents"]
    return "bit_depth" in components["output_name"] and "SaveImageAdvanced" in server.get("/object_info/SaveImageAdvanced")


def write_frames(frames: Tensor, folder: Path, deep: bool) -> list[Path]:
    """Lossless video files of `(frames, 3, height, width)` in 0..1, each of about PIECE bytes, in a form that servers read without a shift."""
    suffix, codec, kind, top = (".mkv", "ffv1", "gbrp16le", 65535) if deep else (".mov", "png", "rgb24", 255)
    files: list[Path] = []
    rest = iter(frames)
    frame = next(rest, None)
    while frame is not None:
        files.append(folder / f"{len(files):03}{suffix}")
        with av.open(f"file:{files[-1]}", "w") as container:
            video: Any = container.add_stream(codec, rate=25)
            video.height, video.width = frame.shape[1:]
            video.pix_fmt = kind
            size = 0
            while frame is not None and size < PIECE:
                codes = np.ascontiguousarray((frame.movedim(0, -1) * top).round().numpy(), np.uint16 if deep else np.uint8)
                packets = video.encode(av.VideoFrame.from_ndarray(codes, format=kind))
                size += sum(packet.size for packet in packets)
                container.mux(packets)
                frame = next(rest, None)
            container.mux(video.encode(None))
    return files


def read_frame(file: Path, deep: bool) -> Tensor:
    """(3, height, width) in 0..1 of a picture that a server saved."""
    pixels = read_picture(file).pixels[:3]
    if not deep:
        # ComfyUI cuts off what is between two codes, so the middle is the best guess; black and white are mostly what was clamped.
        pixels += ((pixels > 0) & (pixels < 1)) * (0.5 / 255)
    return pixels


def _frames(source: Path, facts: VideoFacts) -> Iterator[Tensor]:
    """What `upscale_video` reads, (3, height, width) in 0..1, to its end or to where it would stop."""
    with open_video(source) as container:
        reader = VideoReader(container, str(source))
        for frame in reader.decoded((reader.video, *reader.others), lambda packet: None):
            if (frame.width, frame.height) != (facts.width, facts.height):
                return
            yield to_rgb(frame, facts.colour)


# Chunks and servers


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

    def next(self, frames: int, size: tuple[int, int], show: Callable[[int, int | None], None]) -> Tensor:
        """The next chunk, `(frames, 3, height, width)`. frames, size (width, height): what it has to be. Raises what made it impossible."""
        with self._changed:
            while not (self._chunks and self._chunks[0].received is not None):
                if self._error is not None:
                    raise self._error
                if self._total == self._taken:
                    raise ValueError("the source changed while it was read; leave it alone until the end")
                show(self.finished, self._total)
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
            show(self.finished, self._total)
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
