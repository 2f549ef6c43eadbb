"""Patch Upscale and Upscale Report, and what the other upscaling nodes share with them."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ...models.upscale.metrics import flicker, psnr, seam_excess, ssim
from ...models.upscale.pictures import NAMED, Network, passes, plan, target_size, upscale
from ...models.upscale.tiling import Progress
from ..comfy import load_upscale_model, say, unload_upscale_model

CATEGORY = "Tessera/upscale"
PREVIEW = 512  # pixels of the longer side
INTERVAL = 0.25  # seconds between two previews: each is a JPEG file on the wire
_RESUME = "tessera_upscale"


def size_input() -> Any:
    """The widget of a target size."""
    return io.DynamicCombo.Input(
        "size",
        options=[
            io.DynamicCombo.Option(
                "factor",
                [io.Float.Input("factor", default=2.0, min=0.1, max=64.0, step=0.1, tooltip="Times as wide and as high. Need not be whole.")],
            ),
            io.DynamicCombo.Option(
                "megapixels", [io.Float.Input("megapixels", default=8.0, min=0.01, max=1000.0, step=0.1, tooltip="Millions of pixels.")]
            ),
            io.DynamicCombo.Option(
                "named", [io.Combo.Input("name", options=list(NAMED), tooltip="As large as fits; a portrait fits it turned on its side.")]
            ),
        ],
        tooltip="How large. The aspect ratio is kept. The network runs as often as needed, and what is too much is scaled down.",
    )


def size_for(width: int, height: int, size: dict[str, Any]) -> tuple[int, int]:
    """(width, height) that the widget asks for, for a picture of this size."""
    kind = size["size"]
    return target_size(width, height, **{{"named": "name"}.get(kind, kind): size["name" if kind == "named" else kind]})


def patch_inputs() -> list[Any]:
    """The widgets of the patches."""
    return [
        io.Int.Input(
            "tile",
            default=256,
            min=64,
            max=4096,
            step=32,
            advanced=True,
            tooltip="Side of a patch, in pixels before upscaling. Smaller needs less memory. It is halved by itself when memory runs out.",
        ),
        io.Int.Input(
            "overlap",
            default=32,
            min=0,
            max=1024,
            step=8,
            advanced=True,
            tooltip="Pixels that neighbouring patches share. More is safer for networks that look far.",
        ),
    ]


def check_overlap(tile: int, overlap: int) -> None:
    if overlap > tile // 2:
        raise ValueError(f"overlap is {overlap} and tile {tile}; use at most {tile // 2}, half the tile")


class Display:
    """What the running node shows: a bar that counts patches, the picture so far, and a line with the time left.

    noun: what is counted, "picture" or "frame". total: how many, or None where nobody knows. done: finished before this run.
    """

    def __init__(self, node_id: Any, noun: str, total: int | None, done: int = 0):
        self.node_id, self.noun, self.total = node_id, noun, total
        self.stages: dict[int, tuple[int, int]] = {}
        self.patches = 1
        self.bar = comfy.utils.ProgressBar(total or 1)
        self._shown = -math.inf
        self._started = (time.monotonic(), float(done))

    def plan(self, width: int, height: int, count: int, scale: int, tile: int, overlap: int) -> None:
        """The patches of one picture in `count` passes: for the canvas width of each pass the patches before it and its own."""
        before = 0
        for step in range(count):
            finer = scale**step
            own = len(plan(height * finer, width * finer, tile, overlap).patches)
            self.stages[width * finer * scale] = before, own
            before += own
        self.patches = max(before, 1)

    def patch(self, index: int, state: Progress, canvas: Tensor) -> None:
        """A patch of number `index` is done. Raises ComfyUI's exception where the user has stopped the run."""
        mm.throw_exception_if_processing_interrupted()
        before, own = self.stages[canvas.shape[-1]]
        share = (before + own * state.done / state.total) / self.patches
        if share < 1:  # else the picture itself is next
            self._show(index + share, f", patch {state.done} of {state.total}", canvas)

    def finished(self, done: int, canvas: Tensor | None) -> None:
        """So many are done; the last one is `canvas`. Raises as `patch` does."""
        mm.throw_exception_if_processing_interrupted()
        if canvas is not None:
            self._show(done, "", canvas)
        else:
            self._started = (time.monotonic(), float(done))

    def say(self, line: str) -> None:
        """Show a line of text on the node."""
        say(self.node_id, line)

    def _show(self, done: float, where: str, canvas: Tensor) -> None:
        now = time.monotonic()
        if now - self._shown < INTERVAL and done != self.total:
            return
        self._shown = now
        part = done % 1 if self.total is None else done
        self.bar.update_absolute(round(part * self.patches), (self.total or 1) * self.patches, ("JPEG", _preview(canvas), PREVIEW))
        start, before = self._started
        pace = (now - start) / max(done - before, 1e-9)
        number = math.floor(done) + bool(where)
        line = f"{self.noun} {number} of {self.total}{where}" if self.total is not None else f"{self.noun} {number}{where}"
        self.say(f"{line}, {_time(pace * (self.total - done))} left" if self.total is not None else f"{line}, {pace:.2g} s each")


def _time(seconds: float) -> str:
    seconds = max(seconds, 0)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class PatchUpscale(io.ComfyNode):
    checks = (check_overlap,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraPatchUpscale",
            display_name="Patch Upscale (network)",
            category=CATEGORY,
            description="Upscales pictures with an upscale model, patch by patch: any size in constant memory, without seams, alpha kept.",
            search_aliases=["upscale image", "tiled upscale", "super resolution", "4k", "catanet"],
            inputs=[
                io.UpscaleModel.Input("upscale_model", tooltip="From Load Upscale Model."),
                io.Image.Input("image", tooltip="A picture or a batch, RGB or RGBA (straight alpha). Each picture is upscaled by itself."),
                size_input(),
                *patch_inputs(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The upscaled pictures.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, upscale_model: Any, image: Tensor, size: dict[str, Any], tile: int, overlap: int) -> io.NodeOutput:
        batch, height, width, _ = image.shape
        target = size_for(width, height, size)
        device = load_network(upscale_model, image.element_size(), tile)
        network = network_of(upscale_model)
        count = passes(width, height, target, network.scale)
        key = (target, tile, overlap)
        resume = _unfinished(upscale_model, image, key)
        results, progress = resume.results, resume.progress
        display = Display(cls.hidden.unique_id, "picture", batch, len(results))
        display.plan(width, height, count, network.scale, tile, overlap)
        reasons: list[str] = []
        try:
            for index in range(len(results), batch):

                def on_patch(state: Progress, patch: Any, canvas: Tensor, index: int = index) -> None:
                    display.patch(index, state, canvas)

                picture = image[index].movedim(-1, 0)
                out = upscale(picture, network, target, tile=tile, overlap=overlap, progress=progress, on_patch=on_patch, device=device)
                results.append(out.movedim(0, -1).to(mm.intermediate_device()))
                tile >>= len(progress.steps_down)  # not to run out of memory again in every picture
                reasons += progress.steps_down
                progress = resume.progress = Progress()
                display.finished(index + 1, out[:3].expand(3, -1, -1))
        except BaseException:
            resume.keep(upscale_model)
            raise
        finally:
            unload_upscale_model(upscale_model)
        patches = len(plan(height, width, tile, overlap).patches)
        line = f"{width} x {height} to {target[0]} x {target[1]}: {count} x {network.scale}x network, {patches} patches"
        line += "".join(f" · {reason}" for reason in reasons)
        display.say(line)
        return io.NodeOutput(torch.stack(results), ui={"text": (line,)})


class _Unfinished:
    """Pictures and patches that an interrupted run had finished. It lives on the upscale model's object and dies with it."""

    def __init__(self, image: Tensor, key: Any):
        self.image, self.key = image, key
        self.results: list[Tensor] = []
        self.progress = Progress()

    def keep(self, upscale_model: Any) -> None:
        setattr(upscale_model, _RESUME, self)


def _unfinished(upscale_model: Any, image: Tensor, key: Any) -> _Unfinished:
    found: _Unfinished | None = upscale_model.__dict__.pop(_RESUME, None)
    if found is not None and found.key == key and found.image is image:
        return found
    return _Unfinished(image, key)


def network_of(upscale_model: Any) -> Network:
    """ComfyUI's upscale model as the library sees it."""
    requirements = upscale_model.size_requirements
    multiple = requirements.multiple_of
    return Network(lambda x: upscale_model(x), int(upscale_model.scale), max(requirements.minimum, 1), max(multiple, 1))


def load_network(upscale_model: Any, element_size: int, tile: int) -> torch.device:
    """Bring the network to the device. 384 bytes an output pixel and channel is ComfyUI's own estimate."""
    return load_upscale_model(upscale_model, tile * tile * 3 * element_size * max(upscale_model.scale, 1.0) * 384.0)


def _preview(canvas: Tensor) -> Image.Image:
    step = max(math.ceil(max(canvas.shape[-2:]) / PREVIEW), 1)
    small = canvas[..., ::step, ::step].clamp(0, 1).movedim(0, -1)
    return Image.fromarray((small * 255).round().to(torch.uint8).cpu().numpy())


class UpscaleReport(io.ComfyNode):
    checks = (check_overlap,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraUpscaleReport",
            display_name="Upscale Report",
            category=CATEGORY,
            description="Seams, flicker and, with a reference, PSNR and SSIM of upscaled pictures, as figures.",
            search_aliases=["psnr", "ssim", "seams", "upscale quality"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The upscaled pictures; a batch counts as a clip. They pass through unchanged."),
                io.Image.Input("original", optional=True, tooltip="What they were upscaled from: tells where the patches met."),
                io.Image.Input("reference", optional=True, tooltip="What they should look like, at the same size."),
                io.Int.Input("tile", default=256, min=64, max=4096, step=32, tooltip="As in Patch Upscale."),
                io.Int.Input("overlap", default=32, min=0, max=1024, step=8, tooltip="As in Patch Upscale."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The pictures, unchanged."),
                io.String.Output(display_name="report", tooltip="All figures as JSON."),
            ],
        )

    @classmethod
    def execute(cls, image: Tensor, tile: int, overlap: int, original: Tensor | None = None, reference: Tensor | None = None) -> io.NodeOutput:
        report: dict[str, float] = {"width": image.shape[2], "height": image.shape[1], "frames": image.shape[0]}
        pictures = image.movedim(-1, 1)
        if original is not None:
            scale = image.shape[1] / original.shape[1]
            if scale != int(scale):
                raise ValueError(f"image is {scale:.3f} times as high as original; seams are measured at whole factors: leave original out")
            cut = plan(original.shape[1], original.shape[2], tile, overlap)
            report["seam_excess"] = sum(seam_excess(picture, cut, int(scale)) for picture in pictures) / len(pictures)
        if len(pictures) > 2:
            report["flicker"] = flicker(pictures)
        if reference is not None:
            if reference.shape[:3] != image.shape[:3]:
                raise ValueError(
                    f"reference is {tuple(reference.shape[:3])} and image {tuple(image.shape[:3])} (pictures, height, width); give the same size"
                )
            colours = min(image.shape[-1], reference.shape[-1], 3)
            report["psnr"] = psnr(image[..., :colours], reference[..., :colours])
            report["ssim"] = ssim(pictures[:, :colours], reference.movedim(-1, 1)[:, :colours])
        line = ", ".join(f"{name} {value:.4g}" for name, value in report.items())
        return io.NodeOutput(image, json.dumps(report), ui={"text": (line,), "tessera": (report,)})
