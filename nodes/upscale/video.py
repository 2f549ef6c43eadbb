"""Patch Upscale Video (network) and Patch Upscale Video File: clips of any length, frame by frame from file to file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui
from torch import Tensor

from ...models.upscale.pictures import passes, upscale
from ...models.upscale.tiling import Progress
from ..comfy import bit_depth_of, check_prefix, existing, input_path, numbered, trim_of, unload_upscale_model
from .pictures import CATEGORY, Display, check_overlap, load_network, network_of, patch_inputs, size_for, size_input

WHOLE = (0.0, 0.0)


def quality_input() -> Any:
    return io.Int.Input(
        "crf",
        default=16,
        min=0,
        max=51,
        advanced=True,
        tooltip="Quality of the encoder: lower is better and larger. 16 shows no loss, 23 is a usual size for the web.",
    )


class PatchUpscaleVideoNetwork(io.ComfyNode):
    checks = (check_overlap,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraPatchUpscaleVideoNetwork",
            display_name="Patch Upscale Video (network)",
            category=CATEGORY,
            description="Upscales a video with an upscale model, frame by frame and patch by patch: memory depends neither on its length nor on its "
            "size, sound, frame rate, time stamps and colour tags stay.",
            search_aliases=["upscale video", "video super resolution", "4k video", "tiled upscale", "catanet"],
            inputs=[
                io.UpscaleModel.Input("upscale_model", tooltip="From Load Upscale Model."),
                io.Video.Input("video", tooltip="From Load Video, Trim Video, Create Video or any other node. A file is read frame by frame."),
                size_input(),
                *patch_inputs(),
                quality_input(),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The upscaled video, a file in ComfyUI's temporary folder. Save Video copies it.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, upscale_model: Any, video: Any, size: dict[str, Any], tile: int, overlap: int, crf: Any) -> io.NodeOutput:
        source, trim = _source(video)
        mark = _fingerprint(upscale_model, source, (trim, size, tile, overlap, crf))
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        target, part = folder / f"tessera_{mark}.mp4", folder / f"tessera_{mark}.part.mp4"
        from ...models.upscale.video_reader import open_reader

        with open_reader(source, trim) as reader:
            line = _upscale(cls.hidden.unique_id, upscale_model, reader, target, part, size, tile, overlap, crf)
        return io.NodeOutput(InputImpl.VideoFromFile(str(target)), ui={"text": (line,)})


def _existing(file: str) -> Path:
    return existing(file, "copy it there")


class PatchUpscaleVideoFile(io.ComfyNode):
    checks = (check_overlap, _existing, check_prefix)

    @classmethod
    def define_schema(cls) -> io.Schema:
        files, _ = folder_paths.recursive_search(folder_paths.get_input_directory())
        return io.Schema(
            node_id="TesseraPatchUpscaleVideoFile",
            display_name="Patch Upscale Video File",
            category=CATEGORY,
            description="Upscales a video file into the output folder, frame by frame: nothing but a few frames is ever in memory.",
            search_aliases=["upscale video", "batch upscale", "file to file", "4k video"],
            is_output_node=True,
            inputs=[
                io.UpscaleModel.Input("upscale_model", tooltip="From Load Upscale Model."),
                io.Combo.Input(
                    "file",
                    # No upload button: with one, ComfyUI's front end shows what goes in where the live preview would be.
                    options=sorted(folder_paths.filter_files_content_types(files, ["video"])),
                    tooltip="A video in ComfyUI's input folder or a folder in it. Copy yours there and press R.",
                ),
                size_input(),
                *patch_inputs(),
                io.String.Input("filename_prefix", default="video/upscaled", tooltip="As in Save Video: folders and %date% and the like work."),
                io.Combo.Input("container", options=["mp4", "mkv", "mov", "webm"], tooltip="Type of the file. mkv takes every sound and subtitle."),
                quality_input(),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="The file that was written.")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **others: Any) -> Any:
        path = None if file is None else input_path(file)  # None: another node makes it
        return path.stat().st_mtime_ns if path is not None and path.is_file() else None

    @classmethod
    def execute(
        cls, upscale_model: Any, file: str, size: dict[str, Any], tile: int, overlap: int, filename_prefix: str, container: str, crf: Any
    ) -> io.NodeOutput:
        path = _existing(file)
        from ...models.upscale.video_reader import open_reader

        with open_reader(path) as reader:
            wanted = size_for(reader.facts.width, reader.facts.height, size)
            folder, name, counter, subfolder = numbered(filename_prefix, *wanted)
            mark = _fingerprint(upscale_model, path, (size, tile, overlap, crf))
            target, part = Path(folder, f"{name}_{counter:05}_.{container}"), Path(folder, f"{name}.{mark}.part.{container}")
            tags = {} if args.disable_metadata else {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
            metadata = {key: json.dumps(value) for key, value in tags.items() if value is not None}
            line = _upscale(cls.hidden.unique_id, upscale_model, reader, target, part, size, tile, overlap, crf, metadata)
        shown = ui.PreviewVideo([ui.SavedResult(target.name, subfolder, io.FolderType.output)]).as_dict()
        return io.NodeOutput(InputImpl.VideoFromFile(str(target)), ui={**shown, "text": (line,)})


def _upscale(
    node_id: Any,
    upscale_model: Any,
    reader: Any,
    target: Path,
    part: Path,
    size: dict[str, Any],
    tile: int,
    overlap: int,
    crf: Any,
    metadata: dict[str, str] | None = None,
) -> str:
    """Upscale an open source of the library into `target`; what an interrupted run finished is in `part`. Returns a line on what was done."""
    from ...models.upscale.video import upscale_video

    facts = reader.facts
    wanted = size_for(facts.width, facts.height, size)
    device = load_network(upscale_model, 4, tile)
    network = network_of(upscale_model)
    count = passes(facts.width, facts.height, wanted, network.scale)
    display = Display(node_id, "frame", facts.frames)
    display.plan(facts.width, facts.height, count, network.scale, tile, overlap)
    reasons: list[str] = []
    index = 0

    def operator(frames: Tensor) -> Tensor:
        nonlocal tile
        progress = Progress()

        def on_patch(state: Progress, patch: Any, canvas: Tensor) -> None:
            display.patch(index, state, canvas)

        out = upscale(frames[0], network, wanted, tile=tile, overlap=overlap, progress=progress, on_patch=on_patch, device=device)
        tile >>= len(progress.steps_down)  # not to run out of memory again in every frame
        reasons.extend(progress.steps_down)
        return out[None]

    def on_frame(done: int, total: int | None, frame: Tensor | None) -> None:
        nonlocal index
        index = done
        display.finished(done, frame)

    try:
        # RuntimeError: torch's own, such as memory that other programs have taken. Hours of work must not be lost to it.
        stops = (mm.InterruptProcessingException, RuntimeError)
        settings = {"interrupt": stops, "crf": crf, "metadata": metadata, "part": part, "resume": True}
        summary = upscale_video(reader, target, operator, wanted, on_frame=on_frame, **settings)
    except BaseException as error:
        for note in getattr(error, "__notes__", []):
            line = f"{note}. Queue the same again to go on from there"
            logging.info("Tessera: %s", line)
            display.say(line)
        raise
    finally:
        unload_upscale_model(upscale_model)
    line = f"{facts.width} x {facts.height} to {summary.width} x {summary.height}: {summary.frames} frames, {count} x {network.scale}x network, "
    line += f"{display.patches} patch{'es' * (display.patches > 1)} a frame, {summary.codec} {summary.pixel_format}, sound {summary.audio}"
    line += "".join(f" · {remark}" for remark in [*reasons, *summary.notes])
    display.say(line)
    return line


def _source(video: Any) -> tuple[Any, tuple[float, float]]:
    """ComfyUI's VIDEO as a source of the library, and its trim: start and length in seconds."""
    from ...models.upscale.video_reader import Clip

    if isinstance(video, InputImpl.VideoFromComponents):
        # Its stream would be lossy H.264 of 8 bit, and as much memory again.
        components = video.get_components()
        if not components.frame_rate > 0:
            raise ValueError(f"video has {components.frame_rate} frames a second; set a rate above 0 where it is made")
        sound = components.audio
        wave, rate = (None, 48000) if sound is None else (sound["waveform"][0], int(sound["sample_rate"]))
        return Clip(components.images, Fraction(components.frame_rate), wave, rate, bit_depth_of(video)), WHOLE
    return video.get_stream_source(), trim_of(video)


def _fingerprint(upscale_model: Any, source: Any, settings: Any) -> str:
    """Of everything that decides about the result, so that a finished part is only ever continued by the run that it belongs to."""
    import av

    digest = hashlib.sha256(repr((av.__version__, av.library_versions, settings)).encode())
    for part in _contents(source):
        digest.update(part)
    for name, weight in sorted(upscale_model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()[:16]


def _contents(source: Any) -> Iterator[Any]:
    if isinstance(source, str | Path):
        status = os.stat(source)
        yield f"{os.path.abspath(source)} {status.st_size} {status.st_mtime_ns}".encode()
    elif hasattr(source, "getbuffer"):
        yield source.getbuffer()
    else:
        yield repr((source.frames.shape, source.rate, source.sample_rate, source.bits)).encode()
        yield from map(_bytes, source.frames)
        if source.sound is not None:
            yield _bytes(source.sound)


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
