"""Runs inside ComfyUI's Python (see test_comfy_layers.py): what the layer nodes say, show and leave behind, run through and stopped.

    python comfy_layers.py COMFYUI PACKAGE_PARENT

Prints one JSON object per node, and per case that is named there.
"""

import json
import sys
import tempfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

COMFYUI, PACKAGE_PARENT = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, COMFYUI)
sys.path.append(PACKAGE_PARENT)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = True
torch.set_num_threads(1)

import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import utils.extra_config  # noqa: E402,F401  (first, as main.py does)
from PIL import Image  # noqa: E402
from server import PromptServer  # noqa: E402

import nodes  # noqa: E402,F401
from tessera.models.layers.document import Document, Layer, to_core  # noqa: E402
from tessera.models.layers.formats import write  # noqa: E402
from tessera.nodes.comfy import guarded  # noqa: E402
from tessera.nodes.layers import AutoLayout, ComposeLayers, EditLayer, LayersFromImages, Layout, LoadLayers, SaveLayers  # noqa: E402
from tessera.nodes.layers.document import SHOWN  # noqa: E402

LAYERS = tuple(Layer(name, torch.full((20, 30, 4), 0.5 + 0.1 * number), 4 * number) for number, name in enumerate("abc"))
DOCUMENT = Document(48, 40, LAYERS)
BOXES = json.dumps([{"name": "sky", "x": 0, "y": 0, "width": 8, "height": 8}] * 2)
RUNS = {
    LayersFromImages: {"image": torch.rand(3, 8, 6, 4), "names": "x\ny\nz", "trim": False, "width": 0, "height": 0},
    ComposeLayers: {"layers": to_core(DOCUMENT), "light": "sRGB", "background": "white"},
    EditLayer: {"layers": to_core(DOCUMENT), "layer": "b", "change": {"change": "opacity", "opacity": 0.5}},
    AutoLayout: {"layers": to_core(DOCUMENT), "layout": {"layout": "golden", "background": False}, "fit": "contain"},
    Layout: {"layers": to_core(DOCUMENT), "width": 48, "height": 40, "boxes": BOXES, "fit": "contain"},
    SaveLayers: {"layers": to_core(DOCUMENT), "filename_prefix": "l/x", "format": "psd"},
    LoadLayers: {"file": "three.ora"},
}


def emit(case, **values):
    print("RESULT " + json.dumps({"case": case, **values}), flush=True)


def written(folder):
    return sorted(file.name for file in Path(folder, "output").rglob("*") if file.is_file())


def sizes(folder, images):
    return [Image.open(Path(folder, "temp", image["subfolder"], image["filename"])).size for image in images]


def run(node, **inputs):
    """Its `ui` and what it said on the node, or the name of what it raised."""
    said = []
    PromptServer.instance = SimpleNamespace(client_id="window", send_progress_text=lambda line, node_id, window: said.append([line, node_id]))
    hidden = SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)
    try:
        out = type("Node", (node,), {"hidden": hidden}).execute(**inputs).ui
    except mm.InterruptProcessingException as stopped:
        return type(stopped).__name__, said
    finally:
        mm.interrupt_current_processing(False)
    return out, said


with tempfile.TemporaryDirectory() as folder:
    for kind in ("input", "output", "temp"):
        Path(folder, kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(Path(folder, kind)))
    write(DOCUMENT, Path(folder, "input", "three.ora"))
    for node, inputs in RUNS.items():
        steps = []
        comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None, steps=steps: steps.append((value, total))
        out, said = run(node, **inputs)
        shown = {"text": out["text"], "said": said, "sizes": sizes(folder, out.get("images", ())), "steps": steps}
        before = written(folder)
        comfy.utils.PROGRESS_BAR_HOOK = lambda *given, **named: mm.interrupt_current_processing()
        stopped, nothing = run(node, **inputs)
        emit(node.__name__, **shown, stopped=stopped, after=[nothing, written(folder) == before])
    for number in range(10):  # stopped at each step of saving
        steps, before = count(), written(folder)
        comfy.utils.PROGRESS_BAR_HOOK = lambda *given, **named: mm.interrupt_current_processing(next(steps) == number)  # noqa: B023
        out, said = run(SaveLayers, layers=to_core(DOCUMENT), filename_prefix="l/s", format="psd")
        emit(f"stop {number}", stopped=isinstance(out, str), files=len(written(folder)) - len(before))
    comfy.utils.PROGRESS_BAR_HOOK = None
    write(Document(48, 40), Path(folder, "input", "none.psd"))
    none = {"layers": to_core(Document(48, 40))}
    for node, inputs in {
        LayersFromImages: {**RUNS[LayersFromImages], "image": torch.zeros(2, 40, 48, 4), "names": "", "drop_empty": True},
        ComposeLayers: RUNS[ComposeLayers] | none,
        SaveLayers: RUNS[SaveLayers] | none,
        LoadLayers: {"file": "none.psd"},
    }.items():
        out, said = run(node, **inputs)
        emit(f"none {node.__name__}", text=out["text"], sizes=sizes(folder, out["images"]))
    odd = (None, "three.ora", 7, {}, "", "\0", "x" * 5000, "../l", "three.png")
    answers = [guarded(LoadLayers).validate_inputs(file=file) for file in odd]
    kept = [LoadLayers.fingerprint_inputs(file=file) for file in (None, 7, "\0", "x" * 5000)]
    emit("answers", answers=answers, kept=kept)
    many = Document(300, 600, LAYERS * 40)
    out, said = run(SaveLayers, layers=to_core(many), filename_prefix="l/x", format="ora")
    emit("many", text=out["text"], sizes=sizes(folder, out["images"]), most=SHOWN)
