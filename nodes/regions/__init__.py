"""ART's anonymous regions: a diffusion model that samples a picture or clip in layers, each inside its box."""

from .host import KEY, patch_regions
from .nodes import DECODERS as TRANSPARENT_DECODERS
from .nodes import FOLDER as LAYER_EMBEDDINGS
from .nodes import DecodeRegionLayers, DecodeRegionVideo, EncodeRegionLayers, RegionLayers

__all__ = [
    "KEY",
    "LAYER_EMBEDDINGS",
    "TRANSPARENT_DECODERS",
    "DecodeRegionLayers",
    "DecodeRegionVideo",
    "EncodeRegionLayers",
    "RegionLayers",
    "patch_regions",
]
