"""What a run leaves on the nodes, in Chromium on the front end of a real ComfyUI: lines, links, pictures, in both renderers and after undo."""

from __future__ import annotations

from typing import Any

import pytest
from test_browser import LISTEN, chromium, page, step  # noqa: F401

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BOXES = '[{"name": "sky *a* <b>b</b>", "x": 0, "y": 0, "width": 64, "height": 48}, {"name": "__c__", "x": 9, "y": 0, "width": 9, "height": 9}]'
OPEN = """async ([boxes, prefix]) => {
    app.graph.clear();
    const add = (type, x, y, values = {}) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [x, y];
        for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value;
        return node;
    };
    const layout = add('TesseraLayout', 150, 100, { width: 64, height: 48, boxes });
    const save = add('TesseraSaveLayers', 550, 100, { filename_prefix: prefix });
    const compose = add('TesseraComposeLayers', 900, 100);
    const report = add('TesseraUpscaleReport', 1250, 100);
    add('TesseraAccelerate', 550, 600);
    layout.connect(0, save, 0);
    save.connect(0, compose, 0);
    compose.connect(0, report, 0);
    await app.loadGraphData(app.graph.serialize()); // so that undo does not go behind it
    app.canvas.ds.reset();
    app.canvas.setDirty(true, true);
}"""
# What can be seen, whatever node it is on: lines and names of files, sorted; pictures of the node that saves.
SEEN = """() => {
    const seen = query => [...document.querySelectorAll(query)].filter(part => part.checkVisibility({ visibilityProperty: true }));
    const [save] = app.canvas.graph.findNodesByType('TesseraSaveLayers');
    return {
        lines: [...seen('.tessera-result p'), ...seen('.widget-markdown')].map(part => part.textContent).filter(Boolean).sort(),
        links: seen('.tessera-result a').map(part => part.download),
        pictures: save?.imgs?.length || seen(`[data-node-id='${save?.id}'] img`).length,
    };
}"""
SAY = "([nodeId, text]) => app.api.dispatchEvent(new CustomEvent('progress_text', { detail: { nodeId, text } }))"  # as the server does
COMMAND = "name => app.extensionManager.command.execute(name)"
STEP = """() => {
    app.canvas.emitBeforeChange();
    app.graph.findNodesByType('TesseraSaveLayers')[0].title = 'another';
    app.canvas.emitAfterChange();
}"""  # that can be undone
EVERY = """() => {
    app.graph.clear();
    const types = Object.keys(LiteGraph.registered_node_types).filter(type => type.startsWith('Tessera'));
    types.forEach((type, index) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [500 * (index % 8), 700 * Math.floor(index / 8)];
        node.onExecuted({ text: [`line of ${type}`] });
        node.onExecuted(null); // one that the server had in its cache and has nothing to show
    });
    app.canvas.ds.reset();
    app.canvas.ds.scale = 0.22;
    app.canvas.setDirty(true, true);
    return types.map(type => `line of ${type}`).sort();
}"""


def renderer_is(tab: Any, renderer: str) -> None:
    tab.evaluate("vue => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', vue)", renderer == "vue")


def run(tab: Any) -> None:
    tab.evaluate(LISTEN)
    tab.keyboard.press("Control+Enter")
    tab.wait_for_function("() => window.runEvents.some(([type]) => type.startsWith('execution_'))", timeout=120_000)
    assert [detail for kind, detail in tab.evaluate("() => window.runEvents") if kind == "execution_error"] == []


@pytest.mark.parametrize("renderer", ["litegraph", "vue"])
def test_lines_links_and_pictures_stay(page, renderer, tmp_path):  # noqa: F811
    """After undo, redo and another tab, when collapsed and opened, in a subgraph; word for word; none of it in the workflow."""
    renderer_is(page, renderer)
    page.evaluate(OPEN, [BOXES.replace("sky", renderer), f"results/{renderer}"])  # what the server has in its cache says nothing
    nothing = {"lines": [], "links": [], "pictures": 0}

    def seen(expected: dict[str, Any]) -> None:
        equal = f"expected => JSON.stringify(({SEEN})()) === JSON.stringify(expected)"
        try:
            page.wait_for_function(equal, arg=expected, timeout=20_000)
        except Exception:
            assert page.evaluate(SEEN) == expected
            raise

    seen(nothing)
    run(page)
    saved = f"{renderer}_00001_.psd"
    lines = sorted(["2 layers, 64 x 48", "2 layers, 64 x 48", f"{saved} in results", "width 64, height 48, frames 1"])
    shown = {"lines": lines, "links": [saved], "pictures": 3}
    seen(shown)
    # A patch says its line when the sampler is done, and has no output of its own.
    patch = page.evaluate("() => String(app.graph.findNodesByType('TesseraAccelerate')[0].id)")
    page.evaluate(SAY, [patch, "sky *a* <b>b</b> __c__ · 24 of 40"])
    shown["lines"] = sorted([*lines, "sky *a* <b>b</b> __c__ · 24 of 40"])
    seen(shown)
    page.screenshot(path=tmp_path / "run.png")

    page.evaluate(STEP)
    for keys, title in (("Control+z", "Save Layers"), ("Control+y", "another")):
        named = f"() => app.graph.findNodesByType('TesseraSaveLayers')[0].title === '{title}'"
        while not page.evaluate(named):  # a size that a line has changed is a step as well
            step(page, keys)
        seen(shown)

    page.evaluate(COMMAND, "Comfy.NewBlankWorkflow")
    page.wait_for_function("() => app.graph.nodes.length === 0")
    seen(nothing)
    page.evaluate(COMMAND, "Workspace.PreviousOpenedWorkflow")
    seen(shown)
    page.evaluate("() => app.graph.nodes.forEach(node => node.collapse())")
    page.wait_for_function(f"() => ({SEEN})().lines.length === 0")
    page.evaluate("() => app.graph.nodes.forEach(node => node.collapse())")
    seen(shown)

    # Another run puts its own in their place, on the element that is seen.
    page.evaluate("() => { app.graph.findNodesByType('TesseraSaveLayers')[0].widgets.find(widget => widget.name === 'format').value = 'ora' }")
    run(page)
    before, saved = saved, f"{renderer}_00002_.ora"
    shown["links"] = [saved]
    shown["lines"] = sorted(line.replace(before, saved) for line in shown["lines"])
    seen(shown)
    assert "_0000" not in page.evaluate("() => JSON.stringify(app.graph.serialize())")

    page.evaluate("""() => {
        const { subgraph, node } = app.graph.convertToSubgraph(new Set(app.graph.nodes));
        window.inside = [subgraph, node];
    }""")
    run(page)  # seen from outside; the server has it all in its cache, and says it again
    page.evaluate("() => { app.canvas.openSubgraph(...inside); app.canvas.ds.reset(); app.canvas.setDirty(true, true) }")
    seen({**shown, "lines": sorted({"2 layers, 64 x 48", f"{saved} in results", "width 64, height 48, frames 1"})})


@pytest.mark.parametrize("renderer", ["litegraph", "vue"])
def test_every_node_can_show_its_line(page, renderer, tmp_path):  # noqa: F811
    renderer_is(page, renderer)
    lines = page.evaluate(EVERY)
    assert len(lines) > 25
    page.wait_for_function(f"lines => JSON.stringify(({SEEN})().lines) === JSON.stringify(lines)", arg=lines)
    page.screenshot(path=tmp_path / "every.png")


RESTORED = """() => {
    app.graph.clear();
    const [one, inside] = ['TesseraSaveLayers', 'TesseraSaveTransparentVideo'].map(type => LiteGraph.createNode(type));
    for (const node of [one, inside]) app.graph.add(node);
    const { subgraph } = app.graph.convertToSubgraph(new Set([inside]));
    const [kept] = subgraph.nodes;
    const file = (filename, subfolder = '') => ({ filename, subfolder, type: 'output' });
    app.nodeOutputs = {
        [one.id]: { tessera_files: [file('<b>a&b</b> 😀_00001_.psd', 'x/y'), file('v1.5_00001_', 'x')] },
        [`${subgraph.id}:${kept.id}`]: { tessera_files: [file('clip_00001_.mov')] },
        404: { tessera_files: [file('gone_00001_.psd')] },
    };
    const lines = node => [...node.widgets.find(widget => widget.files).files.children];
    const link = lines(one)[0];
    return {
        links: [...lines(one), ...lines(kept)].map(line => [line.tagName, line.textContent, line.download ?? '']),
        query: Object.fromEntries(new URL(link.href).searchParams),
        stored: JSON.stringify(app.graph.serialize()).includes('00001_'),
        values: one.serialize().widgets_values,
    };
}"""


def test_links_come_back_with_the_outputs(page):  # noqa: F811
    """As when another tab or a run of the history is opened: on the node, in a subgraph too, as text, and not in the workflow."""
    found = page.evaluate(RESTORED)
    assert found["links"] == [
        ["A", "Download <b>a&b</b> 😀_00001_.psd", "<b>a&b</b> 😀_00001_.psd"],
        ["SPAN", "Folder output/x/v1.5_00001_", ""],
        ["A", "Download clip_00001_.mov", "clip_00001_.mov"],
    ]
    assert found["query"] == {"filename": "<b>a&b</b> 😀_00001_.psd", "subfolder": "x/y", "type": "output"}
    assert not found["stored"] and found["values"] == ["layers/Tessera", "psd"]
