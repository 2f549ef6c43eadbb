"""ComfyUI nodes. The only floor that imports `comfy`."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from ..models.upscale import spandrel_catanet
from .attention import Accelerate, AttentionReport, SparseAttention
from .diffusion_upscale import PatchUpscaleVideo
from .offload import LayerOffload, OffloadReport
from .prompt import ShapesPrompt
from .upscale import PatchUpscale, UpscaleReport

DEFAULT_WEIGHTS = Path(__file__).parent.parent / "models" / "default"
UPSCALE_MODELS = Path(__file__).parent.parent / "models" / "upscale" / "upscale_models"


class Tessera(ComfyExtension):
    async def on_load(self) -> None:
        for folder in ("diffusion_models", "vae"):  # so that the stock loaders list the built-in weights
            folder_paths.add_model_folder_path(folder, str(DEFAULT_WEIGHTS / folder))
        folder_paths.add_model_folder_path("upscale_models", str(UPSCALE_MODELS))
        logging.info("Tessera: %s", spandrel_catanet.register())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        upscalers = [PatchUpscale, PatchUpscaleVideo, UpscaleReport]
        return [Accelerate, SparseAttention, AttentionReport, LayerOffload, OffloadReport, *upscalers, ShapesPrompt]


async def comfy_entrypoint() -> Tessera:
    return Tessera()
