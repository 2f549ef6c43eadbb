"""Larger pictures and clips, patch by patch: by upscale models, and by the user's own diffusion model."""

from .diffusion import PatchUpscaleVideo
from .patch_adapter import FOLDER as PATCH_ADAPTERS
from .patch_adapter import LoadPatchAdapter
from .pictures import PatchUpscale, UpscaleReport
from .video import PatchUpscaleVideoFile, PatchUpscaleVideoNetwork

__all__ = [
    "PATCH_ADAPTERS",
    "LoadPatchAdapter",
    "PatchUpscale",
    "PatchUpscaleVideo",
    "PatchUpscaleVideoFile",
    "PatchUpscaleVideoNetwork",
    "UpscaleReport",
]
