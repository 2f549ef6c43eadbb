"""Patch Upscale Video (diffusion)."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ...models.media.resize import resize
from ...models.upscale import colour as colours
from .patch_adapter import Adapter, PatchGuide, adapted
from .pictures import CATEGORY, size_for, size_input
from .windows import COORDINATES, FUSIONS, PATCH, JointModulation


class PatchUpscaleVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraPatchUpscaleVideo",
            display_name="Patch Upscale Video (diffusion)",
            category=CATEGORY,
            description="Adds detail to an enlarged clip with the video model that you have, in windows fused at every step: training-free, "
            "inspired by PatchVSR's joint modulation.",
            search_aliases=["video upscale", "tiled diffusion", "multidiffusion", "patchvsr", "4k video", "super resolution"],
            inputs=[
                io.Model.Input("model", tooltip="A video or image diffusion model, with its usual patches. It is cloned."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input("positive", tooltip="What the clip shows. One text serves every window: describe surfaces, not places."),
                io.Conditioning.Input("negative", tooltip="As usual."),
                io.Image.Input("image", tooltip="The clip, one picture a frame."),
                size_input(),
                io.Float.Input(
                    "denoise",
                    default=0.25,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the noise schedule that is run. 0.2 to 0.35 adds detail; more invents, and windows may disagree.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps that are run, as in KSampler; denoise says where they begin."),
                io.Float.Input("cfg", default=3.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="As in KSampler."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Of the noise."),
                io.Int.Input(
                    "tile", default=512, min=64, max=4096, step=16, tooltip="Side of a window in pixels: a size that the model was trained for."
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip="Frames of a window in time, for clips longer than the model was trained for. 0: all at once.",
                ),
                io.Combo.Input(
                    "coordinates",
                    options=list(COORDINATES),
                    default=COORDINATES[0],
                    advanced=True,
                    tooltip="canvas: the model is told where a window lies (Wan, Flux and others with RoPE options). window: each window counts as a "
                    "picture of its own, for models that do not know large positions.",
                ),
                io.Combo.Input(
                    "fusion",
                    options=list(FUSIONS),
                    default=FUSIONS[0],
                    advanced=True,
                    tooltip="joint: windows on the seams, with the largest weight there. average: MultiDiffusion's plain mean, for comparison.",
                ),
                io.Combo.Input(
                    "colour",
                    options=list(colours.METHODS),
                    default=colours.METHODS[0],
                    advanced=True,
                    tooltip="How the result gets the colours of the clip. wavelet: its low frequencies. adain, lab: its mean and spread.",
                ),
                Adapter.Input(
                    "adapter",
                    optional=True,
                    tooltip="From Load Patch Adapter. Then use denoise 1, cfg 1 and an empty prompt; tile and coordinates are the adapter's own.",
                ),
                io.Float.Input(
                    "augmentation",
                    default=0.0,
                    min=0.0,
                    max=0.3,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="With an adapter: noise mixed into what it sees of the clip. More hides noise and artefacts of the clip, and detail too.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The upscaled clip.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        image: Tensor,
        size: dict[str, Any],
        denoise: float,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        seed: int,
        tile: int,
        frames: int,
        coordinates: str,
        fusion: str,
        colour: str,
        adapter: Any = None,
        augmentation: float = 0.0,
    ) -> io.NodeOutput:
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if any("control" in extra for _, extra in conditioning):
                raise ValueError(f"{name} carries a control net, whose picture cannot be cut into windows; leave it out")
        width, height = size_for(image.shape[2], image.shape[1], size)
        compression = vae.spacial_compression_encode()
        enlarged = torch.stack([resize(frame.movedim(-1, 0)[:3].float(), (width, height)).clamp(0, 1) for frame in image])
        temporal = vae.temporal_compression_decode() or 1
        windowed = model.clone() if adapter is None else adapted(model, adapter)
        latent = vae.encode(_padded(enlarged, compression * PATCH, temporal).movedim(1, -1))
        wanted = windowed.get_model_object("latent_format")
        if latent.shape[1] != wanted.latent_channels:
            raise ValueError(f"vae encodes to {latent.shape[1]} channels, and model takes {wanted.latent_channels}; use the VAE of the model")
        if latent.ndim - 2 > wanted.latent_dimensions:
            raise ValueError("vae encodes clips, and model makes pictures; use the VAE of the model")
        latent = comfy.sample.fix_empty_latent_channels(windowed, latent)
        guide = None
        if adapter is not None:
            tile, coordinates = adapter.config.native[0] * compression, "window"
            sides = [side * compression for side in adapter.config.native]
            small = torch.stack([resize(frame.movedim(-1, 0)[:3].float(), (sides[1], sides[0])).clamp(0, 1) for frame in image])
            whole = vae.encode(_padded(small, compression * PATCH, temporal).movedim(1, -1))
            enlarged_latent, whole_latent = (windowed.model.process_latent_in(part) for part in (latent, whole))
            guide = PatchGuide(adapter, enlarged_latent, whole_latent, augmentation, max(width / image.shape[2], 1.0), seed)
        latent_frames = 0 if frames == 0 else max((frames - 1) // temporal + 1, 2)
        windowed.model_options["context_handler"] = JointModulation(
            max(tile // (compression * PATCH), 2), coordinates, latent_frames, latent_frames // 2, fusion, guide
        )
        noise = comfy.sample.prepare_noise(latent, seed)
        schedule = dict(denoise=denoise, callback=latent_preview.prepare_callback(windowed, steps), seed=seed)
        try:
            samples = comfy.sample.sample(windowed, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent, **schedule)
        except RuntimeError as error:
            if "cannot be multiplied" not in str(error):  # torch's words for a layer of another width
                raise
            widths = " and ".join(str(texts[0][0].shape[-1]) for texts in (positive, negative))
            raise ValueError(f"positive and negative are {widths} wide, which is not the model's width; use the text encoder of the model") from error
        clip = vae.decode(samples)
        clip = clip.reshape(-1, *clip.shape[-3:])[: len(image), :height, :width].movedim(-1, 1).float().clamp(0, 1)
        matched = torch.cat([colours.match(clip[index : index + 1], enlarged[index : index + 1].to(clip), colour) for index in range(len(clip))])
        return io.NodeOutput(matched.movedim(1, -1))


def _padded(clip: Tensor, multiple: int, temporal: int) -> Tensor:
    """The last row, column and frame repeated until the VAE and the patches come out even. `(frames, 3, height, width)`."""
    height, width = clip.shape[-2:]
    clip = torch.nn.functional.pad(clip, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    more = -(len(clip) - 1) % temporal
    return torch.cat([clip, clip[-1:].expand(more, -1, -1, -1)]) if more else clip
