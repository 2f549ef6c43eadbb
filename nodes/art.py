"""Region Layers, Decode Region Layers and Video: ART's anonymous regions on stock Flux, Qwen-Image and Wan models, by hooks alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.model_base import LongCatImage
from comfy.model_sampling import ModelSamplingFlux
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..models.layers import transparent_vae
from ..models.layers.art import layer_embedding
from ..models.layers.document import MAX_SIDE, Box, Document, Layer, from_core, rgba, to_core
from ..models.layers.regions import LAYER_SPACING, MAX_FOREGROUNDS, TOKEN, WHOLE, Regions, positions, schedule_shift, snap
from .host import BOXES
from .layered_video import VideoLayers
from .layers import CATEGORY, Layers
from .transparent_video import AlphaFrames

FOLDER = "layer_embeddings"
DECODERS = "transparent_decoders"
KEY = "tessera_regions"  # of the latent, too: samplers pass on what they do not know
NAMES = "tessera_region_names"  # beside it: of the background and the foregrounds
PATCH = 2  # latent pixels of a token's side
CHANNELS = 16  # of the latents of the Wan models that regions are for
DECODED_AT_ONCE = 16  # layers; larger batches gave ART's authors "odd purple output"
NONE = "none"
# Of a condition: what is laid over the picture, or joined to its tokens, at places that a strip of regions has not.
UNUSABLE = ("control", "area", "mask", "gligen", "concat_latent_image", "time_dim_concat", "context_latents")


def parse_boxes(text: str) -> list[Box]:
    """One box a line: x, y, width, height in pixels. Raises ValueError naming the line."""
    boxes: list[Box] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        values = re.fullmatch(r"\s*(-?\d{1,6})[\s,]+(-?\d{1,6})[\s,]+(-?\d{1,6})[\s,]+(-?\d{1,6})\s*", line)
        if values is None:
            raise ValueError(f"boxes has {line.strip()[:40]!r} in line {number}; write x, y, width, height in pixels, such as 64, 32, 256, 128")
        x, y, width, height = map(int, values.groups())
        boxes.append((x, y, width, height))
    return boxes


def _network(model: Any) -> Any:
    """The transformer of a model that regions are for. Raises ValueError for another."""
    network = getattr(model.model.diffusion_model, "_orig_mod", model.model.diffusion_model)
    if type(network) is WanModel:
        plain = network.model_type == "t2v" and network.ref_conv is None and network.in_dim == network.out_dim == CHANNELS
        fits = plain and tuple(network.patch_size) == (1, PATCH, PATCH)
    else:
        known = isinstance(network, Flux | QwenImageTransformer2DModel) and not isinstance(model.model, LongCatImage)  # it moves Flux's positions
        fits = known and network.patch_size == PATCH and len(network.pe_embedder.axes_dim) == 3
    if not fits:
        raise ValueError(
            f"model is {type(model.model if isinstance(network, Flux) else network).__name__}, and regions are for Flux.1, Qwen-Image and Wan text-to-video (2.1, 2.2 14B); load one of those"
        )
    return network


def patch_regions(model: Any, regions: Regions, embedding: Tensor | None, shift: float | None) -> Any:
    """A clone of `model` that samples latents of `regions`, and nothing else. shift: of Flux's schedule; None leaves the model's own.

    embedding: `(layers, width)` of a Flux, Qwen-Image or Wan text-to-video transformer, or None. Raises ValueError for another model, and for
    clips where the model makes pictures.
    """
    network = _network(model)
    if regions.frames > 1 and not isinstance(network, WanModel):
        raise ValueError(f"frames is more than 1, and model is {type(network).__name__}, which makes pictures; set frames to 1, or load a Wan model")
    patched = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL):
        patched.remove_wrappers_with_key(kind, KEY)
    hook = _Regions(regions, embedding, network)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, hook.outer_sample)
    if isinstance(network, WanModel):
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, hook.diffusion_model)
    else:
        patches = patched.model_options["transformer_options"].setdefault("patches", {})
        others = [patch for patch in patches.get("post_input", ()) if not isinstance(getattr(patch, "__self__", None), _Regions)]
        patches["post_input"] = [*others, hook.post_input]
    patched.model_options["transformer_options"][BOXES] = tuple((regions.frames, height, width) for _, _, width, height in regions.boxes)
    sampling = model.get_model_object("model_sampling")
    if shift is not None and isinstance(sampling, ModelSamplingFlux):  # a distilled model's fixed schedule stays
        sampling = type(sampling)(model.model.model_config)
        sampling.set_parameters(shift=shift)
        patched.add_object_patch("model_sampling", sampling)
    return patched


class _Regions:
    """Sampling happens on a strip of the tokens inside the boxes, which to the model is a picture one token high, of one frame.

    Noise, latent and mask are cropped before sampling and the result is put back after it, so that samplers, memory estimates and every other
    patch see as many tokens as there are. The strip's positions are replaced by the true ones after the patch embedding.
    """

    def __init__(self, regions: Regions, embedding: Tensor | None, network: Any):
        self.regions, self.embedding = regions, embedding
        self.video, self.centred = isinstance(network, WanModel), isinstance(network, QwenImageTransformer2DModel)
        self.framed = self.video or self.centred  # whether latents have an axis of frames

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *rest, latent_shapes=None, **kwargs):
        regions = self.regions
        if not regions.fits(latent_image, PATCH):
            wanted = (*latent_image.shape[:2], *regions.latent(PATCH))
            raise ValueError(
                f"latent_image is {tuple(latent_image.shape)}, and the model's regions need {wanted}; use model and latent of one Region Layers node"
            )
        conds = [cond for group in executor.class_obj.conds.values() for cond in group]
        names = (*UNUSABLE, "reference_latents") if self.video else UNUSABLE
        unusable = [name for name in names if any(cond.get(name) is not None for cond in conds)]
        if unusable:
            raise ValueError(
                f"the conditioning has {', '.join(unusable)}, which know nothing of regions; leave them out, the boxes say what is where"
            )

        def strip(x: Tensor) -> Tensor:
            x = regions.crop(x, PATCH)
            return x.unsqueeze(2) if self.framed else x

        def whole(x: Tensor, around: Tensor) -> Tensor:
            return regions.scatter(x.squeeze(2) if self.framed else x, around, PATCH)

        in_model_space = executor.class_obj.model_patcher.model.process_latent_in(latent_image)  # as what samplers show is

        def shown(step, denoised, x, total):
            layers = whole(denoised, in_model_space)
            if self.framed:
                callback(step, layers, x, total)
                return
            # The previewers of a picture model read one picture, and SamplerCustomAdvanced keeps the tensor that it is given here as its
            # denoised_output: it is the merged picture while it is shown, and all layers from then on.
            picture = layers[:, :, 0].clone()
            callback(step, picture, x, total)
            picture.set_(layers)

        cropped = strip(latent_image)
        if denoise_mask is not None:
            denoise_mask = strip(denoise_mask)
        watched = None if callback is None else shown
        shapes = None if latent_shapes is None else [cropped.shape]
        sampled = executor(strip(noise), cropped, sampler, sigmas, denoise_mask, watched, *rest, latent_shapes=shapes, **kwargs)
        return whole(sampled, latent_image)

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """Positions and layer embeddings of the region tokens, which are the first of `img`; reference pictures follow.

        Core counts reference pictures from 1, as regions count layers: they are counted from the last layer on. Negative numbers stay.
        """
        regions, img, img_ids = self.regions, args["img"], args["img_ids"].clone()
        tokens = img.shape[1] - sum(args["transformer_options"].get("reference_image_num_tokens", ()))
        self._check(tokens)
        ids = positions(regions, 1).to(img_ids)
        if self.centred:  # Qwen-Image counts rows and columns from the middle, and its text from the middle of the longer side
            ids = ids - ids.new_tensor([0, regions.height // 2, regions.width // 2])
            start = max(regions.height // 2, regions.width // 2)
            text = args["txt_ids"]
            args = {**args, "txt_ids": torch.arange(start, start + text.shape[1], device=text.device).to(text)[None, :, None].expand_as(text)}
        img_ids[:, : regions.tokens] = ids
        numbers = img_ids[:, regions.tokens :, 0]
        numbers[numbers >= 1] += len(regions.boxes) - 1
        if self.embedding is not None:
            img = torch.cat([img[:, : regions.tokens] + self._embedded(img), img[:, regions.tokens :]], 1)
        return {**args, "img": img, "img_ids": img_ids}

    def diffusion_model(self, executor, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs):
        """A call of Wan, which has no patch after its patch embedding: every block gets the true positions, the first one the embeddings."""
        network = executor.class_obj
        rope = network.rope_embedder(positions(self.regions, LAYER_SPACING)[None].to(x.device, torch.float32)).movedim(1, 2)
        options = transformer_options or {}
        replaced = options.get("patches_replace", {})
        blocks = replaced.get("dit", {})
        names = [("double_block", index) for index in range(len(network.blocks))]
        ours = {name: partial(self._block, rope, name == names[0], blocks.get(name)) for name in names}
        options = {**options, "patches_replace": {**replaced, "dit": {**blocks, **ours}}}
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _block(self, rope: Tensor, first: bool, previous: Callable | None, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        img = args["img"]
        if first:
            self._check(img.shape[1])
            img = img if self.embedding is None else img + self._embedded(img)
        args = {**args, "img": img, "pe": rope.to(args["pe"])}
        return extra["original_block"](args) if previous is None else previous(args, extra)

    def _embedded(self, img: Tensor) -> Tensor:
        """`(tokens, width)`: what is added to `img`'s region tokens."""
        assert self.embedding is not None
        return self.embedding.to(img)[self.regions.ids[:, 0].to(img.device)]

    def _check(self, tokens: int) -> None:
        if tokens != self.regions.tokens:
            raise ValueError(
                f"the model got {tokens} picture tokens and its regions have {self.regions.tokens}; "
                "give the model of Region Layers to a sampler, not to a node that tiles or adds frames"
            )


def _files(folder: str) -> list[str]:
    return [NONE, *folder_paths.get_filename_list(folder)]


def _tensors(folder: str, name: str) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise(folder, name), safe_load=True)


class RegionLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraRegionLayers",
            display_name="Region Layers",
            category=CATEGORY,
            description="Makes Flux, Qwen-Image or Wan sample a merged picture, a background and foregrounds at once, each inside its box.",
            search_aliases=["art", "anonymous region", "layered", "transparent layers", "multi-layer", "layered video"],
            inputs=[
                io.Model.Input("model", tooltip="Flux.1, Qwen-Image or Wan text-to-video that was trained on layers, or with a LoRA that was."),
                io.Vae.Input("vae", tooltip="The model's own; what lies outside of the boxes is its grey."),
                io.Int.Input("width", default=1024, min=16, max=MAX_SIDE, step=16, tooltip="Of the canvas, in pixels."),
                io.Int.Input("height", default=1024, min=16, max=MAX_SIDE, step=16, tooltip="Of the canvas, in pixels."),
                io.String.Input(
                    "boxes",
                    default="",
                    multiline=True,
                    tooltip=f"One foreground a line, lowest first: x, y, width, height. {MAX_FOREGROUNDS} at most.",
                ),
                Layers.Input("layers", optional=True, tooltip="Layers whose places are the boxes, before those that are written down."),
                io.Combo.Input(
                    "layer_embedding", options=_files(FOLDER), default=NONE, tooltip=f"From models/{FOLDER}: what tells the model its layers apart."
                ),
                io.Float.Input("base_shift", default=0.5, min=0.0, max=10.0, step=0.01, advanced=True, tooltip="Of Flux's schedule at 256 tokens."),
                io.Float.Input("max_shift", default=1.15, min=0.0, max=10.0, step=0.01, advanced=True, tooltip="Of Flux's schedule at 4096 tokens."),
                io.Int.Input("frames", default=1, min=1, max=81, step=4, optional=True, tooltip="Of a clip, with a video model; 1 makes a picture."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Latent.Output(display_name="latent", tooltip="For the sampler, with the model; then for Decode Region Layers or Video."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, width, height, boxes, layer_embedding, base_shift, max_shift, layers=None, frames=1) -> io.NodeOutput:
        placed = [] if layers is None else [layer for _, layer in from_core(layers).walk()]
        regions = snap([*(layer.bounds for layer in placed), *parse_boxes(boxes)], width, height, (frames - 1) // transparent_vae.FRAMES + 1)
        embedding = None if layer_embedding == NONE else _embedding(layer_embedding, regions, _network(model))
        patched = patch_regions(model, regions, embedding, schedule_shift(regions.tokens, base_shift, max_shift))
        grey = vae.encode(torch.full((frames, TOKEN * regions.height, TOKEN * regions.width, 3), 0.5))
        samples = grey.unflatten(2, (1, -1)) if grey.ndim == 4 else grey
        if samples.shape[2:] != (regions.frames, PATCH * regions.height, PATCH * regions.width):
            raise ValueError(
                f"vae encodes to {tuple(grey.shape)}, not {regions.frames} latent frames of a size 8 times smaller; use the VAE of the model"
            )
        whole = len(regions.boxes) * regions.frames * regions.width * regions.height
        logging.info("Tessera: %d of %d tokens lie in boxes", regions.tokens, whole)
        numbered = (f"Layer {number}" for number in range(len(placed) + 1, len(regions.boxes) - 1))
        names = ("Background", *(layer.name for layer in placed), *numbered)
        return io.NodeOutput(patched, {"samples": samples.repeat(1, 1, len(regions.boxes), 1, 1), KEY: regions, NAMES: names})


def _embedding(name: str, regions: Regions, network: Any) -> Tensor:
    width = network.dim if isinstance(network, WanModel) else network.img_in.out_features
    try:
        return layer_embedding(_tensors(FOLDER, name), regions, width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class DecodeRegionLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDecodeRegionLayers",
            display_name="Decode Region Layers",
            category=CATEGORY,
            description="Decodes what was sampled with Region Layers: the merged picture, and the background with the foregrounds as layers.",
            search_aliases=["art", "transparent decoder", "rgba", "layers"],
            inputs=[
                io.Latent.Input("samples", tooltip="From the sampler that had the latent of Region Layers."),
                io.Vae.Input("vae", tooltip="The same as in Region Layers."),
                io.Combo.Input(
                    "transparent_decoder", options=_files(DECODERS), default=NONE, tooltip=f"From models/{DECODERS}. none: boxes come out opaque."
                ),
            ],
            outputs=[
                Layers.Output(display_name="layers", tooltip="The background, and each foreground cut to its box."),
                io.Image.Output(display_name="image", tooltip="The merged picture, as the model made it."),
            ],
        )

    @classmethod
    def execute(cls, samples, vae, transparent_decoder) -> io.NodeOutput:
        regions, latent = _sampled(samples)
        if regions.frames > 1:
            raise ValueError(f"samples has clips of {regions.frames} latent frames; decode them with Decode Region Video")
        merged, *pictures = _layers(vae, transparent_decoder, latent, regions)
        made = [
            Layer(name, rgba(picture[0]), TOKEN * x, TOKEN * y)
            for name, picture, (x, y, _, _) in zip(samples[NAMES], pictures, regions.boxes[1:], strict=True)
        ]
        return io.NodeOutput(to_core(Document(TOKEN * regions.width, TOKEN * regions.height, tuple(made))), merged[..., :3])


class DecodeRegionVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraDecodeRegionVideo",
            display_name="Decode Region Video",
            category=CATEGORY,
            description="Decodes clips that were sampled with Region Layers: the merged clip, and the background with the foregrounds as layers.",
            search_aliases=["art", "transparent decoder", "rgba video", "layered video"],
            inputs=[
                io.Latent.Input("samples", tooltip="From the sampler that had the latent of Region Layers."),
                io.Vae.Input("vae", tooltip="The same as in Region Layers."),
                io.Combo.Input(
                    "transparent_decoder",
                    options=_files(DECODERS),
                    default=NONE,
                    tooltip=f"From models/{DECODERS}, one for clips. none: boxes come out opaque.",
                ),
            ],
            outputs=[
                VideoLayers.Output(display_name="layers", tooltip="The background, and each foreground cut to its box; for Compose Layered Video."),
                io.Image.Output(display_name="images", tooltip="The merged clip, as the model made it."),
            ],
        )

    @classmethod
    def execute(cls, samples, vae, transparent_decoder) -> io.NodeOutput:
        from ..models.layers.video import ClipLayer

        regions, latent = _sampled(samples)
        if vae.latent_dim != 3:
            raise ValueError("vae decodes pictures; use the video VAE that Region Layers had")
        merged, *clips = _layers(vae, transparent_decoder, latent, regions)
        layers = tuple(
            ClipLayer(name, AlphaFrames(clip, None), TOKEN * x, TOKEN * y)
            for name, clip, (x, y, _, _) in zip(samples[NAMES], clips, regions.boxes[1:], strict=True)
        )
        return io.NodeOutput(layers, merged[..., :3])


def _sampled(samples: dict[str, Any]) -> tuple[Regions, Tensor]:
    """Regions and latent `(channels, layers * frames, height, width)` of what a sampler gave. Raises ValueError."""
    regions, latent = samples.get(KEY), samples["samples"]
    if latent.shape[0] != 1:
        raise ValueError(f"samples has {latent.shape[0]} pictures; decode one at a time, through Latent From Batch")
    if regions is None or not regions.fits(latent, PATCH):
        raise ValueError(f"samples is {tuple(latent.shape)} without its regions; connect a sampler that had the latent of Region Layers")
    return regions, latent[0]


def _layers(vae: Any, decoder: str, latent: Tensor, regions: Regions) -> list[Tensor]:
    """Merged picture, background and foregrounds, each in its box: `(frames, height, width, 3 or 4)` in 0..1, on the CPU."""
    clips = latent.unflatten(1, (-1, regions.frames)).movedim(1, 0)
    clips = clips if vae.latent_dim == 3 else clips.squeeze(2)
    layers: list[Tensor] = []
    for part in (clips if decoder == NONE else clips[:WHOLE]).split(DECODED_AT_ONCE if regions.frames == 1 else 1):
        mm.throw_exception_if_processing_interrupted()
        for clip in vae.decode(part).flatten(0, -4).unflatten(0, (len(part), -1)):
            x, y, width, height = (TOKEN * value for value in regions.boxes[len(layers)])
            layers.append(clip[:, y : y + height, x : x + width].float().clamp(0, 1).cpu())  # clamped: a copy, not a view of the canvas
    return layers if decoder == NONE else [*layers, *_transparent(decoder, latent, regions)]


def _transparent(name: str, latent: Tensor, regions: Regions) -> list[Tensor]:
    """The foregrounds, each `(frames, height, width, 4)` in its box, of a latent `(channels, layers * frames, ...)` that is read as a whole."""
    state = _tensors(DECODERS, name)
    device = mm.get_torch_device()
    try:
        network = transparent_vae.build(state, comfy.ops.manual_cast)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if network.fc_in.in_features != latent.shape[0]:
        raise ValueError(
            f"{name} reads latents of {network.fc_in.in_features} channels, and samples has {latent.shape[0]}; use that of the model's VAE"
        )
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=mm.unet_offload_device())
    mm.load_models_gpu([patcher])
    return [layer.cpu() for layer in network(latent.to(device, torch.float32), regions.finer(PATCH), WHOLE)]
