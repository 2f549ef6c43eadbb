"""Layout and Auto Layout: layers in boxes that are drawn in the browser, written as JSON, or found by rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...models.layers.document import MAX_SIDE, Document, from_core, to_core
from ...models.layers.layout import FITS, arranged, from_caption, from_json, from_masks, golden, grid, swatches
from ..comfy import said
from .document import CATEGORY, Layers, all_layers, shown, summary


def _check_boxes(boxes: str, width: int, height: int) -> None:
    from_json(boxes, width, height)


class Layout(io.ComfyNode):
    checks = (_check_boxes,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLayout",
            display_name="Layout",
            category=CATEGORY,
            description="Draw boxes on a canvas: places for Region Layers, for layers that are already there, or flat colours to paint over.",
            search_aliases=["layout editor", "bounding boxes", "draw boxes", "regions", "place layers"],
            inputs=[
                io.Int.Input("width", default=1024, min=1, max=MAX_SIDE, tooltip="Of the canvas, in pixels."),
                io.Int.Input("height", default=1024, min=1, max=MAX_SIDE, tooltip="Of the canvas, in pixels."),
                io.String.Input(
                    "boxes",
                    default="[]",
                    tooltip="Drag to draw, double-click to name. As text: a JSON list of name, x, y, width, height, lowest first.",
                    extra_dict={"widgetType": "TESSERA_LAYOUT"},  # web/layout_editor.js; the socket stays a text's
                ),
                Layers.Input("layers", optional=True, tooltip="Go into the boxes, lowest first. Without them each box is a flat colour."),
                io.Combo.Input("fit", options=list(FITS), tooltip="contain: all of it shows. cover: it fills its box. stretch: exactly its box."),
            ],
            outputs=[
                Layers.Output(display_name="layers"),
                io.String.Output(display_name="report", tooltip="Layers without a box, and boxes without a layer."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, width: int, height: int, boxes: str, fit: str, layers: Any = None) -> io.NodeOutput:
        named = from_json(boxes, width, height)
        if layers is None:
            document = Document(width, height, swatches(named))
            return io.NodeOutput(to_core(document), "", ui=said(cls, summary(document)))
        document, notes = arranged(replace(from_core(layers), width=width, height=height), [box for _, box in named], fit)
        names = iter(name for name, _ in named)
        document = document.map(lambda layer: replace(layer, name=next(names, "") or layer.name))
        count = len(all_layers(document))
        notes += [f"{name or f'box {number}'}: there is no layer for it" for number, (name, _) in enumerate(named[count:], count + 1)]
        return io.NodeOutput(to_core(document), "\n".join(notes), ui=said(cls, "\n".join([summary(document), *notes])))


class AutoLayout(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        background = io.Boolean.Input("background", default=False, tooltip="The lowest layer covers the canvas; the others are arranged.")
        layouts = [
            io.DynamicCombo.Option(
                "grid",
                [
                    io.Int.Input("columns", default=0, min=0, max=1000, tooltip="0: cells as square as they get."),
                    io.Int.Input("gap", default=16, min=0, max=4096, tooltip="Pixels between the cells and around them."),
                    background,
                ],
            ),
            io.DynamicCombo.Option("golden", [background]),
            io.DynamicCombo.Option("masks", [io.Mask.Input("masks", tooltip="One a layer, lowest first; 1 is where it goes."), background]),
            io.DynamicCombo.Option(
                "caption",
                [io.String.Input("caption", default="", multiline=True, tooltip='Such as "a dog on the left, a small bird top right". English.')],
            ),
        ]
        return io.Schema(
            node_id="TesseraAutoLayout",
            display_name="Auto Layout",
            category=CATEGORY,
            description="Places layers by rules: a grid, golden sections, where masks are, or as a caption says.",
            search_aliases=["arrange layers", "grid", "golden ratio", "align"],
            inputs=[
                Layers.Input("layers", tooltip="What is placed; those that no rule is for stay as they are."),
                io.DynamicCombo.Input("layout", options=layouts, tooltip="The rule."),
                io.Combo.Input("fit", options=list(FITS), tooltip="contain: all of it shows. cover: it fills its box. stretch: exactly its box."),
            ],
            outputs=[Layers.Output(display_name="layers"), io.String.Output(display_name="report", tooltip="Layers that were not placed, and why.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, layers: Any, layout: dict[str, Any], fit: str) -> io.NodeOutput:
        document = from_core(layers)
        kind, canvas = layout["layout"], (document.width, document.height)
        if kind == "caption":
            document, notes = from_caption(layout["caption"], document, fit)
        else:
            count = max(len(all_layers(document)) - layout["background"], 0)
            if kind == "grid":
                boxes = grid(count, *canvas, layout["columns"], layout["gap"])
            else:
                boxes = golden(count, *canvas) if kind == "golden" else from_masks(layout["masks"], canvas)
            document, notes = arranged(document, boxes, fit, layout["background"])
        pictures = shown(cls, document, all_layers(document), notes or ["all layers are placed"])
        return io.NodeOutput(to_core(document), "\n".join(notes), ui=pictures)
