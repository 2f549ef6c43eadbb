"""The Layout node without its editor: what the text may hold, and the layers that come of it in real ComfyUI."""

from __future__ import annotations

import io
import json

import pytest
from PIL import ImageColor

from tessera.cli.comfy_client import PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tessera.models.layers.document import Document, from_core, to_core
from tessera.models.layers.layout import from_json, swatches
from tessera.models.layers.regions import snap


def box(name: object = "a", x: object = 0, y: object = 0, width: object = 8, height: object = 8) -> dict:
    return {"name": name, "x": x, "y": y, "width": width, "height": height}


def test_boxes_keep_order_names_and_places():
    given = [box("sky/../\\😀"), box("a\nb", 2, 2), box("  ", -4, -4), {"x": 90, "y": 40, "width": 20.0, "height": 1e1}]
    found = from_json(json.dumps(given), 100, 50)
    assert found == [("sky/../\\😀", (0, 0, 8, 8)), ("a b", (2, 2, 8, 8)), ("", (-4, -4, 8, 8)), ("", (90, 40, 20, 10))]
    assert from_json("[]", 1, 1) == []
    many = [box(str(i), i % 20, i // 20) for i in range(200)]
    assert [name for name, _ in from_json(json.dumps(many), 100, 50)] == [str(i) for i in range(200)]


WRONG = [
    ("", r"boxes is not JSON"),
    ("sky, 0, 0", r"boxes is not JSON .*; write a list such as \["),
    (box(), r"boxes is .* and no list"),
    ([3], r"box 1 is 3 and no object"),
    ([box(), {"name": "b", "x": 0, "width": 4}], r"^box 2 has no y, height; "),
    ([{**box(), "w": 4, "prompt": "sky"}], r"box 1 has prompt, w, which mean nothing"),
    ([box(None)], r"box 1 has the name null, which is no text"),
    ([box(x=0.5)], r"box 1 has x 0.5, which is no whole number"),
    ([box(y="4")], r'box 1 has y "4", which is no whole number'),
    ([box(width=True)], r"box 1 has width true, which is no whole number"),
    ([box(height=float("inf"))], r"box 1 has height Infinity, which is no whole number"),
    ([box(height=float("nan"))], r"box 1 has height NaN, which is no whole number"),
    ([box(width=0), box("b", height=-3)], r"box 1 'a' has no area \(0 x 8 pixels\); box 2 'b' has no area \(8 x -3 pixels\)"),
    ([box(), box("far", 100, 0)], r"^box 2 'far' \(at 100, 0, 8 x 8\) lies outside of the canvas of 100 x 50"),
    ([box(y=-8)], r"box 1 .* lies outside"),
    ([box(width=20_000, height=20_000)], r"box 1 'a' is 20000 x 20000 pixels, which is more than 256 x 2\*\*20 in all"),
    (f"[{'1' * 5000}]", r"boxes is JSON with too long a number, or nested too deep; write"),
    ("[" * 100_000, r"boxes is JSON with too long a number, or nested too deep; write"),
    ([box(width=30_001)], r"box 1 'a' has a side of more than 30000 pixels"),
    ([box(width=0)] * 200, r"box 5 'a' has no area \(0 x 8 pixels\), and 195 more boxes are wrong; change them in the editor, or write"),
]


@pytest.mark.parametrize(("boxes", "message"), WRONG)
def test_what_is_wrong_is_said(boxes, message):
    with pytest.raises(ValueError, match=message) as error:
        from_json(boxes if isinstance(boxes, str) else json.dumps(boxes), 100, 50)
    assert len(str(error.value)) < 600


def test_a_canvas_without_area_is_refused():
    with pytest.raises(ValueError, match=r"canvas is 0 x 50 pixels"):
        from_json("[]", 0, 50)


def test_boxes_without_layers_are_flat_colours():
    """In the colours of the editor, which are CSS's; and as places that Region Layers takes from LAYERS."""
    named = [("", (i, 2 * i, 16, 32)) for i in range(12)]
    document = from_core(to_core(Document(64, 64, swatches(named))))
    layers = [layer for _, layer in document.walk()]
    assert [layer.bounds for layer in layers] == [place for _, place in named]
    assert [layer.name for layer in layers] == [f"Layer {i + 1}" for i in range(12)]
    for index, layer in enumerate(layers):
        css = ImageColor.getrgb(f"hsl({index * 137.508 % 360}, 60%, 60%)")
        assert (layer.image[0, 0, :3] * 255).tolist() == pytest.approx(css, abs=0.51)
    assert snap([layer.bounds for layer in layers], 64, 64).boxes[2:4] == ((0, 0, 1, 2), (0, 0, 2, 3))


def graph(boxes: list[dict], layers: list | None = None) -> dict:
    inputs = {"width": 320, "height": 200, "boxes": json.dumps(boxes), "fit": "stretch", **({} if layers is None else {"layers": layers})}
    return {
        "1": {"class_type": "TesseraLayout", "inputs": inputs},
        "2": {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["1", 0], "filename_prefix": "l/layout", "format": "psd"}},
    }


@pytest.mark.comfy
@pytest.mark.slow
def test_in_the_queue(any_comfy: ComfyServer):
    """200 overlapping boxes with awkward names; layers into boxes; and what is wrong is refused before anything runs."""
    psd_tools = pytest.importorskip("psd_tools")

    def opened(workflow: dict):
        outputs = any_comfy.run(workflow, timeout=120).outputs
        return outputs, psd_tools.PSDImage.open(io.BytesIO(any_comfy.fetch(outputs["2"]["tessera_files"][0])))

    boxes = [box(f"{i} ../a\\b:😀", 8 * (i % 20), 8 * (i // 20), 24, 12) for i in range(200)]
    _, psd = opened(graph(boxes))
    assert psd.size == (320, 200)
    assert [(one.name, *one.bbox) for one in psd] == [
        (one["name"], one["x"], one["y"], one["x"] + one["width"], one["y"] + one["height"]) for one in boxes
    ]

    pictures = {
        "3": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 6, "batch_size": 2, "color": 0xFF0000}},
        "4": {"class_type": "TesseraLayersFromImages", "inputs": {"image": ["3", 0], "names": "one\ntwo", "trim": True, "width": 0, "height": 0}},
    }
    workflow = graph([box("", 10, 20, 30, 40), box("new", 0, 0, 320, 200), box("spare")], layers=["4", 0])
    text = workflow["1"]["inputs"].pop("boxes")
    workflow["1"]["inputs"]["boxes"] = ["5", 0]  # a text from another node does as well
    workflow["5"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": text}}
    outputs, psd = opened({**workflow, **pictures})
    assert [(one.name, *one.bbox) for one in psd] == [("one", 10, 20, 40, 60), ("new", 0, 0, 320, 200)]
    assert outputs["1"]["text"] == ["2 layers, 320 x 200\nspare: there is no layer for it"]

    for wrong, message in (
        ([box(width=0)], "box 1 'a' has no area (0 x 8 pixels)"),
        ([box("x/y", 320)], "box 1 'x/y' (at 320, 0, 8 x 8) lies outside of the canvas of 320 x 200"),
    ):
        with pytest.raises(PromptRefusedError) as refused:
            any_comfy.queue(graph(wrong))
        assert message in str(refused.value)
    kind, options = any_comfy.get("/object_info/TesseraLayout")["TesseraLayout"]["input"]["required"]["boxes"]
    assert (kind, options["widgetType"]) == ("STRING", "TESSERA_LAYOUT"), "a text's socket, the editor's widget"
