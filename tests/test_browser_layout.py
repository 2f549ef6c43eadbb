"""The layout editor in Chromium, on the front end of a real ComfyUI: mouse, keyboard, undo, and the PSD that comes out of the queue."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_browser import LISTEN, chromium, page, step  # noqa: F401

from tessera.cli.comfy_server import ComfyServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTH, HEIGHT = 640, 384
OPEN = """async ([width, height]) => {
    app.graph.clear();
    const [layout, save] = ['TesseraLayout', 'TesseraSaveLayers'].map(type => LiteGraph.createNode(type));
    for (const node of [layout, save]) app.graph.add(node);
    layout.pos = [300, 60];
    layout.size = [520, 620];
    save.pos = [1000, 60];
    layout.connect(0, save, 0);
    for (const [name, value] of [['width', width], ['height', height]]) {
        const widget = layout.widgets.find(widget => widget.name === name);
        widget.value = value;
        widget.callback(value);
    }
    app.canvas.ds.reset();
    app.canvas.setDirty(true, true);
    return layout.id;
}"""
LOADED = """([type, count]) => {
    const node = app.graph.findNodesByType(type)[0];
    const pictures = node.imgs ?? [...document.querySelectorAll(`[data-node-id='${node.id}'] img`)];
    return pictures.filter(picture => picture.naturalWidth > 0).length === count;
}"""
DRAWN = """() => new Promise(done => {
    app.canvas.setDirty(true, true);
    requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)));
})"""  # the first frame with pictures makes the node larger
PLACE = """type => {
    const node = app.graph.findNodesByType(type)[0];
    const [[x, y], zoom] = [app.canvas.ds.convertOffsetToCanvas(node.pos), app.canvas.ds.scale];
    const shown = app.canvas.canvas.getBoundingClientRect();
    return {x: shown.x + x, y: shown.y + y, width: node.size[0] * zoom, height: node.size[1] * zoom};
}"""
WIDGET = "const widget = name => app.graph.findNodesByType('TesseraLayout')[0].widgets.find(widget => widget.name === name);"


# The canvas has stayed where it is for twenty frames: the front end puts it into place after it has made it.
AT_REST = """() => {
    const box = document.querySelector('.tessera-layout .canvas').getBoundingClientRect();
    const place = [box.x, box.y, box.width, box.height].join();
    window.framesAtRest = place === window.lastPlace ? (window.framesAtRest ?? 0) + 1 : 0;
    window.lastPlace = place;
    return window.framesAtRest > 20;
}"""


class Editor:
    """What a user does, in pixels of the layout's canvas."""

    def __init__(self, tab: Any):
        self.tab = tab
        self.canvas = tab.locator(".tessera-layout .canvas")

    def at(self, x: float, y: float) -> tuple[float, float]:
        shown = self.canvas.bounding_box()
        return shown["x"] + x * shown["width"] / WIDTH, shown["y"] + y * shown["height"] / HEIGHT

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        mouse = self.tab.mouse
        mouse.move(*self.at(*start))
        mouse.down()
        mouse.move(*self.at(*end), steps=3)
        mouse.up()

    def text(self) -> str:
        return self.tab.evaluate(f"() => {{ {WIDGET} return widget('boxes').value }}")

    def boxes(self) -> list[tuple]:
        """What the widget holds: (name, x, y, width, height), lowest first."""
        return [tuple(box.values()) for box in json.loads(self.text())]


def see(tab: Any, node: str, count: int, file: Path) -> float:
    """Waits for so many pictures on a node. The share of the node's pixels on the screen that have the colour of a first box, hsl(0, 60%, 60%)."""
    tab.wait_for_function(LOADED, arg=[node, count])
    tab.evaluate(DRAWN)
    screen = np.asarray(Image.open(io.BytesIO(tab.screenshot(path=file, clip=tab.evaluate(PLACE, node)))).convert("RGB")).astype(int)
    return float((np.abs(screen - (214, 92, 92)).max(-1) < 12).mean())


def open_editor(tab: Any, renderer: str) -> Editor:
    tab.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", renderer == "vue")
    tab.evaluate(OPEN, [WIDTH, HEIGHT])
    editor = Editor(tab)
    tab.wait_for_function("() => document.querySelectorAll('.tessera-layout .canvas').length === 1")
    assert (tab.locator("[data-node-id] .tessera-layout").count() == 1) == (renderer == "vue")
    editor.canvas.wait_for()
    tab.wait_for_function(AT_REST)
    editor.canvas.hover(position={"x": 4, "y": 4})  # waits until the mouse reaches it
    shown = editor.canvas.bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.02) and shown["width"] > 200
    return editor


@pytest.mark.parametrize("renderer", ["litegraph", "vue"])
def test_two_drawn_boxes_become_layers_of_a_psd(page, comfy: ComfyServer, renderer, tmp_path):  # noqa: F811
    psd_tools = pytest.importorskip("psd_tools")
    editor = open_editor(page, renderer)
    press = page.keyboard.press

    editor.drag((35, 30), (290, 190))  # near the grid of 16
    editor.drag((198, 125), (500, 370))  # begins on the first one, which it therefore moves
    first, *rest = editor.boxes()
    assert not rest and first[3:] == (256, 160)
    press("Control+z")
    assert editor.boxes() == [("", 32, 32, 256, 160)]
    page.keyboard.down("Shift")
    editor.drag((198, 125), (500, 383))  # now it is drawn over it; the end is pulled to the edge of the canvas
    page.keyboard.up("Shift")
    assert editor.boxes()[1] == ("", 192, 128, 304, 256)

    page.mouse.dblclick(*editor.at(100, 60))
    page.keyboard.type("sky/../\\😀")
    press("Enter")
    assert editor.boxes()[0] == ("sky/../\\😀", 32, 32, 256, 160)
    press("ArrowLeft")
    press("Shift+ArrowDown")
    press("Control+ArrowRight")
    assert editor.boxes()[0][1:] == (31, 48, 257, 160)
    press("]")  # above the other one
    assert [box[0] for box in editor.boxes()] == ["", "sky/../\\😀"]
    for _ in range(4):
        press("Control+z")
    assert editor.boxes() == [("sky/../\\😀", 32, 32, 256, 160), ("", 192, 128, 304, 256)]
    for _ in range(3):
        press("Control+Shift+z")
    assert editor.boxes()[0][1:] == (31, 48, 257, 160)

    editor.drag((288, 208), (400, 300))  # its lower right handle, with the edges of the other box near
    assert editor.boxes()[0][1:] == (31, 48, 369, 256)
    page.keyboard.down("Alt")
    editor.drag((600, 20), (630, 41))
    page.keyboard.up("Alt")
    assert len(editor.boxes()) == 3
    press("Delete")
    names = page.locator(".tessera-layout .box").evaluate_all("boxes => boxes.map(box => box.ariaLabel)")
    assert names == ["sky/../\\😀: 31, 48, 369 × 256", "Layer 2: 192, 128, 304 × 256"]
    page.screenshot(path=tmp_path / "drawn.png")

    # The same text is in the saved workflow and in the API export, and comes back when it is opened again.
    text = editor.text()
    queued = page.evaluate("async () => { const p = await app.graphToPrompt(); return [p.workflow, p.output] }")
    assert [entry["inputs"]["boxes"] for entry in queued[1].values() if "boxes" in entry["inputs"]] == [text]
    stored = next(node["widgets_values"] for node in queued[0]["nodes"] if node["type"] == "TesseraLayout")
    assert stored[2] == text
    page.evaluate("async () => { await app.loadGraphData(app.graph.serialize()) }")
    page.wait_for_function("() => document.querySelectorAll('.tessera-layout .box').length === 2")
    assert editor.text() == text

    # Its own name: what the server has in its cache it does not run again, and says nothing.
    page.evaluate("name => { app.graph.findNodesByType('TesseraSaveLayers')[0].widgets[0].value = name }", f"layers/{renderer}")
    page.evaluate(LISTEN)
    press("Control+Enter")
    page.wait_for_function("() => window.runEvents.some(([type]) => type.startsWith('execution_'))", timeout=120_000)
    events = page.evaluate("() => window.runEvents")
    assert [detail["exception_message"] for kind, detail in events if kind == "execution_error"] == []
    assert see(page, "TesseraSaveLayers", 3, tmp_path / "saved.png") > 0.02, "the picture and both layers, on the page"
    page.get_by_text(f"{renderer}_00001_.psd in layers").first.wait_for()  # the result line
    links = page.get_by_role("group", name="Saved files").get_by_role("link")
    with page.expect_download() as download:
        links.click()
    name = download.value.suggested_filename
    assert name.endswith("_.psd") and links.all_text_contents() == [f"Download {name}"]
    links.focus()
    with page.expect_download() as again:
        press("Enter")
    file = download.value.path()
    assert file.read_bytes() == again.value.path().read_bytes()
    psd = psd_tools.PSDImage.open(file)
    assert psd.size == (WIDTH, HEIGHT)
    assert [(layer.name, *layer.bbox) for layer in psd] == [("sky/../\\😀", 31, 48, 400, 304), ("Layer 2", 192, 128, 496, 384)]
    assert psd.composite().getpixel((300, 200))[:3] == psd[1].topil().getpixel((0, 0))[:3] != psd[0].topil().getpixel((0, 0))[:3]


# What is queued for every Layout, and what the editors that can be seen show.
COUNTS = """async () => {
    const queued = Object.values((await app.graphToPrompt()).output).filter(node => node.class_type === 'TesseraLayout');
    const seen = [...document.querySelectorAll('.tessera-layout')].filter(editor => editor.checkVisibility({visibilityProperty: true}));
    const count = [queued.map(node => JSON.parse(node.inputs.boxes).length), seen.map(editor => editor.querySelectorAll('.box').length)];
    return count.map(list => list.sort().join());
}"""
LOADED_ANEW = "async () => { await app.loadGraphData(app.graph.serialize()) }"
INTO_SUBGRAPH = """() => {
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(app.graph.findNodesByType('TesseraLayout')));
    app.canvas.openSubgraph(subgraph, node);
}"""
COMMAND = "name => app.extensionManager.command.execute(name)"


def settled(tab: Any, queued: str, seen: str | None = None) -> None:
    """Waits for as many boxes in the queue and on the screen, and until the editor stays where it is."""
    counts = [queued, queued if seen is None else seen]
    for _ in range(100):
        if tab.evaluate(COUNTS) == counts:
            break
        tab.evaluate(DRAWN)
    assert tab.evaluate(COUNTS) == counts
    if counts[1]:
        tab.wait_for_function(AT_REST)


@pytest.mark.parametrize("renderer", ["litegraph", "vue"])
def test_what_is_drawn_is_what_is_queued(page, renderer):  # noqa: F811
    """After ComfyUI's own undo and redo, in another tab, in a subgraph, in a copy of the node, collapsed and bypassed."""
    editor = open_editor(page, renderer)
    page.evaluate(LOADED_ANEW)  # so that undo does not go behind it

    def until(keys: str, count: str) -> None:
        while page.evaluate(COUNTS)[0] != count:  # a node that came to the front is a step as well
            step(page, keys)
        settled(page, count)

    settled(page, "0")
    editor.drag((32, 32), (160, 160))
    editor.drag((320, 32), (448, 160))
    settled(page, "2")
    until("Control+z", "1")
    editor.drag((32, 220), (200, 350))
    editor.drag((320, 220), (448, 350))
    settled(page, "3")
    until("Control+z", "1")
    until("Control+y", "2")
    editor.drag((480, 32), (600, 160))
    settled(page, "3")

    page.evaluate(COMMAND, "Comfy.NewBlankWorkflow")
    page.wait_for_function("() => app.graph.nodes.length === 0")
    page.evaluate(COMMAND, "Workspace.PreviousOpenedWorkflow")
    settled(page, "3")
    editor.drag((32, 180), (160, 200))
    settled(page, "4")

    page.evaluate("() => app.graph.nodes.forEach(node => node.collapse())")
    settled(page, "4", "")
    page.evaluate("() => app.graph.nodes.forEach(node => node.collapse())")
    settled(page, "4")
    page.evaluate("() => app.graph.nodes.forEach(node => { node.mode = 4 })")
    settled(page, "", "4")
    page.evaluate("() => app.graph.nodes.forEach(node => { node.mode = 0 })")

    page.evaluate("""() => {
        app.canvas.selectItems(app.graph.findNodesByType('TesseraLayout'));
        app.canvas.copyToClipboard();
        app.graph.clear();
        app.canvas.pasteFromClipboard({position: [300, 60]});
    }""")
    page.evaluate("() => app.graph.add(Object.assign(LiteGraph.createNode('TesseraSaveLayers'), {pos: [1000, 60]}))")
    page.evaluate("() => app.graph.findNodesByType('TesseraLayout')[0].connect(0, app.graph.findNodesByType('TesseraSaveLayers')[0], 0)")
    settled(page, "4")
    editor.drag((500, 180), (600, 200))
    settled(page, "5")

    page.evaluate(INTO_SUBGRAPH)
    page.evaluate("() => { app.canvas.ds.reset(); app.canvas.setDirty(true, true) }")
    settled(page, "5")
    editor.drag((32, 360), (160, 380))
    editor.drag((200, 360), (300, 380))
    settled(page, "7")
    until("Control+z", "6")
    editor.drag((320, 360), (448, 380))
    settled(page, "7")


@pytest.mark.parametrize("renderer", ["litegraph", "vue"])
def test_keys_copy_boxes_and_leave_the_nodes_alone(page, renderer):  # noqa: F811
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    editor = open_editor(page, renderer)
    page.evaluate("() => app.canvas.selectItems(app.graph.nodes)")
    press, nodes = page.keyboard.press, "() => app.graph.nodes.map(node => [node.type, node.mode, node.flags.pinned ?? false]).sort()"
    before = page.evaluate(nodes)
    editor.drag((32, 32), (160, 96))
    first = ("", 32, 32, 128, 64)

    press("Control+c")
    assert json.loads(page.evaluate("() => navigator.clipboard.readText()")) == [dict(name="", x=32, y=32, width=128, height=64)]
    press("Control+v")
    press("Control+v")
    assert editor.boxes() == [first, ("", 48, 48, 128, 64), ("", 64, 64, 128, 64)], "each where it can be seen"
    press("Control+z")
    press("Control+d")
    press("Control+x")
    assert editor.boxes() == [first, ("", 48, 48, 128, 64)]
    press("Control+v")
    assert len(editor.boxes()) == 3
    page.evaluate("text => navigator.clipboard.writeText(text)", json.dumps([dict(name="a", x=0, y=0, width=9, height=9)] * 2))
    press("Control+v")
    assert editor.boxes()[3:] == [("a", 0, 0, 9, 9), ("a", 16, 16, 9, 9)], "as text from anywhere"
    page.evaluate("() => navigator.clipboard.writeText('no boxes')")
    press("Control+v")
    assert page.locator(".tessera-layout .status").inner_text() == "No boxes on the clipboard: copy one with Ctrl+C"

    drawn = editor.boxes()
    for keys in ("Control+b", "Control+m", "Control+g", "Control+a", "Alt+c", "p"):
        press(keys)
    assert editor.boxes() == drawn and page.evaluate(nodes) == before and page.evaluate("() => app.graph.groups.length") == 0
    page.locator(".tessera-layout select").select_option("4")
    page.locator(".tessera-layout select").focus()
    press("Delete")  # of the box, though the list has the focus
    press("Control+c")
    press("Control+z")
    assert editor.boxes() == drawn and page.evaluate(nodes) == before


def test_wrong_boxes_are_shown_and_refused(page):  # noqa: F811
    """Texts that did not come from the editor: it shows them, keeps them, and the server's message names the box."""
    editor = open_editor(page, "litegraph")

    def give(text: str) -> None:
        page.evaluate(f"text => {{ {WIDGET} widget('boxes').value = text }}", text)

    status, shown = page.locator(".tessera-layout .status"), page.locator(".tessera-layout .box")
    give("[1, 2")
    assert "boxes cannot be shown" in status.inner_text() and shown.count() == 0
    assert page.evaluate("async () => Object.values((await app.graphToPrompt()).output)[0].inputs.boxes") == "[1, 2"
    editor.drag((32, 32), (64, 64))
    assert editor.boxes() == [("", 32, 32, 32, 32)]
    page.keyboard.press("Control+z")
    assert editor.text() == "[1, 2", "undo brings it back"

    far = [dict(name="<b>far</b>", x=WIDTH, y=0, width=20, height=20), dict(name="thin", x=0, y=0, width=0, height=9)]
    give(json.dumps(far))
    lost = page.locator(".tessera-layout .box.lost span")
    assert lost.all_text_contents() == ["<b>far</b>", "thin"]
    assert status.inner_text() == "2 without an area or outside of the canvas (red): move, resize or delete"
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")
    refused = page.evaluate("() => JSON.stringify(app.lastNodeErrors)")
    assert "lies outside of the canvas of 640 x 384" in refused and refused.count("box 2 'thin' has no area (0 x 9 pixels)") == 1
    page.keyboard.press("Escape")  # ComfyUI's own message
    page.evaluate(f"() => {{ {WIDGET} widget('width').value *= 2; widget('width').callback(widget('width').value) }}")
    assert lost.all_text_contents() == ["thin"], "the canvas grew"

    many = [dict(name=f"{i}", x=3 * i, y=i, width=40, height=40) for i in range(200)]
    give(json.dumps(many))
    assert shown.count() == 200 and len(editor.boxes()) == 200
    page.locator(".tessera-layout select").select_option("7")
    page.get_by_role("button", name="Delete (Del)").click()
    assert [box[0] for box in editor.boxes()] == [str(i) for i in range(200) if i != 7]
