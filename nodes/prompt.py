"""Shapes Prompt and Layers Prompt: text for Tessera's own small models."""

from __future__ import annotations

from comfy_api.latest import io

from ..models.default import vocabulary
from ..models.layers.default import vocabulary as layers_vocabulary


def _check_shapes(text: str) -> None:
    vocabulary.encode(text)


def _check_layers(text: str) -> None:
    layers_vocabulary.parse(text)


class ShapesPrompt(io.ComfyNode):
    checks = (_check_shapes,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraShapesPrompt",
            display_name="Shapes Prompt",
            category="Tessera/default model",
            description="Encodes a prompt for Tessera's small built-in video model (tessera_shapes_t2v). It knows a closed vocabulary: "
            + vocabulary.describe(),
            inputs=[
                io.String.Input(
                    "text",
                    default="red disc moving right",
                    tooltip=f"One colour, one shape, one direction. {vocabulary.describe()} Empty: no condition, for the negative input.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[vocabulary.encode(text), {}]])


class LayersPrompt(io.ComfyNode):
    checks = (_check_layers,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLayersPrompt",
            display_name="Layers Prompt",
            category="Tessera/default model",
            description="Encodes a prompt for Tessera's small layered model (tessera_layers). It knows a closed vocabulary: "
            + layers_vocabulary.describe(),
            inputs=[
                io.String.Input(
                    "text",
                    default="red disc, blue ring, yellow triangle on green",
                    tooltip="Objects with commas between them, then the ground; "
                    f"{layers_vocabulary.describe()}. Empty: no condition, for the negative input.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[layers_vocabulary.embed(layers_vocabulary.parse(text))[None], {}]])
