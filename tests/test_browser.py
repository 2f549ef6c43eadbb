"""ComfyUI's real front end in Chromium: the shared workflows as a user meets them.

Needs ComfyUI (see conftest.py), the Python package playwright and a Chromium: CHROMIUM names one, else it is looked for on the PATH
and among playwright's own (`playwright install chromium`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tessera.cli.comfy_server import ComfyServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
ACCELERATED = [name for name in NAMES if "TesseraAccelerate" in (FOLDER / f"{name}.json").read_text()]
NEWER_WIDGETS = {"bit_depth", "format.codec"}  # ComfyUI 0.33 has them, 0.18.1 has not
PATCH, SAMPLER, REPORT, VIDEO = 3, 8, 9, 12  # node ids in tessera_text_to_video
READY = """() => window.app?.extensionManager && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 100
    && app.graph?.nodes.length > 0"""  # the last: the graph that ComfyUI opens with, else it would replace ours
DROP = """text => {
    const files = new DataTransfer();
    files.items.add(new File([text], 'workflow.json', {type: 'application/json'}));
    const canvas = document.querySelector('#graph-canvas');
    for (const type of ['dragenter', 'dragover', 'drop'])
        canvas.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: files, clientX: 700, clientY: 500}));
}"""
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map(node => [node.title, ...node.pos, ...node.size]);
    const apart = ([, x1, y1, w1, h1], [, x2, y2, w2, h2]) => x1 >= x2 + w2 || x2 >= x1 + w1 || y1 - 30 >= y2 + h2 || y2 - 30 >= y1 + h1;
    return boxes.flatMap((one, i) => boxes.slice(0, i).filter(other => !apart(one, other)).map(other => [one[0], other[0]]));
}"""  # 30: the title bar
LISTEN = """() => {
    window.runEvents = [];
    for (const type of ['execution_success', 'execution_error', 'execution_interrupted', 'executed'])
        app.api.addEventListener(type, event => window.runEvents.push([type, event.detail]));
}"""


REDONE = """() => {
    const { redoQueue, _restoringState } = app.extensionManager.workflow.activeWorkflow.changeTracker;
    return _restoringState ? -1 : redoQueue.length;
}"""  # how many steps could be redone
PLAY = """file => new Promise((done, failed) => {
    const video = document.createElement('video');
    video.onloadeddata = () => done([video.videoWidth, video.videoHeight]);
    video.onerror = () => failed(new Error(video.error.message));
    video.src = app.api.apiURL('/view?' + new URLSearchParams(file));
})"""


def find_chromium(playwright: Any) -> str | None:
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        executable = find_chromium(playwright)
        if executable is None:
            pytest.skip("needs Chromium: `apt-get install chromium` or `playwright install chromium`, or name one in CHROMIUM")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, comfy: ComfyServer) -> Iterator[Any]:
    """A fresh tab with the front end loaded and its nodes registered. Errors of its scripts fail the test."""
    context = chromium.new_context(viewport={"width": 1900, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(180_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(comfy.url, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    yield page
    context.close()
    assert not errors


def drop(page: Any, file: Path) -> dict[str, Any]:
    """Drop a workflow file onto the canvas, as a user does, and wait until its graph is there. Returns the workflow."""
    workflow = json.loads(file.read_text())
    page.evaluate(DROP, file.read_text())
    ids = sorted(node["id"] for node in workflow["nodes"])
    page.wait_for_function("ids => String(app.graph.nodes.map(node => Number(node.id)).sort((a, b) => a - b)) === String(ids)", arg=ids)
    return workflow


def step(page: Any, keys: str) -> None:
    """ComfyUI's own undo or redo, of the graph, and not of what had the focus."""
    page.evaluate("() => document.activeElement.blur()")  # a click would be a step of its own where a node has changed its size
    before = page.evaluate(REDONE)
    page.keyboard.press(keys)
    page.wait_for_function(f"before => ![-1, before].includes(({REDONE})())", arg=before, timeout=20_000)


def unknown_nodes(page: Any) -> list[str]:
    return page.evaluate("() => app.graph.nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])")


def nodes_in_red(page: Any) -> list[str]:
    return page.evaluate("() => app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_workflow_means_the_same_as_its_api_file(page, name):
    """No node is unknown, and what the front end would queue is what the API file says."""
    drop(page, FOLDER / f"{name}.json")
    assert unknown_nodes(page) == []
    queued = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    assert set(queued) == set(api)
    for key, entry in api.items():
        assert queued[key]["class_type"] == entry["class_type"]
        inputs = {field: value for field, value in queued[key]["inputs"].items() if field in entry["inputs"] or field not in NEWER_WIDGETS}
        assert inputs == entry["inputs"]


@pytest.mark.parametrize("name", ACCELERATED)
def test_bypassing_the_patch_leaves_a_whole_workflow(page, name):
    """What the notes tell the user to do for a comparison: bypass Accelerate and Attention Report (Ctrl+B)."""
    drop(page, FOLDER / f"{name}.json")
    page.evaluate("() => app.graph.nodes.filter(node => node.type.startsWith('Tessera')).forEach(node => { node.mode = 4 })")
    queued = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    assert set(queued) == {key for key, entry in api.items() if not entry["class_type"].startswith("Tessera")}
    for key, entry in queued.items():
        assert set(api[key]["inputs"]) <= set(entry["inputs"])
        assert all(value[0] in queued for value in entry["inputs"].values() if isinstance(value, list))


def test_text_to_video_from_drop_to_result(page, tmp_path):
    """Drop the file, press Ctrl+Enter, wait: a video, a heat map, and the result line on the Sparse Attention node."""
    drop(page, FOLDER / "tessera_text_to_video.json")
    assert unknown_nodes(page) == nodes_in_red(page) == []
    page.evaluate("id => { app.graph.getNodeById(id).widgets.find(widget => widget.name === 'steps').value = 4 }", SAMPLER)
    page.evaluate(LISTEN)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => window.runEvents.some(([type]) => type.startsWith('execution_'))", timeout=600_000)

    events = page.evaluate("() => window.runEvents")
    assert [detail for kind, detail in events if kind == "execution_error"] == []
    outputs = {int(detail["node"]): detail["output"] for kind, detail in events if kind == "executed"}
    assert outputs[VIDEO]["images"][0]["filename"].endswith(".mp4")
    assert nodes_in_red(page) == []

    line = "id => app.graph.getNodeById(id).widgets.some(widget => String(widget.value).includes('self-attention calls sparse'))"
    page.wait_for_function(line, arg=PATCH)
    page.get_by_text("self-attention calls sparse").first.wait_for()  # drawn, not only stored
    page.wait_for_function("id => app.graph.getNodeById(id).imgs?.length", arg=REPORT)  # the heat map
    page.wait_for_function("() => document.querySelector('video')?.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA")  # it plays
    assert page.evaluate(OVERLAPS) == []  # the line made its node taller
    page.screenshot(path=tmp_path / "done.png")


@pytest.fixture
def your_video(comfy: ComfyServer) -> Iterator[None]:
    """The file that the workflow names, in the input folder before the page asks what is there."""
    import av
    from test_workflows import uploaded

    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 32, 24, "yuv420p"
        for number in range(2):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((24, 32, 3), 100 + 50 * number, np.uint8))))
        container.mux(video.encode(None))
    with uploaded(comfy, "your_video.mp4", clip.getvalue()):
        yield


def test_upscale_video_file_from_drop_to_result(your_video, page, tmp_path):
    """Drop the file, choose a smaller size, press Ctrl+Enter: the frames are counted on the node, and the result plays."""
    drop(page, FOLDER / "tessera_upscale_video_file.json")
    assert unknown_nodes(page) == nodes_in_red(page) == []
    page.evaluate("""() => {
        const size = app.graph.getNodeById(2).widgets.find(widget => widget.name === 'size');
        size.value = 'factor';
        size.callback?.('factor');
    }""")
    page.evaluate("() => { window.said = []; app.api.addEventListener('progress_text', event => window.said.push(event.detail.text)) }")
    page.evaluate(LISTEN)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => window.runEvents.some(([type]) => type.startsWith('execution_'))", timeout=600_000)
    events = page.evaluate("() => window.runEvents")
    assert [detail for kind, detail in events if kind == "execution_error"] == []
    (output,) = [detail["output"] for kind, detail in events if kind == "executed" and int(detail["node"]) == 2]
    assert output["images"][0]["filename"].endswith(".mp4") and output["images"][0]["subfolder"] == "tessera"
    said = page.evaluate("() => window.said")
    assert said[0].startswith("frame 1 of 2, ") and said[0].endswith(" left") and "frame 2 of 2, 0 s left" in said
    page.get_by_text("32 x 24 to 64 x 48: 2 frames").first.wait_for()  # drawn, not only stored
    # The node goes on showing the last live preview, which this front end prefers to the result; the file plays.
    page.wait_for_function("id => app.graph.getNodeById(id).imgs?.length", arg=2)
    assert page.evaluate(PLAY, output["images"][0]) == [64, 48]
    assert nodes_in_red(page) == page.evaluate(OVERLAPS) == []
    page.screenshot(path=tmp_path / "done.png")
