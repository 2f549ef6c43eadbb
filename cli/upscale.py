"""python -m tessera upscale: pictures and videos, patch by patch, on this machine's GPUs or on a Ray cluster."""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..models.media.picture_files import PICTURE_FORMATS, fitted, read_picture, write_picture
from ..models.upscale.networks import NetworkFile, built_in, read_network
from ..models.upscale.pictures import NAMED, SMALLEST_TILE, Network, passes, target_size, upscale
from ..models.upscale.tiling import Patch, Progress
from ..models.upscale.video import upscale_video
from ..models.upscale.video_reader import open_reader
from ..models.upscale.video_writer import CONTAINERS
from ..models.upscale.workers import WorkerError, Workers, processes, ray_cluster

BICUBIC = Network(lambda x: x, 1)


def run(options: argparse.Namespace) -> None:
    """Do what the command line says. Raises ValueError and OSError before any work where the request cannot be done."""
    _check(options)
    jobs = find_jobs(options.source, options.target, options.overwrite)
    weights = read_network(Path(options.model)) if options.model not in ("catanet", "bicubic") else None
    if weights is not None:
        weights.load(torch.device("cpu"))  # or is refused, before any work
    failed = []
    with ExitStack() as stack:
        engine = _Engine(options, weights, stack)
        for source, target in jobs:
            work = _video if target.suffix.lower() in CONTAINERS else _picture
            try:
                _do(work, source, target, options, engine)
            except Exception as error:  # one file's fault must not end the folder
                if not options.source.is_dir() or isinstance(error, _EndingError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                    raise
                unknown = f"{source}: an error in Tessera itself. Please report it, with the picture if you can give it away"
                print(error if isinstance(error, ValueError | OSError) else unknown, file=sys.stderr)
                failed.append(source.name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} pictures could not be done: {', '.join(failed)}")


class _EndingError(ValueError):
    """What would happen with every other file as well."""


def _do(work: Callable[..., None], source: Path, target: Path, options: argparse.Namespace, engine: _Engine) -> None:
    try:
        work(source, target, options, engine)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        what = f"there is no memory for a patch of {SMALLEST_TILE} pixels"
        raise ValueError(f"{source}: {what}; close other programs, use a smaller network or fewer --workers") from error
    except WorkerError as error:
        raise _EndingError(f"{source}: {error}") from error


def _check(options: argparse.Namespace) -> None:
    if options.tile < SMALLEST_TILE:
        raise ValueError(f"--tile is {options.tile}; use at least {SMALLEST_TILE}")
    if not 0 <= options.overlap <= options.tile // 2:
        raise ValueError(f"--overlap is {options.overlap} and --tile {options.tile}; use 0 to {options.tile // 2}, half the tile")
    for name in ("workers", "threads"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= 4096:
            raise ValueError(f"--{name} is {value}; use at least 1, and no more than there are cores or GPUs")
    for name, default in (("chunk", 33), ("chunk_overlap", 8)):
        if getattr(options, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is for diffusion models; give the workflow of one with --diffusion, or leave it out")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted_size(options, 1, 1)


def find_jobs(source: Path, target: Path, overwrite: bool) -> list[tuple[Path, Path]]:
    """Files to read and to write. In a folder, those that are there already are left alone."""
    return _jobs_in_folder(source, target, overwrite) if source.is_dir() else [find_job(source, target, overwrite)]


def _jobs_in_folder(source: Path, target: Path, overwrite: bool) -> list[tuple[Path, Path]]:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "IN is a folder, so OUT must be one too", str(target))
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the folder of the sources itself; choose another one for the results")
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(path for path in source.iterdir() if path.is_file() and path.suffix.lower() in readable and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{source} holds no pictures; name a folder with pictures, or a file")
    jobs = [(path, target / (path.name if path.suffix.lower() in PICTURE_FORMATS else f"{path.name}.png")) for path in found]
    sources: dict[Path, Path] = {}
    for path, result in jobs:
        if result in sources:  # one would replace the other
            raise ValueError(f"{sources[result]} and {path} would both be written as {result}; rename one of them")
        sources[result] = path
    waiting = [job for job in jobs if overwrite or not job[1].exists()]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} results are in {target} already and were left alone; --overwrite makes them again")
    target.mkdir(parents=True, exist_ok=True)
    return waiting


def find_job(source: Path, target: Path, overwrite: bool) -> tuple[Path, Path]:
    """The file to read and that to write. Raises ValueError and OSError that say why there is none."""
    if not source.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file or folder; check the path", str(source))
    if target.is_dir():
        target = target / source.name
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist; make it first", str(target.parent))
    suffix = target.suffix.lower()
    if suffix not in PICTURE_FORMATS and suffix not in CONTAINERS:
        written = f"pictures are written as {', '.join(PICTURE_FORMATS)}, videos as {', '.join(CONTAINERS)}"
        raise ValueError(f"{target} ends in {target.suffix!r}; {written}")
    if suffix in PICTURE_FORMATS and source.suffix.lower() in CONTAINERS:
        raise ValueError(f"{source} is a video and {target} a picture; write a video ({', '.join(CONTAINERS)})")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; choose another name for the result")
    if target.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "the file is there already; choose another name, or give --overwrite", str(target))
    return source, target


def wanted_size(options: argparse.Namespace, width: int, height: int) -> tuple[int, int]:
    """(width, height) that --size, --factor or --megapixels asks for, for a source of this size. Raises ValueError."""
    if options.size is None:
        return target_size(width, height, factor=options.factor, megapixels=options.megapixels)
    names = [name for name in NAMED if name.lower().startswith(options.size.strip().lower())]
    if len(names) != 1:
        raise ValueError(f"--size is {options.size!r}; use the beginning of one of {', '.join(NAMED)}")
    return target_size(width, height, name=names[0])


class _Engine:
    """The networks, and where they run; each is made when it is first needed."""

    def __init__(self, options: argparse.Namespace, weights: NetworkFile | None, stack: ExitStack) -> None:
        self.options, self.weights, self.stack = options, weights, stack
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._made: dict[str, _Run] = {}

    def get(self, width: int, height: int, size: tuple[int, int]) -> _Run:
        """What enlarges to this size."""
        factor = max(size[0] / width, size[1] / height)
        if self.options.model == "bicubic" or factor <= 1:
            return _Run(BICUBIC, None, self)
        weights = self.weights or built_in(factor)
        if weights.name not in self._made:
            workers = self._workers(weights)
            # With workers only its scale is needed here.
            network = weights.load(self.device if workers is None else torch.device("cpu"))
            self._made[weights.name] = _Run(network, workers, self)
        return self._made[weights.name]

    def _workers(self, weights: NetworkFile) -> Workers | None:
        options = self.options
        if options.ray is not None:
            return self.stack.enter_context(ray_cluster(weights, options.ray or None, options.workers))
        gpus = torch.cuda.device_count()
        count = options.workers or max(gpus, 1)
        if count == 1:
            return None
        return self.stack.enter_context(processes(weights, [f"cuda:{index % gpus}" if gpus else "cpu" for index in range(count)]))


@dataclass(frozen=True)
class _Run:
    """A network and the workers that have it; None: it runs in this process."""

    network: Network
    workers: Workers | None
    engine: _Engine

    def enlarge(self, pixels: Tensor, size: tuple[int, int], tile: int, passes: _Passes) -> Tensor:
        map_patches = None if self.workers is None else self.workers.map
        overlap, device = min(self.engine.options.overlap, tile // 2), self.engine.device
        with torch.no_grad():
            return upscale(pixels, self.network, size, tile=tile, overlap=overlap, on_patch=passes.on_patch, device=device, map_patches=map_patches)

    def report(self, target: Path, size: tuple[int, int], count: int, what: str, start: float, notes: list[str]) -> None:
        method = f"{count} x {self.network.scale}x network" if count else "bicubic"
        if self.workers is not None:
            method += f", {len(self.workers)} workers"
            notes = notes + self.workers.notes
            self.workers.notes = []
        print(f"{target}: {size[0]} x {size[1]}, {what}{method}, {time.monotonic() - start:.1f} s")
        for note in notes:
            print(f"  {note}")


class _Passes:
    """The passes of the network over one picture, as `on_patch` sees them."""

    def __init__(self, count: int, scale: int, line: ProgressLine | None = None) -> None:
        self.shares = [scale ** (2 * index) for index in range(count)]  # each has as many times more to do
        self.line = line
        self.states: list[Progress] = []

    def on_patch(self, state: Progress, patch: Patch, canvas: Tensor) -> None:
        if not self.states or self.states[-1] is not state:
            self.states.append(state)
        if self.line is not None:
            number = len(self.states)
            done = (sum(self.shares[: number - 1]) + self.shares[number - 1] * state.done / state.total) / sum(self.shares)
            which = f" of pass {number} of {len(self.shares)}" if len(self.shares) > 1 else ""
            self.line.show(done, f"patch {state.done} of {state.total}{which}")

    @property
    def steps_down(self) -> list[str]:
        return max((state.steps_down for state in self.states), key=len, default=[])


def _picture(source: Path, target: Path, options: argparse.Namespace, engine: _Engine) -> None:
    start = time.monotonic()
    picture = read_picture(source)
    height, width = picture.pixels.shape[-2:]
    size = wanted_size(options, width, height)
    picture = fitted(picture, target, size)
    run = engine.get(width, height, size)
    count = passes(width, height, size, run.network.scale)
    with ProgressLine(source.name) as line:
        seen = _Passes(count, run.network.scale, line)
        try:
            pixels = run.enlarge(picture.pixels, size, options.tile, seen)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    write_picture(target, replace(picture, pixels=pixels))
    run.report(target, size, count, "", start, [*picture.notes, *seen.steps_down])


def _video(source: Path, target: Path, options: argparse.Namespace, engine: _Engine) -> None:
    start = time.monotonic()
    steps_down: list[str] = []
    with open_reader(source) as reader, ProgressLine(source.name) as line:
        size = wanted_size(options, reader.facts.width, reader.facts.height)
        run = engine.get(reader.facts.width, reader.facts.height, size)
        count = passes(reader.facts.width, reader.facts.height, size, run.network.scale)

        def operator(frames: Tensor) -> Tensor:
            seen = _Passes(count, run.network.scale)
            out = run.enlarge(frames[0], size, options.tile >> len(steps_down), seen)
            steps_down.extend(seen.steps_down)  # the next frame would not fit either
            return out[None]

        def on_frame(done: int, total: int | None, frame: Tensor | None) -> None:
            line.show(done / max(total, done, 1) if total else None, f"frame {done}" + (f" of {max(total, done)}" if total else ""))

        summary = upscale_video(reader, target, operator, size, on_frame=on_frame, interrupt=(KeyboardInterrupt, SystemExit))
    run.report(target, (summary.width, summary.height), count, f"{summary.frames} frames, ", start, [*summary.notes, *steps_down])


class ProgressLine:
    """A line on stderr that is written over on a terminal; elsewhere a new one every tenth of the way."""

    def __init__(self, name: str) -> None:
        self.name, self.start = name, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self._tenths = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self, done: float | None, what: str) -> None:
        """done: share of all the work; None: unknown."""
        text = f"{self.name}: {what}"
        if done:
            left = round((time.monotonic() - self.start) * (1 - done) / done)
            text += f", {done:.0%}, {left // 60}:{left % 60:02} left"
        if self.terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif done and int(done * 10) > self._tenths:
            self._tenths = int(done * 10)
            print(text, file=sys.stderr, flush=True)
