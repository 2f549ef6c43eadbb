"""Layout: boxes drawn in the browser, or written as JSON, as layers."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..models.layers.document import MAX_SIDE, Document, from_core, to_core
from ..models.layers.layout import FITS, arranged, from_json, swatches
from .layers import CATEGORY, Layers


class Layout(io.ComfyNode):
    @classmethod
    def define_schema(cls):
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
        )

    @classmethod
    def validate_inputs(cls, width, height, boxes):
        if None in (width, height, boxes):  # comes from another node
            return True
        try:
            from_json(boxes, width, height)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width, height, boxes, fit, layers=None) -> io.NodeOutput:
        named = from_json(boxes, width, height)
        if layers is None:
            return io.NodeOutput(to_core(Document(width, height, swatches(named))), "")
        document, notes = arranged(replace(from_core(layers), width=width, height=height), [box for _, box in named], fit)
        names = iter(name for name, _ in named)
        document = document.map(lambda layer: replace(layer, name=next(names, "") or layer.name))
        count = sum(1 for _ in document.walk())
        notes += [f"{name or f'box {number}'}: there is no layer for it" for number, (name, _) in enumerate(named[count:], count + 1)]
        report = "\n".join(notes)
        return io.NodeOutput(to_core(document), report, ui={"text": (report,)} if report else None)
