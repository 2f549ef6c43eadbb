"""Region Layers, Encode and Decode Region Layers, Decode Region Video: ART's layered pictures and clips, as nodes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import folder_paths
import torch
from comfy.ldm.wan.model import WanModel
from comfy_api.latest import io
from torch import Tensor

from ...models.layers import transparent_vae
from ...models.layers.document import MAX_SIDE, Document, Layer, from_core, rgba, to_core
from ...models.layers.regions import (
    MAX_FOREGROUNDS,
    PATCH,
    TOKEN,
    TRAINED,
    WHOLE,
    Regions,
    beyond_training,
    filled,
    layer_embedding,
    parse_boxes,
    pictures,
    schedule_shift,
    snap,
    visible,
)
from ...models.layers.video import ClipLayer
from ...models.weight_files import check_numbers, read_safetensors
from ..comfy import say
from ..layers import CATEGORY, AlphaFrames, Layers, VideoLayers
from .host import KEY, network_of, patch_regions

FOLDER = "layer_embeddings"
DECODERS = "transparent_decoders"
NAMES = "tessera_region_names"  # of a latent, beside its regions: of the background and the foregrounds
DECODED_AT_ONCE = 16  # layers; larger batches gave ART's authors "odd purple output"
NONE = "none"


def _files(folder: str) -> list[str]:
    return [NONE, *folder_paths.get_filename_list(folder)]


def _tensors(folder: str, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file in a folder of models."""
    path = folder_paths.get_full_path_or_raise(folder, name)
    state, metadata = read_safetensors(path)
    check_numbers(path, state)
    return state, metadata


def _check_boxes(boxes: str, width: int, height: int) -> None:
    snap(parse_boxes(boxes), width, height)


class RegionLayers(io.ComfyNode):
    checks = (_check_boxes,)

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                Layers.Input("layers", optional=True, tooltip="Visible layers' places are the boxes, before those that are written down."),
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        width: int,
        height: int,
        boxes: str,
        layer_embedding: str,
        base_shift: float,
        max_shift: float,
        layers: Any = None,
        frames: int = 1,
    ) -> io.NodeOutput:
        placed = [] if layers is None else visible(from_core({"canvas": (width, height), **layers}), width, height)
        regions = snap([*(layer.bounds for layer in placed), *parse_boxes(boxes)], width, height, (frames - 1) // transparent_vae.FRAMES + 1)
        embedding, beyond = (None, []) if layer_embedding == NONE else _embedding(layer_embedding, regions, network_of(model))
        patched = patch_regions(model, regions, embedding, schedule_shift(regions.tokens, base_shift, max_shift))
        grey = vae.encode(_shown(vae, torch.tensor([0.5, 0.5, 0.5, 0.0]).expand(frames, TOKEN * regions.height, TOKEN * regions.width, 4)))
        samples = grey.unflatten(2, (1, -1)) if grey.ndim == 4 else grey
        channels = model.get_model_object("latent_format").latent_channels
        if samples.shape[1:] != (channels, regions.frames, PATCH * regions.height, PATCH * regions.width):
            raise ValueError(
                f"vae encodes to {tuple(grey.shape)}, not to {regions.frames} latent frames of {channels} channels and a size 8 times smaller; "
                "use the VAE of the model"
            )
        whole = len(regions.boxes) * regions.frames * regions.width * regions.height
        line = f"{regions.tokens} of {whole} tokens lie in boxes"
        if beyond:
            line += f"\n{layer_embedding} was not trained on this, expect a poor picture: {', '.join(beyond)}"
        logging.info("Tessera: %s", line)
        say(cls.hidden.unique_id, line)
        numbered = (f"Layer {number}" for number in range(len(placed) + 1, len(regions.boxes) - 1))
        names = ("Background", *(layer.name for layer in placed), *numbered)
        return io.NodeOutput(patched, {"samples": samples.repeat(1, 1, len(regions.boxes), 1, 1), KEY: regions, NAMES: names})


def _shown(vae: Any, pictures: Tensor) -> Tensor:
    """What a VAE is given of pictures `(..., 4)`: their alpha as well where it takes that, else the pictures over grey, as in ART."""
    return pictures if vae.output_channels == 4 else transparent_vae.grey_blended(pictures)


def _embedding(name: str, regions: Regions, network: Any) -> tuple[Tensor, list[str]]:
    """What is added to the layers' tokens, and what of the regions its model was not trained on, as far as the file says."""
    width = network.dim if isinstance(network, WanModel) else network.img_in.out_features
    state, metadata = _tensors(FOLDER, name)
    try:
        return layer_embedding(state, regions, width), beyond_training(metadata[TRAINED], regions) if TRAINED in metadata else []
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class EncodeRegionLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraEncodeRegionLayers",
            display_name="Encode Region Layers",
            category=CATEGORY,
            description="Puts a layered picture into the boxes of Region Layers: to sample it again with a lower denoise, or to decode it.",
            search_aliases=["art", "transparent encoder", "image to layers", "img2img", "rgba", "layers"],
            inputs=[
                Layers.Input("layers", tooltip="The background lowest, then a visible layer a box, in their order."),
                io.Vae.Input("vae", tooltip="The same as in Region Layers."),
                io.Latent.Input("latent", tooltip="From Region Layers: it has the boxes."),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For the sampler with the model of Region Layers, or for Decode Region Layers.")
            ],
        )

    @classmethod
    def execute(cls, layers: Any, vae: Any, latent: Any) -> io.NodeOutput:
        regions, samples = latent.get(KEY), latent["samples"]
        if regions is None or not regions.fits(samples, PATCH):
            raise ValueError(f"latent is {tuple(samples.shape)} without its regions; connect the latent of Region Layers")
        if regions.frames > 1:
            raise ValueError(f"latent is for clips of {regions.frames} latent frames, and layers are pictures; set frames of Region Layers to 1")
        document = from_core({"canvas": (TOKEN * regions.width, TOKEN * regions.height), **layers})
        made = filled(samples[0], regions, _codes(vae, pictures(document, regions)))
        names = tuple(layer.name for layer in visible(document, document.width, document.height))
        return io.NodeOutput({**latent, "samples": made.repeat(len(samples), 1, 1, 1, 1), NAMES: names})


def _codes(vae: Any, shown: list[Tensor]) -> Iterator[Tensor]:
    """`(channels, rows, columns)` of each picture `(height, width, 4)`."""
    bar = comfy.utils.ProgressBar(len(shown))
    for picture in shown:
        mm.throw_exception_if_processing_interrupted()
        code = vae.encode(_shown(vae, picture[None]))[0]
        yield code if code.ndim == 3 else code[:, 0]  # a video VAE's only frame
        bar.update(1)


class DecodeRegionLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
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
                Layers.Output(
                    display_name="layers",
                    is_output_list=True,
                    tooltip="The background, and each foreground cut to its box. A document for each sample of a batch.",
                ),
                io.Image.Output(display_name="image", tooltip="The merged pictures, as the model made them, one for each sample."),
            ],
        )

    @classmethod
    def execute(cls, samples: Any, vae: Any, transparent_decoder: str) -> io.NodeOutput:
        regions = _regions(samples)
        if regions.frames > 1:
            raise ValueError(f"samples has clips of {regions.frames} latent frames; decode them with Decode Region Video")
        documents, merged = [], []
        for whole, *cuts in _decoded(vae, transparent_decoder, samples["samples"], regions):
            made = [
                Layer(name, rgba(picture[0]), TOKEN * x, TOKEN * y)
                for name, picture, (x, y, _, _) in zip(samples[NAMES], cuts, regions.boxes[1:], strict=True)
            ]
            documents.append(to_core(Document(TOKEN * regions.width, TOKEN * regions.height, tuple(made))))
            merged.append(whole[..., :3])
        return io.NodeOutput(documents, torch.cat(merged))


class DecodeRegionVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
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
                VideoLayers.Output(
                    display_name="layers",
                    is_output_list=True,
                    tooltip="The background, and each foreground cut to its box; for Compose Layered Video. Once for each sample of a batch.",
                ),
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The merged clip, as the model made it. One for each sample of a batch."
                ),
            ],
        )

    @classmethod
    def execute(cls, samples: Any, vae: Any, transparent_decoder: str) -> io.NodeOutput:
        regions = _regions(samples)
        if vae.latent_dim != 3:
            raise ValueError("vae decodes pictures; use the video VAE that Region Layers had")
        layers, merged = [], []
        for whole, *clips in _decoded(vae, transparent_decoder, samples["samples"], regions):
            layers.append(
                tuple(
                    ClipLayer(name, AlphaFrames(clip, None), TOKEN * x, TOKEN * y)
                    for name, clip, (x, y, _, _) in zip(samples[NAMES], clips, regions.boxes[1:], strict=True)
                )
            )
            merged.append(whole[..., :3])
        return io.NodeOutput(layers, merged)


def _regions(samples: dict[str, Any]) -> Regions:
    """The regions of what a sampler gave. Raises ValueError where its latent is not of them."""
    regions: Regions | None = samples.get(KEY)
    latent = samples["samples"]
    if regions is None or not len(latent) or not regions.fits(latent, PATCH):
        raise ValueError(f"samples is {tuple(latent.shape)} without its regions; connect a sampler that had the latent of Region Layers")
    return regions


def _decoded(vae: Any, name: str, latents: Tensor, regions: Regions) -> Iterator[list[Tensor]]:
    """The layers of each latent `(channels, layers * frames, height, width)` of a batch. name: of the transparent decoder, or NONE."""
    if latents.shape[1] != vae.latent_channels:
        raise ValueError(f"vae decodes latents of {vae.latent_channels} channels, and samples has {latents.shape[1]}; use the VAE of Region Layers")
    decoder = None if name == NONE else _decoder(name, latents.shape[1])
    for latent in latents:
        yield _layers(vae, decoder, latent, regions)


def _layers(vae: Any, decoder: Any, latent: Tensor, regions: Regions) -> list[Tensor]:
    """Merged picture, background and foregrounds, each in its box: `(frames, height, width, 3 or 4)` in 0..1, on the CPU.

    decoder: a patcher of the network that makes the foregrounds, or None.
    """
    clips = latent.unflatten(1, (-1, regions.frames)).movedim(1, 0)
    clips = clips if vae.latent_dim == 3 else clips.squeeze(2)
    layers: list[Tensor] = []
    for part in (clips if decoder is None else clips[:WHOLE]).split(DECODED_AT_ONCE if regions.frames == 1 else 1):
        mm.throw_exception_if_processing_interrupted()
        for clip in vae.decode(part).flatten(0, -4).unflatten(0, (len(part), -1)):
            x, y, width, height = (TOKEN * value for value in regions.boxes[len(layers)])
            layers.append(clip[:, y : y + height, x : x + width].float().clamp(0, 1).cpu())  # clamped: a copy, not a view of the canvas
    return layers if decoder is None else [*layers, *_transparent(decoder, latent, regions)]


def _decoder(name: str, channels: int) -> Any:
    """A patcher of a transparent decoder for latents of so many channels."""
    state, _ = _tensors(DECODERS, name)
    try:
        network = transparent_vae.build(state, comfy.ops.manual_cast)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if network.fc_in.in_features != channels:
        raise ValueError(f"{name} reads latents of {network.fc_in.in_features} channels, and samples has {channels}; use that of the model's VAE")
    return comfy.model_patcher.ModelPatcher(network, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def _transparent(patcher: Any, latent: Tensor, regions: Regions) -> list[Tensor]:
    """The foregrounds, each `(frames, height, width, 4)` in its box, of a latent `(channels, layers * frames, ...)` that is read as a whole."""
    network, regions = patcher.model, regions.finer(PATCH)
    mm.load_models_gpu([patcher], memory_required=network.memory(regions, WHOLE))
    bar = comfy.utils.ProgressBar(len(network.blocks) + len(regions.boxes) - WHOLE)

    def report() -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update(1)

    return [layer.cpu() for layer in network(latent.to(patcher.load_device, torch.float32), regions, WHOLE, report)]
