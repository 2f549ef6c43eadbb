"""ComfyUI nodes. The only floor that imports `comfy`."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..models.upscale import spandrel_catanet
from .attention import Accelerate, AttentionReport, SparseAttention
from .comfy import guarded
from .layers import (
    AddVideoLayer,
    AutoLayout,
    ComposeLayeredVideo,
    ComposeLayers,
    EditLayer,
    LayersFromImages,
    Layout,
    LoadLayers,
    LoadTransparentVideo,
    SaveLayers,
    SaveTransparentVideo,
)
from .lora import ConceptRegion, LoRAComposer
from .offload import LayerOffload, OffloadReport
from .prompt import LayersPrompt, ShapesPrompt
from .regions import (
    LAYER_EMBEDDINGS,
    TRANSPARENT_DECODERS,
    DecodeRegionLayers,
    DecodeRegionVideo,
    EncodeRegionLayers,
    RegionLayers,
)
from .upscale import (
    PATCH_ADAPTERS,
    LoadPatchAdapter,
    PatchUpscale,
    PatchUpscaleVideo,
    PatchUpscaleVideoFile,
    PatchUpscaleVideoNetwork,
    UpscaleReport,
)

DEFAULT_WEIGHTS = Path(__file__).parent.parent / "models" / "default"
LAYERED_WEIGHTS = Path(__file__).parent.parent / "models" / "layers" / "default"
UPSCALE = Path(__file__).parent.parent / "models" / "upscale"


class Tessera(ComfyExtension):
    async def on_load(self) -> None:
        for folder in ("diffusion_models", "vae"):  # so that the stock loaders list the built-in weights
            for parent in (DEFAULT_WEIGHTS, LAYERED_WEIGHTS):
                folder_paths.add_model_folder_path(folder, str(parent / folder))
        folder_paths.add_model_folder_path("upscale_models", str(UPSCALE / "upscale_models"))
        for parent in (Path(folder_paths.models_dir), UPSCALE):
            folder_paths.add_model_folder_path(PATCH_ADAPTERS, str(parent / PATCH_ADAPTERS))
        for folder in (LAYER_EMBEDDINGS, TRANSPARENT_DECODERS):
            for parent in (Path(folder_paths.models_dir), LAYERED_WEIGHTS):
                folder_paths.add_model_folder_path(folder, str(parent / folder))
        for folder in (PATCH_ADAPTERS, LAYER_EMBEDDINGS, TRANSPARENT_DECODERS):
            folder_paths.folder_names_and_paths[folder][1].add(".safetensors")
        logging.info("Tessera: %s", spandrel_catanet.register())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        upscalers = [PatchUpscale, PatchUpscaleVideoNetwork, PatchUpscaleVideoFile, PatchUpscaleVideo, LoadPatchAdapter, UpscaleReport]
        layers = [LayersFromImages, ComposeLayers, EditLayer, AutoLayout, Layout, SaveLayers, LoadLayers]
        regions = [RegionLayers, EncodeRegionLayers, DecodeRegionLayers, DecodeRegionVideo]
        clips = [SaveTransparentVideo, LoadTransparentVideo, AddVideoLayer, ComposeLayeredVideo]
        nodes = [
            Accelerate,
            SparseAttention,
            AttentionReport,
            LayerOffload,
            OffloadReport,
            *upscalers,
            *layers,
            *regions,
            *clips,
            ConceptRegion,
            LoRAComposer,
            ShapesPrompt,
            LayersPrompt,
        ]
        return [guarded(node) for node in nodes]


async def comfy_entrypoint() -> Tessera:
    return Tessera()
