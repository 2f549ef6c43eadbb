"""python -m tessera upscale --diffusion: a clip in chunks of time, each enlarged by a ComfyUI server that runs a diffusion workflow.

The servers run on this machine, one a GPU, or anywhere in the network. A chunk depends on its frames and on the workflow alone, so it does
not matter who computes it, nor how often. Chunks overlap and are blended with the weights of `tiling.stream`; those that are on their way
lie on the disk, so memory depends on neither the clip's length nor the number of servers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..models.upscale.pictures import NAMED
from ..models.upscale.video import upscale_video
from ..models.upscale.video_reader import Frame, inspect_video, open_reader
from ..models.upscale.video_writer import CONTAINERS
from .chunks import Chunks, ServersError
from .comfy_client import ComfyClient
from .comfy_server import HOW_TO_GET, ComfyServer, find_comfy
from .diffusion_workflow import NODE, Workflow
from .upscale import ProgressLine, find_job, wanted_size

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
        pool.begin(_frames(source), options.chunk, options.chunk_overlap)
        estimate = ceil((facts.frames - options.chunk_overlap) / (options.chunk - options.chunk_overlap)) if facts.frames else 0

        def on_chunk(done: int, total: int | None) -> None:
            total = total or max(estimate, done + 1)
            line.show(done / total, f"{done} of {total} chunks on {len(pool)} server{'s'[: len(pool) != 1]}")

        def operator(frames: Tensor) -> Tensor:
            return pool.next(len(frames), size, on_chunk)

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


def _frames(source: Path) -> Iterator[Tensor]:
    """What `upscale_video` reads, (3, height, width) in 0..1, to its end or to where it would stop."""
    with open_reader(source) as reader:
        for item in reader:
            if isinstance(item, Frame):
                yield item.rgb()
