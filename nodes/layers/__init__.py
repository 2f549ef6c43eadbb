"""Pictures and clips in layers with transparency: made, edited, flattened, saved and loaded."""

from .document import CATEGORY, ComposeLayers, EditLayer, Layers, LayersFromImages, LoadLayers, SaveLayers
from .layered_video import AddVideoLayer, ComposeLayeredVideo, VideoLayers
from .layout import AutoLayout, Layout
from .transparent_video import AlphaFrames, LoadTransparentVideo, SaveTransparentVideo

__all__ = [
    "CATEGORY",
    "AddVideoLayer",
    "AlphaFrames",
    "AutoLayout",
    "ComposeLayeredVideo",
    "ComposeLayers",
    "EditLayer",
    "Layers",
    "LayersFromImages",
    "Layout",
    "LoadLayers",
    "LoadTransparentVideo",
    "SaveLayers",
    "SaveTransparentVideo",
    "VideoLayers",
]
