"""Concept Region and LoRA Composer: several concept LoRAs in one picture, each in its box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ...models.patchers.lora_composer.composer import ALL, CROSS, Composer, kind_of
from ...models.patchers.lora_composer.concepts import Box, Concept
from ..comfy import Kind, custom, pause_malloc_graph, some
from .deltas import deltas_of
from .host import patch

CATEGORY = "Tessera/compose"


@dataclass(frozen=True, eq=False)
class Region:
    """What Concept Region hands on: a model with a LoRA, a prompt `(1, tokens, width)`, the rows of it that name the concept, and a box."""

    model: Any
    context: Tensor
    words: tuple[int, ...]
    box: Box


Concepts = custom("TESSERA_CONCEPTS", Kind(some(Region), "concepts", "connect Concept Region"))


def _check_box(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ValueError(f"{'width' if width < 1 else 'height'} is 0; give the box a width and a height above 0")


class ConceptRegion(io.ComfyNode):
    checks = (_check_box,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        def pixels(name: str, default: int, tooltip: str) -> io.Input:
            return io.Int.Input(name, default=default, min=0, max=16384, step=8, tooltip=tooltip)

        return io.Schema(
            node_id="TesseraConceptRegion",
            display_name="Concept Region",
            category=CATEGORY,
            description="One concept of a picture: a LoRA, what it shows, and the box in which it shows it. Chain one node a concept.",
            search_aliases=["regional lora", "regional prompt", "multi lora", "character lora", "lora composer"],
            inputs=[
                io.Model.Input("model", tooltip="From a stock LoRA loader, which is connected to the model that goes into LoRA Composer."),
                io.Clip.Input("clip", tooltip="From the same LoRA loader."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What is in the box. It replaces the picture's prompt there."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The words of the prompt that name the concept, as they stand there; LoRA Composer looks where they are attended to. "
                    "Empty: the whole prompt.",
                ),
                pixels("x", 0, "Left edge of the box, in pixels of the picture."),
                pixels("y", 0, "Upper edge of the box, in pixels of the picture."),
                pixels("width", 512, "Width of the box, in pixels of the picture."),
                pixels("height", 512, "Height of the box, in pixels of the picture."),
                Concepts.Input("concepts", optional=True, tooltip="The concepts before this one."),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="For LoRA Composer, or for the next Concept Region.")],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, prompt: str, words: str, x: int, y: int, width: int, height: int, concepts: Any = ()) -> io.NodeOutput:
        tokens = clip.tokenize(prompt)
        context = clip.encode_from_tokens(tokens)
        return io.NodeOutput((*concepts, Region(model, context, _rows_of(clip, tokens, context.shape[1], words), Box(x, y, x + width, y + height))))


class LoRAComposer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLoRAComposer",
            display_name="LoRA Composer",
            category=CATEGORY,
            description="Several concept LoRAs in one picture, each in its box (LoRA-Composer, arXiv:2403.11627).",
            search_aliases=["regional lora", "multi lora", "multiple characters", "concept lora", "attention mask lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model without the concepts' LoRAs. It is cloned."),
                Concepts.Input("concepts", tooltip="From Concept Region."),
                io.Latent.Input("latent", tooltip="The latent that goes into the sampler. Its size is that of the picture, in which the boxes lie."),
                io.Boolean.Input("isolation", default=True, tooltip="Self-attention does not pass from one concept's box to another's."),
                io.Boolean.Input(
                    "reinitialise",
                    default=True,
                    tooltip="Start each box from that part of the noise in which its concept shows best. One more model call.",
                ),
                io.Float.Input(
                    "enhancement",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the gradient step that makes concepts appear and fill their boxes; 1 is the paper's. It carries most of the "
                    "paper's gain, and costs a forward and a backward pass a step in the first half of the steps. SD1.5 and SDXL; 0: off.",
                ),
                io.Combo.Input(
                    "layers",
                    options=[CROSS, ALL],
                    default=CROSS,
                    advanced=True,
                    tooltip="Which layers of the LoRAs take part. cross-attention: keys, values and output, as in the paper. all layers: every "
                    "linear layer, for the tokens of the box. Models without cross-attention (Flux, Qwen-Image) always take all.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The clone. Prompts for the sampler come from stock nodes.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, concepts: Any, latent: Any, isolation: bool, reinitialise: bool, enhancement: float, layers: str) -> io.NodeOutput:
        network = model.model.diffusion_model
        if kind_of(network) not in ("unet", None) and enhancement > 0:
            raise ValueError(f"model is a {type(network).__name__}, and enhancement is for SD1.5 and SDXL; set enhancement to 0")
        ready = [Concept(region.box, region.context, region.words, deltas_of(index, region.model, model)) for index, region in enumerate(concepts, 1)]
        scale = latent.get("downscale_ratio_spacial") or model.get_model_object("latent_format").spacial_downscale_ratio
        shape = tuple(latent["samples"].shape)
        if len(shape) not in (4, 5) or min(shape) < 1:
            raise ValueError(f"latent is {shape}, and not of pictures or clips; connect the latent that goes into the sampler")
        height, width = (size * scale for size in shape[-2:])
        composer = Composer(network, ready, (height, width), isolate=isolation, layers=layers, keep=pause_malloc_graph)
        return io.NodeOutput(patch(model, composer, reinitialise, enhancement, cls.hidden.unique_id))


def _rows_of(clip: Any, tokens: dict[str, list[Any]], rows: int, words: str) -> tuple[int, ...]:
    """The rows of a prompt encoded in `rows` rows that hold `words`, each time they occur; of the whole prompt where there are none."""

    # The encoding is that of the first tokenizer (CLIP L or G) or, in Flux, of T5 alone.
    key = next((name for name in tokens if "t5" in name), next(iter(tokens)))

    def ids_of(chunk: list[Any]) -> list[Any]:
        return [entry[0] if isinstance(entry[0], int) else None for entry in chunk]  # None: an embedding

    def inner(ids: list[Any]) -> tuple[int, list[Any]]:
        """(where the text begins, its tokens): without what is there for an empty text too, start, template, end and padding."""
        same = next((place for place, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), min(len(ids), len(empty)) - 1)
        return same, ids[same : next((place for place in range(same, len(ids)) if ids[place] == empty[same]), len(ids))]

    empty = ids_of(clip.tokenize("")[key][0])
    spellings = [inner(ids_of(clip.tokenize(text)[key][0]))[1] for text in (words, " " + words)] if words.strip() else []
    found: list[int] = []
    first = min(rows - sum(len(chunk) for chunk in tokens[key]), 0)  # encoders of chat models cut their template off
    for chunk in tokens[key]:
        start, ids = inner(ids_of(chunk))
        for wanted in spellings or [ids]:
            for place in range(len(ids) - len(wanted) + 1):
                if ids[place : place + len(wanted)] == wanted:
                    found += range(first + start + place, first + start + place + len(wanted))
        first += len(chunk)
    if not found:
        raise ValueError(
            f"words is {words!r:.60}, which the prompt does not hold; write them as they stand there" if spellings else "prompt is empty"
        )
    return tuple(dict.fromkeys(found))
