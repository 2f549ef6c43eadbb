"""Save and Load Transparent Video: clips with alpha in files."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn import functional as F

from ...models.layers.document import rgba
from ..comfy import check_prefix, existing, input_path, numbered, said, saved_file
from .document import CATEGORY

# The library's formats; PyAV, which it needs, is imported when a node runs.
SUFFIXES = {
    "ProRes 4444": ".mov",
    "VP9 WebM": ".webm",
    "animated WebP": ".webp",
    "APNG": ".png",
    "FFV1": ".mkv",
    "PNG sequence": "",
}
STRAIGHT = ("animated WebP", "APNG", "PNG sequence")  # hold no premultiplied colours
PLAYABLE = (".webm", ".webp", ".png")  # by browsers
FILES = (".mov", ".webm", ".mkv", ".mp4", ".avi", ".webp", ".apng")


class AlphaFrames:
    """The frames of an IMAGE with its own alpha, or that of a MASK (1 hides), made one at a time: `(height, width, 4)`."""

    def __init__(self, images: Tensor, mask: Tensor | None):
        if mask is not None and len(mask) not in (1, len(images)):
            raise ValueError(f"mask has {len(mask)} frames and images {len(images)}; give one for all, or one each")
        self.images, self.mask = images, mask

    def __iter__(self) -> Iterator[Tensor]:
        for index, image in enumerate(self.images):
            frame = rgba(image)
            if self.mask is not None:
                hidden = self.mask[index if len(self.mask) > 1 else 0].to(frame)
                if hidden.shape != frame.shape[:2]:  # Load Image gives 64 x 64 where nothing is transparent
                    hidden = F.interpolate(hidden[None, None], frame.shape[:2], mode="bilinear")[0, 0]
                frame = torch.cat([frame[..., :3], 1 - hidden.clamp(0, 1)[..., None]], -1)
            yield frame


def followed(frames: Iterable[Tensor], bar: comfy.utils.ProgressBar) -> Iterator[Tensor]:
    """The same frames, each after a look at whether the user stopped the run, and with the bar on by one."""
    for frame in frames:
        mm.throw_exception_if_processing_interrupted()
        bar.update(1)
        yield frame


def stacked(frames: Iterable[Tensor], expected: int) -> Tensor:
    """A batch of frames, without a second copy where as many come as expected. Raises ValueError where these cannot be held at once."""
    batch, count = torch.empty(0), 0
    for frame in frames:
        if count == len(batch):
            rows = max(count, expected, 1)
            needed, memory = (count + rows) * frame.nbytes, mm.get_total_memory(torch.device("cpu"))
            if needed > memory:
                height, width = frame.shape[:2]
                sizes = f"{count + rows} frames of {width} x {height} are {needed / 2**30:.0f} GB, and this machine has {memory / 2**30:.0f}"
                raise ValueError(f"{sizes}; take a part of them, or make them smaller")
            more = torch.empty(rows, *frame.shape)
            batch = torch.cat([batch, more]) if count else more
        batch[count] = frame
        count += 1
    return batch[:count]


def image_and_mask(frames: Tensor, channels: str = "RGBA") -> tuple[Tensor, Tensor]:
    frames = frames.to(mm.intermediate_device())
    return frames[..., : len(channels)], 1 - frames[..., 3]


def _rate(fps: float) -> Fraction:
    """29.97 means 30000/1001, as cameras and editors do."""
    broadcast = Fraction(round(fps * 1.001) * 1000, 1001)
    return broadcast if abs(broadcast - fps) < 5e-4 else Fraction(fps).limit_denominator(1001)


def _check_alpha(alpha: str, format: dict[str, Any]) -> None:
    if alpha == "premultiplied" and format["format"] in STRAIGHT:
        raise ValueError(f"alpha is premultiplied, and {format['format']} holds straight alpha only; use straight, or another format")


class SaveTransparentVideo(io.ComfyNode):
    checks = (_check_alpha, check_prefix)

    @classmethod
    def define_schema(cls) -> io.Schema:
        bits = io.Combo.Input("bits", options=["8", "16"], tooltip="Of each channel. 16 is for further editing.")
        crf = io.Int.Input("crf", default=14, min=0, max=63, tooltip="Quality of the encoder: lower is better and larger.")
        webp = [
            io.Boolean.Input("lossless", default=True, tooltip="Off: smaller, with losses in colour. Alpha stays as it is."),
            io.Int.Input("quality", default=90, min=0, max=100, tooltip="Where not lossless: higher is better and larger."),
        ]
        widgets = {"VP9 WebM": [crf], "animated WebP": webp, "APNG": [bits], "FFV1": [bits], "PNG sequence": [bits]}
        return io.Schema(
            node_id="TesseraSaveTransparentVideo",
            display_name="Save Transparent Video",
            category=CATEGORY,
            description="Saves a clip with its transparency, for editors (ProRes 4444, FFV1, PNG) and for the web (VP9, WebP, APNG).",
            search_aliases=["alpha video", "prores 4444", "webm alpha", "apng", "animated webp", "png sequence", "export rgba"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="Frames, RGBA (straight alpha), or RGB with a mask."),
                io.String.Input("filename_prefix", default="video/Tessera", tooltip="In the output folder; a number is added."),
                io.Float.Input("fps", default=24.0, min=0.01, max=1000.0, step=0.01, tooltip="Frames a second. 23.976, 29.97 and 59.94 are exact."),
                io.DynamicCombo.Input(
                    "format",
                    options=[io.DynamicCombo.Option(name, widgets.get(name, [])) for name in SUFFIXES],
                    tooltip="ProRes 4444 (.mov): editors. VP9 WebM, animated WebP, APNG: browsers. FFV1 (.mkv), PNG sequence: without loss.",
                ),
                io.Combo.Input(
                    "alpha",
                    options=["straight", "premultiplied"],
                    tooltip="straight: colours as they are; most programs take that. premultiplied: colours times alpha (ProRes, VP9, FFV1 only).",
                ),
                io.Mask.Input("mask", optional=True, tooltip="One for all frames or one each: 1 is transparent. It replaces alpha of images."),
                io.Audio.Input("audio", optional=True, tooltip="Cut off where the frames end. WebP and APNG have no sound."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames, unchanged.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, images: Tensor, filename_prefix: str, fps: float, format: dict[str, Any], alpha: str, mask: Tensor | None = None, audio: Any = None
    ) -> io.NodeOutput:
        from ...models.layers.video_writer import save, save_preview
        from ...models.media.sound import Sound

        kind, rate = format["format"], _rate(fps)
        frames = AlphaFrames(images, mask)
        sound = None if audio is None else Sound(audio["waveform"][0], int(audio["sample_rate"]))
        size = images.shape[2], images.shape[1]
        folder, name, counter, subfolder = numbered(filename_prefix, *size)
        target = Path(folder, f"{name}_{counter:05}_{SUFFIXES[kind]}")
        tags = {} if args.disable_metadata else {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        playable = target.suffix in PLAYABLE
        bar = comfy.utils.ProgressBar(len(images) * (1 if playable else 2))
        saved = save(
            target,
            followed(frames, bar),
            rate,
            kind,
            alpha=alpha,
            sound=sound,
            bits=int(format["bits"]) if "bits" in format else None,
            crf=format.get("crf", 0),
            quality=None if format.get("lossless", True) else format["quality"],
            metadata={key: json.dumps(value) for key, value in tags.items() if value is not None},
        )
        line = f"{target.name}: {saved.width} x {saved.height}, {saved.frames} frames at {float(rate):g} a second, {saved.bits} bits"
        notes = saved.notes
        if mask is None and images.shape[3] < 4:
            notes = [*notes, "nothing is transparent: connect a mask, or images with alpha"]
        if audio is not None and len(audio["waveform"]) > 1:
            notes = [*notes, f"the sound is the first of {len(audio['waveform'])}"]
        line += "".join(f" · {note}" for note in notes)
        entry = ui.SavedResult(target.name, subfolder, io.FolderType.output)
        shown = entry
        if not playable:
            preview = Path(folder_paths.get_temp_directory(), f"tessera_{secrets.token_hex(8)}.webm")
            save_preview(preview, followed(frames, bar), rate)
            shown = ui.SavedResult(preview.name, "", io.FolderType.temp)
        return io.NodeOutput(images, ui={**ui.PreviewVideo([shown]).as_dict(), **said(cls, line), "tessera_files": (saved_file(target, subfolder),)})


def _existing(file: str) -> Path:
    return existing(file, "upload it, or copy it there", folders=True)


class LoadTransparentVideo(io.ComfyNode):
    checks = (_existing,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLoadTransparentVideo",
            display_name="Load Transparent Video",
            category=CATEGORY,
            description="Loads a clip with its transparency: ProRes 4444, VP8 and VP9 WebM, animated WebP, APNG, FFV1, folders of PNG files.",
            search_aliases=["alpha video", "load rgba video", "prores 4444", "webm alpha", "apng", "png sequence"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_choices(),
                    upload=io.UploadType.video,
                    tooltip="A clip or a folder of PNG files in ComfyUI's input folder. Upload one, or copy it there.",
                ),
                io.Combo.Input("channels", options=["RGBA", "RGB"], tooltip="Of images. RGB for nodes that do not take four; mask has alpha anyway."),
                io.Combo.Input(
                    "alpha",
                    options=["auto", "straight", "premultiplied"],
                    tooltip="How the file's colours are stored. auto: as Save Transparent Video noted in it, else straight.",
                ),
                io.Int.Input("start", default=0, min=0, max=1 << 24, tooltip="Frames to leave out at the beginning."),
                io.Int.Input("frames", default=0, min=0, max=1 << 24, tooltip="How many to load at most. 0: all that follow."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Frames with straight alpha, whatever the file has."),
                io.Mask.Output(display_name="mask", tooltip="1 where a frame is transparent, as Load Image gives it."),
                io.Audio.Output(display_name="audio", tooltip="The sound of these frames, or nothing."),
                io.Float.Output(display_name="fps", tooltip="Frames a second."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **others: Any) -> Any:
        path = None if file is None else input_path(file)  # None: another node makes it, and runs first
        if path is None or not path.exists():
            return None
        files = sorted(path.iterdir()) if path.is_dir() else [path]  # a picture of a sequence may change, and its folder not
        facts = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @classmethod
    def execute(cls, file: str, channels: str, alpha: str, start: int, frames: int) -> io.NodeOutput:
        from ...models.layers.video_reader import load

        clip = load(_existing(file), alpha)
        stop = start + frames if frames else None
        expected = max((clip.frames or 0) - start, 0)
        expected = min(expected, frames) if frames else expected
        bar = comfy.utils.ProgressBar(start + expected)
        batch = stacked(itertools.islice(followed(clip, bar), start, stop), expected)
        if not len(batch):
            raise ValueError(f"start is {start}, and {file} has no more frames than that; use a smaller one")
        sound = clip.sound()
        audio = None
        if sound is not None:
            first, last = (round(Fraction(number * sound.rate) / clip.rate) for number in (start, start + len(batch)))
            audio = {"waveform": sound.samples[None, :, first : last if stop else None], "sample_rate": sound.rate}
        images, mask = image_and_mask(batch, channels)
        kind = ("premultiplied" if clip.premultiplied else "straight") + " alpha" if clip.transparent else "no alpha: all of it is opaque"
        line = f"{clip.width} x {clip.height}, {len(batch)} frames at {float(clip.rate):g} a second, {clip.codec}, {clip.bits} bits, {kind}"
        line += "".join(f" · {note}" for note in clip.notes)
        return io.NodeOutput(images, mask, audio, float(clip.rate), ui=said(cls, line))


def _choices() -> list[str]:
    """Clips in the input folder and below it; of PNG files the animated ones, and folders that hold others."""
    folder = Path(folder_paths.get_input_directory())
    found = set()
    for file in folder.rglob("*"):
        suffix, name = file.suffix.lower(), file.relative_to(folder).as_posix()
        if suffix == ".png" and file.is_file():
            facts = file.stat()
            found.add(name if _is_animated_png(file, facts.st_mtime_ns, facts.st_size) else f"{Path(name).parent.as_posix()}/")
        elif suffix in FILES and file.is_file():
            found.add(name)
    return sorted(found - {"./"})


@cache
def _is_animated_png(file: Path, modified: int, size: int) -> bool:
    """Read once a version of the file: the front end asks for the choices often, and there may be thousands of pictures."""
    from ...models.layers.video_reader import is_animated_png

    return is_animated_png(file)
