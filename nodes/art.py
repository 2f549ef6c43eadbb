"""Region Layers and Decode Region Layers: ART's anonymous regions on stock Flux and Qwen-Image models, by hooks alone."""

from __future__ import annotations

import logging
import re
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.model_sampling import ModelSamplingFlux
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..models.layers import transparent_vae
from ..models.layers.art import layer_embedding
from ..models.layers.document import MAX_SIDE, Box, Document, Layer, from_core, rgba, to_core
from ..models.layers.regions import MAX_FOREGROUNDS, TOKEN, WHOLE, Regions, schedule_shift, snap
from .layers import CATEGORY, Layers

FOLDER = "layer_embeddings"
DECODERS = "transparent_decoders"
KEY = "tessera_regions"  # of the latent, too: samplers pass on what they do not know
PATCH = 2  # latent pixels of a token's side
DECODED_AT_ONCE = 16  # layers; larger batches gave ART's authors "odd purple output"
NONE = "none"


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


def patch_regions(model: Any, regions: Regions, embedding: Tensor | None, shift: float | None) -> Any:
    """A clone of `model` that samples latents of `regions`, and nothing else. shift: of the schedule; None leaves the model's own.

    embedding: `(layers, width)` of a Flux or Qwen-Image transformer, or None. Raises ValueError for another model.
    """
    network = getattr(model.model.diffusion_model, "_orig_mod", model.model.diffusion_model)
    centred = isinstance(network, QwenImageTransformer2DModel)
    if not (centred or isinstance(network, Flux)) or network.patch_size != PATCH or len(network.pe_embedder.axes_dim) != 3:
        raise ValueError(f"model is {type(network).__name__}, and regions are for Flux.1 and Qwen-Image; load one of those")
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    hook = _Regions(regions, embedding, centred)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, hook.outer_sample)
    patches = patched.model_options["transformer_options"].setdefault("patches", {})
    others = [patch for patch in patches.get("post_input", ()) if not isinstance(getattr(patch, "__self__", None), _Regions)]
    patches["post_input"] = [*others, hook.post_input]
    sampling = model.get_model_object("model_sampling")
    if shift is not None and isinstance(sampling, ModelSamplingFlux):  # a distilled model's fixed schedule stays
        sampling = type(sampling)(model.model.model_config)
        sampling.set_parameters(shift=shift)
        patched.add_object_patch("model_sampling", sampling)
    return patched


class _Regions:
    """Sampling happens on a strip of the tokens inside the boxes, which to the model is a picture one token high.

    Noise, latent and mask are cropped before sampling and the result is put back after it, so that samplers, memory estimates and every other
    patch see as many tokens as there are. The strip's positions are replaced by the true ones after the patch embedding.
    """

    def __init__(self, regions: Regions, embedding: Tensor | None, centred: bool):
        self.regions, self.embedding, self.centred = regions, embedding, centred

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *rest, latent_shapes=None, **kwargs):
        regions = self.regions
        if not regions.fits(latent_image, PATCH):
            wanted = (latent_image.shape[0], latent_image.shape[1], len(regions.boxes), PATCH * regions.height, PATCH * regions.width)
            raise ValueError(
                f"latent_image is {tuple(latent_image.shape)}, and the model's regions need {wanted}; use model and latent of one Region Layers node"
            )
        conds = [cond for group in executor.class_obj.conds.values() for cond in group]
        unusable = sorted({name for cond in conds for name in ("control", "area", "mask", "gligen") if cond.get(name) is not None})
        if unusable:
            raise ValueError(
                f"the conditioning has {', '.join(unusable)}, which know nothing of regions; leave them out, the boxes say what is where"
            )

        def strip(x: Tensor) -> Tensor:
            x = regions.crop(x, PATCH)
            return x.unsqueeze(2) if self.centred else x

        def whole(x: Tensor) -> Tensor:
            return regions.scatter(x.squeeze(2) if self.centred else x, latent_image, PATCH)

        def shown(step, denoised, x, total):
            return callback(step, whole(denoised), x, total)

        cropped = strip(latent_image)
        if denoise_mask is not None:
            denoise_mask = strip(denoise_mask)
        watched = None if callback is None else shown
        shapes = None if latent_shapes is None else [cropped.shape]
        return whole(executor(strip(noise), cropped, sampler, sigmas, denoise_mask, watched, *rest, latent_shapes=shapes, **kwargs))

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """Positions and layer embeddings of the region tokens, which are the first of `img`; reference pictures follow."""
        regions, img, img_ids = self.regions, args["img"], args["img_ids"].clone()
        tokens = img.shape[1] - sum(args["transformer_options"].get("reference_image_num_tokens", ()))
        if tokens != regions.tokens:
            raise ValueError(
                f"the model got {tokens} picture tokens and its regions have {regions.tokens}; "
                "give the model of Region Layers to a sampler, not to a node that tiles"
            )
        ids = regions.ids.to(img_ids)
        if self.centred:  # Qwen-Image counts rows and columns from the middle, and its text from the middle of the longer side
            ids = ids - ids.new_tensor([0, regions.height // 2, regions.width // 2])
            start = max(regions.height // 2, regions.width // 2)
            text = args["txt_ids"]
            args = {**args, "txt_ids": torch.arange(start, start + text.shape[1], device=text.device).to(text)[None, :, None].expand_as(text)}
        img_ids[:, : regions.tokens] = ids
        if self.embedding is not None:
            added = self.embedding.to(img)[regions.ids[:, 0].to(img.device)]
            img = torch.cat([img[:, : regions.tokens] + added, img[:, regions.tokens :]], 1)
        return {**args, "img": img, "img_ids": img_ids}


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
            description="Makes Flux or Qwen-Image sample a merged picture, a background and foregrounds at once, each inside its box.",
            search_aliases=["art", "anonymous region", "layered", "transparent layers", "multi-layer"],
            inputs=[
                io.Model.Input("model", tooltip="Flux.1 or Qwen-Image, with a LoRA that was trained on layers."),
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
                io.Float.Input("base_shift", default=0.5, min=0.0, max=10.0, step=0.01, advanced=True, tooltip="Of the schedule at 256 tokens."),
                io.Float.Input("max_shift", default=1.15, min=0.0, max=10.0, step=0.01, advanced=True, tooltip="Of the schedule at 4096 tokens."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Latent.Output(display_name="latent", tooltip="For the sampler, with the model; then for Decode Region Layers."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, width, height, boxes, layer_embedding, base_shift, max_shift, layers=None) -> io.NodeOutput:
        placed = [] if layers is None else [layer.bounds for _, layer in from_core(layers).walk()]
        regions = snap([*placed, *parse_boxes(boxes)], width, height)
        embedding = None if layer_embedding == NONE else _embedding(layer_embedding, regions, model)
        patched = patch_regions(model, regions, embedding, schedule_shift(regions.tokens, base_shift, max_shift))
        grey = vae.encode(torch.full((1, TOKEN * regions.height, TOKEN * regions.width, 3), 0.5))
        samples = grey.unflatten(2, (1, -1)) if grey.ndim == 4 else grey
        if samples.shape[2:] != (1, PATCH * regions.height, PATCH * regions.width):
            raise ValueError(f"vae encodes to {tuple(grey.shape)}, not 8 times smaller; use the VAE of the model")
        logging.info("Tessera: %d of %d tokens lie in boxes", regions.tokens, len(regions.boxes) * regions.width * regions.height)
        return io.NodeOutput(patched, {"samples": samples.repeat(1, 1, len(regions.boxes), 1, 1), KEY: regions})


def _embedding(name: str, regions: Regions, model: Any) -> Tensor:
    try:
        return layer_embedding(_tensors(FOLDER, name), regions, model.model.diffusion_model.img_in.out_features)
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
        regions, latent = samples.get(KEY), samples["samples"]
        if latent.shape[0] != 1:
            raise ValueError(f"samples has {latent.shape[0]} pictures; decode one at a time, through Latent From Batch")
        if regions is None or not regions.fits(latent, PATCH):
            raise ValueError(f"samples is {tuple(latent.shape)} without its regions; connect a sampler that had the latent of Region Layers")
        layers = latent[0].movedim(1, 0)
        if transparent_decoder == NONE:
            pictures = _decoded(vae, layers)
        else:
            pictures = torch.cat([_decoded(vae, layers[:WHOLE]), _transparent(transparent_decoder, latent[0], regions)])
        made = []
        for number, ((x, y, width, height), picture) in enumerate(zip(regions.boxes[1:], pictures[1:], strict=True)):
            x, y, width, height = (TOKEN * value for value in (x, y, width, height))
            cut = picture[y : y + height, x : x + width].contiguous()
            made.append(Layer(f"Layer {number}" if number else "Background", cut, x, y))
        document = Document(TOKEN * regions.width, TOKEN * regions.height, tuple(made))
        return io.NodeOutput(to_core(document), pictures[:1, ..., :3])


def _decoded(vae: Any, layers: Tensor) -> Tensor:
    """`(layers, channels, height, width)` -> `(layers, 8 * height, 8 * width, 4)`, opaque where the autoencoder has no alpha."""
    layers = layers if vae.latent_dim == 2 else layers.unsqueeze(2)
    pictures = torch.cat([vae.decode(part).flatten(0, -4).float().cpu() for part in layers.split(DECODED_AT_ONCE)])
    return torch.stack([rgba(picture) for picture in pictures])


def _transparent(name: str, latent: Tensor, regions: Regions) -> Tensor:
    """The foregrounds `(layers, height, width, 4)` of a latent `(channels, layers, ...)`, which all of its layers are read for."""
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
    return network(latent.to(device, torch.float32), regions.finer(PATCH))[WHOLE:].cpu()
