"""Add Video Layer and Compose Layered Video: clips with alpha over one another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ...models.layers.blend import MODES
from ...models.layers.document import MAX_SIDE, clean_name
from ...models.layers.video import ClipLayer, LayeredClip
from ..comfy import Kind, custom, some
from .document import CATEGORY
from .transparent_video import AlphaFrames, followed, image_and_mask, stacked

VideoLayers = custom("TESSERA_VIDEO_LAYERS", Kind(some(ClipLayer), "layers of clips", "connect Add Video Layer or Decode Region Video"))


class AddVideoLayer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraAddVideoLayer",
            display_name="Add Video Layer",
            category=CATEGORY,
            description="Puts a clip over others as a layer, with a place, opacity and blend mode of its own.",
            search_aliases=["layered video", "overlay video", "composite video", "video compositing"],
            inputs=[
                io.Image.Input("images", tooltip="Frames, RGBA (straight alpha) or RGB. A single picture lasts as long as the others."),
                io.String.Input("name", default="", tooltip="To pick the layer by. Empty: its number."),
                io.Int.Input("x", default=0, min=-MAX_SIDE, max=MAX_SIDE, tooltip="Pixels from the left of the canvas."),
                io.Int.Input("y", default=0, min=-MAX_SIDE, max=MAX_SIDE, tooltip="Pixels from the top of the canvas."),
                io.Float.Input("opacity", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Of the whole layer."),
                io.Combo.Input("blend_mode", options=list(MODES), tooltip="How it is mixed with what lies below."),
                io.Combo.Input(
                    "ending", options=["hold", "loop", "hide"], tooltip="What a shorter clip does at its end. hold: the last frame stays."
                ),
                io.Mask.Input("mask", optional=True, tooltip="One for all frames or one each: 1 is transparent. It replaces alpha of images."),
                VideoLayers.Input("layers", optional=True, tooltip="Layers below this one."),
            ],
            outputs=[VideoLayers.Output(display_name="layers")],
        )

    @classmethod
    def execute(
        cls, images: Tensor, name: str, x: int, y: int, opacity: float, blend_mode: str, ending: str, mask: Tensor | None = None, layers: Any = ()
    ) -> io.NodeOutput:
        name = clean_name(name) or f"Layer {len(layers) + 1}"
        if name in (layer.name for layer in layers):
            raise ValueError(f"name is {name!r}, as that of a layer below; give it another")
        return io.NodeOutput((*layers, ClipLayer(name, AlphaFrames(images, mask), x, y, opacity, blend_mode, ending)))


class ComposeLayeredVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraComposeLayeredVideo",
            display_name="Compose Layered Video",
            category=CATEGORY,
            description="Flattens layers of clips frame by frame, or gives one layer alone, at its place and with its transparency.",
            search_aliases=["layered video", "overlay video", "composite video", "flatten"],
            inputs=[
                VideoLayers.Input("layers", tooltip="From Add Video Layer or Decode Region Video."),
                io.String.Input("layer", default="", tooltip="Name of the one layer to give alone. Empty: all of them over one another."),
                io.Int.Input("width", default=0, min=0, max=MAX_SIDE, tooltip="Of the canvas, in pixels. 0: that of the lowest layer."),
                io.Int.Input("height", default=0, min=0, max=MAX_SIDE, tooltip="Of the canvas, in pixels. 0: that of the lowest layer."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="RGBA with straight alpha."),
                io.Mask.Output(display_name="mask", tooltip="1 where a frame is transparent."),
            ],
        )

    @classmethod
    def execute(cls, layers: Any, layer: str, width: int, height: int) -> io.NodeOutput:
        lowest = layers[0].frames.images
        width, height = width or lowest.shape[2], height or lowest.shape[1]
        chosen = [item for item in layers if item.name == layer.strip()]
        if layer.strip() and not chosen:
            raise ValueError(f"layer is {layer!r:.60}, which is none of {', '.join(item.name for item in layers):.400}")
        frames: Iterable[Tensor] = chosen[0].on_canvas(width, height) if chosen else LayeredClip(width, height, layers)
        count = max(len(item.frames.images) for item in chosen or layers)
        images, mask = image_and_mask(stacked(followed(frames, comfy.utils.ProgressBar(count)), count))
        return io.NodeOutput(images, mask)
