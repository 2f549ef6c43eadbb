"""The layer nodes through the queue of real ComfyUI, old and new, and together with core's own layer nodes."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import _installed
from PIL import Image
from psd_tools import PSDImage
from test_layers_blend import flat, levels
from test_layers_document import document, same
from test_layers_files import one_layer, ora_of, png_bomb
from test_layers_psd import psd_of
from test_workflows import uploaded

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tessera.models.layers import png
from tessera.models.layers.compose import composite
from tessera.models.layers.document import Document, Layer
from tessera.models.layers.formats import EXTENSIONS, either, read, write
from tessera.models.layers.pixels import eight_bit
from tiny_models import LAYERED, LAYERED_VAE, write_qwen_image_layered

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def psd_tools_there() -> None:
    """ComfyUI's Python may not have what this pack needs."""
    python = _installed(old=False).python
    if subprocess.run([python, "-c", "import psd_tools"], capture_output=True).returncode:
        pytest.skip(f"needs psd-tools in ComfyUI's Python: {python} -m pip install -r requirements.txt")


def give(server: ComfyServer, before: Document, name: str) -> None:
    """A file into the server's input folder."""
    assert server._base is not None
    write(before, server._base / "input" / name)


def saved(server: ComfyServer, outputs: dict, node: str, tmp_path: Path) -> Document:
    """What Save Layers wrote, read back."""
    file = outputs[node]["tessera_files"][0]
    if not Path(file["filename"]).suffix:
        assert server._base is not None
        return read(server._base / "output" / file["subfolder"] / file["filename"])[0]
    copy = tmp_path / file["filename"]
    copy.write_bytes(server.fetch(file))
    return read(copy)[0]


def pixels(server: ComfyServer, outputs: dict, node: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.fetch(outputs[node]["images"][0])))).astype(np.float64)


@pytest.mark.parametrize(("ending", "format"), [("psd", "ora"), ("ora", "psd"), ("psd", "png")])
def test_files_pass_through_unchanged(any_comfy: ComfyServer, ending, format, tmp_path):
    before = document()
    give(any_comfy, before, f"sub/{ending}_{format}.{ending}")
    graph = {
        "1": {"class_type": "TesseraLoadLayers", "inputs": {"file": f"sub/{ending}_{format}.{ending}"}},
        "2": {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["1", 0], "light": "sRGB", "background": "transparent"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "flat"}},
        "4": {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["1", 0], "filename_prefix": "l/x", "format": format}},
    }
    outputs = any_comfy.run(graph, timeout=300).outputs
    same(before, saved(any_comfy, outputs, "4", tmp_path))
    assert np.abs(pixels(any_comfy, outputs, "3") - eight_bit(composite(before))).max() <= 1, "SaveImage rounds down"
    assert outputs["1"]["text"][0] == "6 layers, 61 x 47"
    assert [len(outputs[node]["images"]) for node in "124"] == [7, 1, 7], "the picture, and each layer where layers are shown"


def test_layers_are_made_edited_and_arranged(any_comfy: ComfyServer, tmp_path):
    """A picture with a transparent border becomes a trimmed layer; two solid ones join it; each property is changed once."""
    picture = torch.zeros(20, 30, 4)
    picture[4:14, 5:25] = levels(10, 20, 4).clamp_min(1 / 255)
    give(any_comfy, Document(30, 20, (Layer("in", picture),)), "rgba.ora")
    graph = {
        "1": {"class_type": "TesseraLoadLayers", "inputs": {"file": "rgba.ora"}},
        "2": {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["1", 0], "light": "linear", "background": "transparent"}},
        "3": {"class_type": "TesseraLayersFromImages", "inputs": {"image": ["2", 0], "names": "cut\n", "trim": True, "width": 0, "height": 0}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 6, "batch_size": 2, "color": 0xFF0000}},
        "5": {"class_type": "SolidMask", "inputs": {"value": 0.25, "width": 8, "height": 6}},
        "6": {
            "class_type": "TesseraLayersFromImages",
            "inputs": {
                **{"image": ["4", 0], "mask": ["5", 0], "layers": ["3", 0], "names": "\nred/../\\😀", "trim": False, "width": 100, "height": 0},
            },
        },
    }
    edits = [
        ("red/../\\😀", "opacity", {"opacity": 0.2}),
        ("2", "position", {"x": -3, "y": 44}),
        ("2", "size", {"width": 40, "height": 0}),
        ("2", "turn", {"degrees": 90.0, "flip_h": True, "flip_v": False}),
        ("-1", "blend mode", {"blend_mode": "lighter-color"}),
        ("-1", "visibility", {"visible": False}),
        ("2", "name", {"name": "two"}),
        ("two", "order", {"position": -1}),
        ("two", "mask", {"mask": ["5", 0]}),
    ]
    last = "6"
    for number, (layer, kind, values) in enumerate(edits, 10):
        inputs = {"layers": [last, 0], "layer": layer, "change": kind, **{f"change.{name}": value for name, value in values.items()}}
        last = str(number)
        graph[last] = {"class_type": "TesseraEditLayer", "inputs": inputs}
    save = {"layers": [last, 0], "filename_prefix": "l/edited", "format": "png"}
    graph["30"] = {"class_type": "TesseraSaveLayers", "inputs": save}
    grid = {"layers": [last, 0], "layout": "grid", "layout.columns": 3, "layout.gap": 2, "layout.background": False, "fit": "stretch"}
    graph["31"] = {"class_type": "TesseraAutoLayout", "inputs": grid}
    graph["32"] = {"class_type": "TesseraSaveLayers", "inputs": {**save, "layers": ["31", 0], "filename_prefix": "l/grid"}}
    masks = {"layers": [last, 0], "layout": "masks", "layout.masks": ["33", 0], "layout.background": True, "fit": "contain"}
    graph["33"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 10, "height": 10}}
    graph["34"] = {"class_type": "TesseraAutoLayout", "inputs": masks}
    graph["35"] = {"class_type": "TesseraSaveLayers", "inputs": {**save, "layers": ["34", 0], "filename_prefix": "l/masks"}}
    outputs = any_comfy.run(graph, timeout=300).outputs

    edited = saved(any_comfy, outputs, "30", tmp_path)
    cut, red, two = edited.layers
    assert (edited.width, edited.height) == (100, 20)
    assert (cut.name, red.name, two.name) == ("cut", "red/../\\😀", "two")
    assert (cut.x, cut.y) == (5, 4) and (cut.image - picture[4:14, 5:25]).abs().max() < 1.01 / 255
    assert (red.opacity, red.blend_mode, red.visible) == (0.2, "lighter-color", False)
    assert torch.equal(red.image, flat((1, 0, 0, 1), 6, 8)) and (red.mask - 0.75).abs().max() < 1 / 255
    assert (two.x, two.y, two.size, two.transform.flip_h) == (-3, 44, (40, 6), True)
    assert two.transform.rotation == pytest.approx(np.pi / 2) and (two.mask - 0.75).abs().max() < 1 / 255
    assert [layer.bounds for layer in saved(any_comfy, outputs, "32", tmp_path).layers] == [(2, 2, 30, 16), (34, 2, 31, 16), (67, 2, 31, 16)]
    masked = saved(any_comfy, outputs, "35", tmp_path).layers
    assert masked[0].bounds == (0, -15, 100, 50) and masked[1].bounds == (36, 0, 27, 20)
    assert outputs["34"]["text"] == ["two: there is no box for it"] and len(outputs["34"]["images"]) == 4
    assert outputs["10"]["text"] == [f"opacity of {edits[0][0]!r}"] and len(outputs["10"]["images"]) == 2


def test_captions_and_golden_sections(any_comfy: ComfyServer, tmp_path):
    give(any_comfy, Document(100, 100, (Layer("dog", levels(10, 10, 4)), Layer("sky", levels(10, 10, 4)))), "two.psd")
    caption = {"layout": "caption", "layout.caption": "the dog on the left and the sky in the background"}
    graph = {"1": {"class_type": "TesseraLoadLayers", "inputs": {"file": "two.psd"}}}
    for node, layout in (("2", caption), ("4", {"layout": "golden", "layout.background": False})):
        graph[node] = {"class_type": "TesseraAutoLayout", "inputs": {"layers": ["1", 0], "fit": "stretch", **layout}}
        inputs = {"layers": [node, 0], "filename_prefix": "l/layout", "format": "png"}
        graph[str(int(node) + 1)] = {"class_type": "TesseraSaveLayers", "inputs": inputs}
    outputs = any_comfy.run(graph, timeout=300).outputs
    said = saved(any_comfy, outputs, "3", tmp_path).layers
    assert [(layer.name, layer.bounds) for layer in said] == [("sky", (0, 0, 100, 100)), ("dog", (0, 33, 33, 33))]
    assert [layer.bounds for layer in saved(any_comfy, outputs, "5", tmp_path).layers] == [(0, 0, 62, 100), (62, 0, 38, 100)]


BAD_FILES = {
    "broken.psd": "not a Photoshop file, or damaged; make or download it again",
    "cmyk.psd": "it is CMYK with 8 bits a channel; convert it to RGB with 8 or 16",
    "slip.ora": "points out of the archive; do not trust this file",
    "bomb.ora": "cannot be read: its layers have 900 million pixels",
}


def test_nothing_is_written_outside_the_output_folder(any_comfy: ComfyServer, tmp_path):
    assert any_comfy._base is not None
    files = any_comfy._base / "input"
    give(any_comfy, document(), "plain.ora")
    (files / "broken.psd").write_bytes(b"8BPS not quite")
    for name, mode, depth in (("cmyk", "CMYK", 8), ("sixteen", "RGB", 16)):
        (files / f"{name}.psd").write_bytes(psd_of(tmp_path, mode, depth).read_bytes())
    ora_of(files / "slip.ora", one_layer("../../escaped.png"), **{"../../escaped.png": b"PNG"})
    ora_of(files / "bomb.ora", one_layer(), **{"data/a.png": png_bomb(30_000)})
    (any_comfy._base / "outside.psd").write_bytes(b"8BPS")
    load = {"class_type": "TesseraLoadLayers", "inputs": {"file": "plain.ora"}}
    save = {"layers": ["1", 0], "filename_prefix": "../../escaped", "format": "png"}
    with pytest.raises(PromptRefusedError, match="leaves the output folder"):
        any_comfy.run({"1": load, "2": {"class_type": "TesseraSaveLayers", "inputs": save}}, timeout=300)
    show = {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["1", 0], "light": "sRGB", "background": "white"}}
    for name in ("../outside.psd", "none.psd", "/etc/passwd"):
        with pytest.raises(PromptRefusedError, match=re.escape(f"no {either(EXTENSIONS)} in the input folder")):
            any_comfy.run({"1": {**load, "inputs": {"file": name}}, "2": show})
    for name, message in BAD_FILES.items():
        with pytest.raises(PromptFailedError, match=message) as failed:
            any_comfy.run({"1": {**load, "inputs": {"file": name}}, "2": show}, timeout=300)
        assert name in str(failed.value)
    outputs = any_comfy.run({"1": {**load, "inputs": {"file": "sixteen.psd"}}, "2": show}, timeout=300).outputs
    assert outputs["1"]["text"][0].startswith("1 layers, 6 x 5") and len(outputs["1"]["images"]) == 2
    edit = {"layers": ["1", 0], "layer": "cat", "change": "opacity", "change.opacity": 0.5}
    with pytest.raises(PromptFailedError, match="there is none of that name or number"):
        graph = {"1": load, "3": {"class_type": "TesseraEditLayer", "inputs": edit}, "2": {**show, "inputs": {**show["inputs"], "layers": ["3", 0]}}}
        any_comfy.run(graph, timeout=300)
    assert not list(any_comfy._base.parent.rglob("escaped*"))


def test_core_nodes_take_our_layers_and_give_theirs(comfy: ComfyServer, tmp_path):
    """Normal layers look the same in core's Create Layered Image and in ours in linear light. Core adds to what we made, and groups survive."""
    soft = [Layer(f"{i}", levels(20, 30, 4), 3 * i, 2 * i, 0.7, mask=levels(20, 30)) for i in range(2)]
    opaque = Layer("paper", flat((0.3, 0.6, 0.9, 1), 40, 50))
    give(comfy, Document(50, 40, (opaque, *soft)), "soft.ora")
    before = document()
    give(comfy, before, "groups.ora")
    compositor = {"class_type": "ImageCompositor", "inputs": {"layers": ["1", 0], "compositor": {}}}
    graph = {
        "1": {"class_type": "TesseraLoadLayers", "inputs": {"file": "soft.ora"}},
        "2": compositor,
        "3": {"class_type": "TesseraComposeLayers", "inputs": {"layers": ["1", 0], "light": "linear", "background": "transparent"}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "core"}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "ours"}},
        "6": {"class_type": "TesseraLoadLayers", "inputs": {"file": "groups.ora"}},
        "7": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 6, "batch_size": 1, "color": 0xFF0000}},
        "8": {
            "class_type": "AddLayer",
            "inputs": {"layers": ["6", 0], "image": ["7", 0], "name": "added", "x": 4, "rotation": 45.0, "z_index": 99, "blend_mode": "grain-merge"},
        },
        "9": {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["8", 0], "filename_prefix": "l/joined", "format": "png"}},
        "10": {**compositor, "inputs": {"layers": ["8", 0], "compositor": {}}},
        "11": {"class_type": "PreviewImage", "inputs": {"images": ["10", 0]}},
    }
    outputs = comfy.run(graph, timeout=300).outputs
    assert np.abs(pixels(comfy, outputs, "4") - pixels(comfy, outputs, "5")[..., :3]).max() <= 1
    joined = saved(comfy, outputs, "9", tmp_path)
    added = joined.layers[-1]
    assert (added.name, added.x, added.blend_mode, added.transform.rotation) == ("added", 4, "grain-merge", pytest.approx(np.pi / 4))
    same(before, Document(61, 47, joined.layers[:-1]))
    names = json.loads((comfy._base / "output" / "l" / outputs["9"]["tessera_files"][0]["filename"] / png.INDEX).read_text())["layers"]
    assert [entry["name"] for entry in names] == ["ground", "people 😀", "people 😀", "far out", "added"]


def named_inputs(inputs: dict) -> Iterator[tuple[str, str]]:
    """Name and tooltip of each input in ComfyUI's description of a node, those behind a choice too."""
    for name, (kind, *rest) in itertools.chain.from_iterable(inputs.get(part, {}).items() for part in ("required", "optional")):
        settings = rest[0] if rest else {}
        yield name, settings.get("tooltip", "")
        for option in settings["options"] if kind == "COMFY_DYNAMICCOMBO_V3" else ():
            yield from named_inputs(option["inputs"])


def test_every_input_has_a_tooltip_and_is_on_the_help_page(comfy: ComfyServer):
    pages, seen = Path(__file__).parent.parent / "web" / "docs", set()
    for node in SAID:
        page = (pages / f"Tessera{node}.md").read_text()
        found = list(named_inputs(comfy.get(f"/object_info/Tessera{node}")[f"Tessera{node}"]["input"]))
        assert [name for name, tooltip in found if not tooltip] == [], node
        assert [name for name, _ in found if f"**{name}**" not in page] == [], node
        seen |= {name for name, _ in found}
    assert {"matte", "flip_h", "gap", "boxes", "file"} <= seen


@pytest.fixture(scope="module", params=[False, True], ids=["comfy", "comfy_old"])
def alone(request: pytest.FixtureRequest, package_path: Path) -> dict[str, dict]:
    """What comfy_layers.py reports of each node."""
    install = _installed(old=request.param)
    done = subprocess.run([install.python, Path(__file__).parent / "comfy_layers.py", install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line.pop("case"): line for line in lines}


SAID = {
    "LayersFromImages": "3 layers, 6 x 8",
    "ComposeLayers": "3 layers, 48 x 40",
    "EditLayer": "opacity of 'b'",
    "AutoLayout": "all layers are placed",
    "Layout": "3 layers, 48 x 40\nc: there is no box for it",
    "SaveLayers": "x_00001_.psd in l",
    "LoadLayers": "3 layers, 48 x 40",
}
PICTURES = {"ComposeLayers": 1, "EditLayer": 2, "Layout": 0}


@pytest.mark.parametrize("node", SAID)
def test_a_node_says_shows_counts_and_stops(alone, node):
    """On the node and in the history; the bar counts layers; stopped at the first of them, nothing is said, shown or written."""
    line = alone[node]
    assert line["text"] == [SAID[node]] and line["said"] == [[SAID[node], "7"]]
    assert line["sizes"] == [[6, 8] if node == "LayersFromImages" else [48, 40]] * PICTURES.get(node, 4)
    if node != "Layout":  # which only notes numbers
        counted = 4 if node == "ComposeLayers" else 3  # its background is one more
        assert line["steps"][0] == [0, counted] and line["stopped"] == "InterruptProcessingException"
        assert line["after"] == [[], True]


NONE = {
    "LayersFromImages": "0 layers, 48 x 40\nLayer 1: empty, left out\nLayer 2: empty, left out",
    "ComposeLayers": "0 layers, 48 x 40",
    "SaveLayers": "x_00002_.psd in l",
    "LoadLayers": "0 layers, 48 x 40",
}


@pytest.mark.parametrize("node", NONE)
def test_documents_without_layers_are_documents(alone, node):
    """The picture of the whole is shown, and no others."""
    assert alone[f"none {node}"] == {"text": [NONE[node]], "sizes": [[48, 40]]}


def test_the_file_s_validation_answers_and_never_raises(alone):
    """None is a link, whose text comes in the run."""
    linked, there, *wrong = alone["answers"]["answers"]
    assert linked is True and there is True and len(wrong) == 7
    assert wrong[:2] == ["file is 7; use none.psd or three.ora", "file is an empty record; use none.psd or three.ora"]
    assert all(f"which is no {either(EXTENSIONS)} in the input folder; put it there" in answer for answer in wrong[2:])
    assert alone["answers"]["kept"] == ["unknown"] * 4


def test_layers_that_are_not_saved_to_the_end_leave_no_file(alone):
    """Stopped while the picture is made, the thumbnails are, or the file is."""
    steps = [alone[f"stop {number}"] for number in range(10)]
    assert [step["files"] for step in steps] == [0 if step["stopped"] else 1 for step in steps]
    assert [step["stopped"] for step in steps[:3]] == [True] * 3 and not steps[-1]["stopped"]


def test_pictures_on_a_node_are_bounded(alone):
    line = alone["many"]
    assert line["sizes"] == [[300, 600], *[[128, 256]] * line["most"]] and line["most"] < 120
    assert line["text"] == [f"x_00003_.ora in l\nthe pictures are of the first {line['most']} layers"]


@pytest.fixture(scope="module", params=[False, True], ids=["comfy", "comfy_old"])
def layered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with a tiny Qwen-Image-Layered."""
    pytest.importorskip("diffusers", reason="its weights' names")
    models = write_qwen_image_layered(tmp_path_factory.mktemp("layered"))
    with ComfyServer(_installed(old=request.param), models=models, custom_nodes=[Path(__file__).parent / "tiny_sizes"]) as server:
        yield server


def picture_of(layer: Any, canvas: tuple[int, int]) -> np.ndarray:
    """A psd-tools layer on its canvas, `(height, width, 4)`, 0 where it is not."""
    out = np.zeros((canvas[1], canvas[0], 4))
    out[layer.top : layer.bottom, layer.left : layer.right] = np.asarray(layer.topil().convert("RGBA"))
    return out


@pytest.mark.parametrize("first", ["left out", "hidden"])
def test_qwen_image_layered_to_photoshop(layered: ComfyServer, first, tmp_path):
    """Sampled sparsely on stock nodes with a reference, decoded to RGBA, and saved: the PSD holds the decoded pictures but for the merged one."""
    sparse = {"method": "draft", "density": 0.5, "precision": "native", "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    seed = 1 + (first == "hidden")  # nodes that ComfyUI need not run again report nothing
    run = {"seed": seed, "steps": 2, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    names = {"names": "backdrop\nold tree 😀\ntitle", "trim": True, "width": 0, "height": 0, "first": first, "clean": "off"}
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": LAYERED, "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": LAYERED_VAE}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc left"}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0x3366CC}},
        "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["2", 0]}},
        "6": {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["3", 0], "latent": ["5", 0]}},
        "7": {"class_type": "TesseraSparseAttention", "inputs": {"model": ["1", 0], **sparse, "block": "16"}},
        "8": {"class_type": "EmptyQwenImageLayeredLatentImage", "inputs": {"width": 64, "height": 48, "layers": 3, "batch_size": 1}},
        "9": {
            "class_type": "KSampler",
            "inputs": {"model": ["7", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["8", 0], **run},
        },
        "10": {"class_type": "TesseraAttentionReport", "inputs": {"model": ["7", 0], "samples": ["9", 0]}},
        "11": {"class_type": "LatentCutToBatch", "inputs": {"samples": ["10", 0], "dim": "t", "slice_size": 1}},
        "12": {"class_type": "VAEDecode", "inputs": {"samples": ["11", 0], "vae": ["2", 0]}},
        "13": {"class_type": "SaveImage", "inputs": {"images": ["12", 0], "filename_prefix": "decoded"}},
        "14": {"class_type": "TesseraLayersFromImages", "inputs": {"image": ["12", 0], **names}},
        "15": {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["14", 0], "filename_prefix": "l/layered", "format": "psd"}},
    }
    outputs = layered.run(graph, timeout=600).outputs
    report = outputs["10"]["tessera"][0]
    assert report["family"] == "Qwen-Image" and report["calls"] == {"sparse": 2 * 2}, "two steps of two blocks"
    decoded = [np.asarray(Image.open(io.BytesIO(layered.fetch(file)))).astype(np.float64) for file in outputs["13"]["images"]]
    assert [picture.shape for picture in decoded] == [(48, 64, 4)] * 4
    assert all(np.abs(a - b).max() > 8 for a, b in itertools.combinations(decoded, 2)), "what is all alike proves nothing"

    (file,) = outputs["15"]["tessera_files"]
    psd = PSDImage.open(io.BytesIO(layered.fetch(file)))
    expected = {"backdrop": decoded[1], "old tree 😀": decoded[2], "title": decoded[3]}
    if first == "hidden":
        expected = {"Merged": decoded[0], **expected}
    assert psd.size == (64, 48) and [layer.name for layer in psd] == list(expected), "psd-tools lists the lowest first"
    assert [layer.visible for layer in psd] == [name != "Merged" for name in expected]
    for layer in psd:
        assert np.abs(picture_of(layer, psd.size) - expected[layer.name]).max() <= 1, "SaveImage rounds down"
    shown = outputs["14"]
    assert shown["text"] == [f"{len(expected)} layers, 64 x 48"]
    assert [pixels(layered, {"14": {"images": [image]}}, "14").shape for image in shown["images"]] == [(48, 64, 3)] * (1 + len(expected))


def cut_out(height: int = 40, width: int = 50) -> np.ndarray:
    """An orange disc with a soft edge as bytes, straight alpha."""
    down, right = np.mgrid[:height, :width]
    alpha = np.clip((12 - np.hypot(down - 20, right - 30)) / 3 + 0.5, 0, 1)
    return np.concatenate([np.broadcast_to([230, 130, 50], (height, width, 3)), np.rint(alpha * 255)[..., None]], -1)


def test_a_decoder_that_gives_colours_and_alpha(any_comfy: ComfyServer):
    """As Layer Diffuse Decode: a batch of RGB and alpha as a mask. The disc was composed over grey, and haze, a speck and nothing come along."""
    true = cut_out()
    alpha = true[..., 3:] / 255
    grey = np.concatenate([np.rint(alpha * true[..., :3] + (1 - alpha) * 128), true[..., 3:]], -1)
    hazy, empty = grey.copy(), grey * [1, 1, 1, 0]
    hazy[..., 3] = np.maximum(hazy[..., 3], 8)
    hazy[2:4, 5:7, 3] = 255
    graph: dict[str, dict] = {}
    sources = {"whole.png": grey, "empty.png": empty, "hazy.png": hazy}
    for number, name in enumerate(sources, 1):
        graph[f"{number}"] = {"class_type": "LoadImage", "inputs": {"image": name}}
        graph[f"1{number}"] = {"class_type": "InvertMask", "inputs": {"mask": [f"{number}", 1]}}
        graph[f"2{number}"] = {"class_type": "MaskToImage", "inputs": {"mask": [f"1{number}", 0]}}
    for name, of in (("3", ("1", "2", "3")), ("4", ("21", "22", "23"))):
        graph[f"{name}1"] = {"class_type": "ImageBatch", "inputs": {"image1": [of[0], 0], "image2": [of[1], 0]}}
        graph[f"{name}2"] = {"class_type": "ImageBatch", "inputs": {"image1": [f"{name}1", 0], "image2": [of[2], 0]}}
    graph["43"] = {"class_type": "ImageToMask", "inputs": {"image": ["42", 0], "channel": "red"}}
    edges = {"matte": "#808080", "low": 0.04, "high": 1.0, "specks": 16, "bleed": 4}
    given = {"image": ["32", 0], "mask": ["43", 0], "names": "a\nb\nc\nd", "trim": True, "width": 0, "height": 0, "mask_means": "opaque"}
    given |= {"order": "first is top", "drop_empty": True, "threshold": 0.0}
    save = {"class_type": "TesseraSaveLayers", "inputs": {"layers": ["50", 0], "filename_prefix": "l/cut", "format": "psd"}}
    cleaning = {"clean": "edges", **{f"clean.{name}": value for name, value in edges.items()}}
    graph["50"] = {"class_type": "TesseraLayersFromImages", "inputs": {**given, **cleaning}}
    graph["51"] = save
    graph["52"] = {"class_type": "TesseraLayersFromImages", "inputs": given}
    graph["53"] = {**save, "inputs": {**save["inputs"], "layers": ["52", 0]}}
    with ExitStack() as files:
        for name, picture in sources.items():
            data = io.BytesIO()
            Image.fromarray(picture.astype(np.uint8), "RGBA").save(data, "PNG")
            files.enter_context(uploaded(any_comfy, name, data.getvalue()))
        outputs = any_comfy.run(graph, timeout=300).outputs
        wrong = {**graph, "50": {**graph["50"], "inputs": {**graph["50"]["inputs"], "clean.matte": "mauvish"}}}
        with pytest.raises(PromptRefusedError, match="matte is 'mauvish'; use none, or a colour such as black"):
            any_comfy.run(wrong, targets=["51"], timeout=300)

    clean, plain = (PSDImage.open(io.BytesIO(any_comfy.fetch(outputs[node]["tessera_files"][0]))) for node in ("51", "53"))
    assert [layer.name for layer in clean] == [layer.name for layer in plain] == ["c", "a"]
    assert outputs["50"]["text"] == ["2 layers, 50 x 40\nnames has 4 lines for 3 layers; not used: d\nb: empty, left out"]
    down, right = np.nonzero(true[..., 3])
    box = (right.min(), down.min(), right.max() + 1, down.max() + 1)
    assert [layer.bbox for layer in plain] == [(0, 0, 50, 40), box] and plain[1].mask is not None, "without cleaning the mask stays one"
    low = 0.04 * 255
    for layer in clean:
        picture = picture_of(layer, clean.size)
        wanted = np.rint(np.clip((true[..., 3] - low) / (255 - low), 0, 1) * 255)
        assert np.abs(picture[..., 3] - wanted).max() <= 1 and layer.mask is None
        down, right = np.nonzero(wanted)
        assert layer.bbox == (right.min(), down.min(), right.max() + 1, down.max() + 1)
        there = picture[..., 3] > 0
        assert np.abs(picture[..., :3] - true[..., :3])[there].max() <= 2, "the disc's own colour to its last pixel"
        assert np.abs(grey[..., :3] - true[..., :3])[there].max() > 60, "which it was not"
