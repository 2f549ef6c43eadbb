"""The shared workflows, their help pages, and the built-in text-to-video workflow on real ComfyUI servers."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tessera.cli.comfy_client import PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tiny_models import PATCH_ADAPTER

Workflow = dict[str, Any]

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
HELP = FOLDER.parent / "web" / "docs"
OWN_NODES = {
    "TesseraAccelerate",
    "TesseraAddVideoLayer",
    "TesseraComposeLayeredVideo",
    "TesseraLoadTransparentVideo",
    "TesseraSaveTransparentVideo",
    "TesseraSparseAttention",
    "TesseraAttentionReport",
    "TesseraAutoLayout",
    "TesseraComposeLayers",
    "TesseraConceptRegion",
    "TesseraDecodeRegionLayers",
    "TesseraDecodeRegionVideo",
    "TesseraEditLayer",
    "TesseraEncodeRegionLayers",
    "TesseraLayerOffload",
    "TesseraLayersFromImages",
    "TesseraLayersPrompt",
    "TesseraLayout",
    "TesseraLoRAComposer",
    "TesseraLoadLayers",
    "TesseraLoadPatchAdapter",
    "TesseraRegionLayers",
    "TesseraSaveLayers",
    "TesseraOffloadReport",
    "TesseraPatchUpscale",
    "TesseraPatchUpscaleVideo",
    "TesseraPatchUpscaleVideoFile",
    "TesseraPatchUpscaleVideoNetwork",
    "TesseraShapesPrompt",
    "TesseraUpscaleReport",
}
PATCHES = {"TesseraAccelerate", "TesseraSparseAttention"}
ONLY_IN_THE_GRAPH = {"MarkdownNote"}
# Widgets that ComfyUI 0.33 has and 0.18.1 has not. The API files leave them at their defaults, so that both versions run them.
NEWER_WIDGETS = {"CreateVideo": {"bit_depth"}, "SaveVideo": {"format.codec"}}
SEEDS = {"seed", "noise_seed"}

UPSCALE_FILE = "tessera_upscale_video_file"  # no diffusion model, and a video that is the user's own
OWN_CLIP = "tessera_transparent_video"  # the same with a clip that has alpha
LAYERED = ("tessera_text_to_layers", "tessera_text_to_layered_video")  # hundreds of tokens: attention is left as it is
OWN_PICTURE = "tessera_qwen_image_layered"  # starts from a picture that is the user's own
OWN_LORAS = "tessera_lora_composer"  # composes LoRAs that are the user's own; its pictures are small, and attention is left as it is

each_workflow = pytest.mark.parametrize("name", NAMES)


def read_api(name: str) -> Workflow:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text())


def read_ui(name: str) -> Workflow:
    return json.loads((FOLDER / f"{name}.json").read_text())


def links_of(workflow: Workflow) -> set[tuple[str, int, str, str]]:
    """(source node, slot, node, input) of every connection in an API-format workflow."""
    return {
        (value[0], value[1], node, name) for node, entry in workflow.items() for name, value in entry["inputs"].items() if isinstance(value, list)
    }


def test_the_template_folder_holds_workflows_and_thumbnails_only():
    """ComfyUI offers every JSON file in this folder to the user, and looks for a picture of the same name."""
    assert "tessera_text_to_video" in NAMES
    expected = {f"{name}.{ending}" for name in NAMES for ending in ("json", "jpg")} | {"api"}
    assert {file.name for file in FOLDER.iterdir()} == expected
    assert {file.name for file in (FOLDER / "api").iterdir()} == {f"{name}.json" for name in NAMES}


@each_workflow
def test_thumbnails_are_small_pictures(name):
    file = FOLDER / f"{name}.jpg"
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) <= 640
    assert file.stat().st_size < 60_000


@each_workflow
def test_the_graph_is_the_same_in_both_formats(name):
    """Same nodes, titles, connections and values. Values are compared by name, as ComfyUI's front end wrote them."""
    api, ui = read_api(name), read_ui(name)
    nodes = {str(node["id"]): node for node in ui["nodes"]}
    drawn = {key: node["type"] for key, node in nodes.items() if node["type"] not in ONLY_IN_THE_GRAPH}
    assert drawn == {key: entry["class_type"] for key, entry in api.items()}
    for key, entry in api.items():
        node = nodes[key]
        assert node["mode"] == 0
        assert node.get("title", entry["_meta"]["title"]) == entry["_meta"]["title"]
        values = {field: value for field, value in entry["inputs"].items() if not isinstance(value, list)}
        drawn_values = dict(node.get("widgets_values_named") or {})
        extra = set(drawn_values) - set(values) - {"control_after_generate"}
        assert extra <= NEWER_WIDGETS.get(entry["class_type"], set())
        assert {field: drawn_values[field] for field in values} == values


@each_workflow
def test_links_are_valid(name):
    """Every link joins two existing slots, both of which name it, and the API file says the same."""
    ui = read_ui(name)
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert len({link[0] for link in ui["links"]}) == len(ui["links"])
    joined = set()
    for link, source, source_slot, target, target_slot, kind in ui["links"]:
        output, socket = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert link in output["links"]
        assert socket["link"] == link
        assert output["type"] == socket["type"] == kind
        joined.add((str(source), source_slot, str(target), socket["name"]))
    assert joined == links_of(read_api(name))
    named = {socket["link"] for node in nodes.values() for socket in node.get("inputs", []) if socket.get("link") is not None}
    assert named == {link[0] for link in ui["links"]}
    assert ui["last_node_id"] >= max(nodes)
    assert ui["last_link_id"] >= max(link[0] for link in ui["links"])


@each_workflow
def test_seeds_are_fixed(name):
    for node in read_ui(name)["nodes"]:
        widgets = node.get("widgets_values_named") or {}
        if SEEDS & set(widgets):
            assert widgets["control_after_generate"] == "fixed"
            assert "fixed" in node["widgets_values"]


@each_workflow
def test_nodes_do_not_overlap(name):
    """Every node's rectangle, with its title bar, is clear of the others, so that the graph can be read as it opens."""
    title_bar = 30
    boxes = [(*node["pos"], *node["size"]) for node in read_ui(name)["nodes"]]
    for i, (x1, y1, w1, h1) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            assert x1 >= x2 + w2 or x2 >= x1 + w1 or y1 - title_bar >= y2 + h2 or y2 - title_bar >= y1 + h1


@each_workflow
def test_the_note_names_every_file_that_has_to_be_there(name):
    notes = [node["widgets_values"][0] for node in read_ui(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    files = {
        value for entry in read_api(name).values() for value in entry["inputs"].values() if isinstance(value, str) and value.endswith(".safetensors")
    }
    for file in files:
        assert file.startswith("tessera_") or file in notes[0]  # ours come with the pack


@each_workflow
def test_files_that_have_to_be_there_can_be_downloaded_from_the_menu(name):
    """Each loader lists its files with folder and address: ComfyUI then offers the missing ones for download."""
    for node in read_ui(name)["nodes"]:
        wanted = {value for value in node.get("widgets_values") or () if isinstance(value, str) and value.endswith(".safetensors")}
        wanted = {value for value in wanted if not value.startswith(("tessera_", "your_"))}
        offered = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(offered) == wanted
        for file, model in offered.items():
            assert model["directory"] in ("checkpoints", "diffusion_models", "text_encoders", "vae")
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{file}")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (UPSCALE_FILE, OWN_CLIP, OWN_LORAS, *LAYERED)])
def test_every_sampler_runs_patched_and_reported(name):
    """Each sampler's model comes straight from one of our patches, and a report of that model follows the sampler."""
    api = read_api(name)
    samplers = [key for key, entry in api.items() if entry["class_type"].startswith("KSampler")]
    assert samplers
    for sampler in samplers:
        model = api[sampler]["inputs"]["model"]
        assert api[model[0]]["class_type"] in PATCHES
        reports = [e["inputs"] for e in api.values() if e["class_type"] == "TesseraAttentionReport" and e["inputs"]["samples"] == [sampler, 0]]
        assert [report["model"] for report in reports] == [model]


def test_every_node_has_a_help_page():
    assert {file.stem for file in HELP.glob("*.md")} == OWN_NODES
    for file in HELP.glob("*.md"):
        assert "## Limits" in file.read_text()


def pictures_of(page: Path) -> list[str]:
    return re.findall(r"!\[[^]]+\]\(([^)]+)\)", page.read_text())


def test_pictures_of_help_pages_are_beside_them_and_small():
    shown = {picture for page in HELP.glob("*.md") for picture in pictures_of(page)}
    assert shown == {file.name for file in HELP.iterdir() if file.suffix != ".md"}
    assert all((HELP / picture).stat().st_size < 200_000 for picture in shown)


@pytest.mark.comfy
@each_workflow
def test_nothing_but_model_files_is_missing(any_comfy: ComfyServer, name):
    """Every node and every input exists on this version; the only complaints are about model files that are not there."""
    api, known = read_api(name), any_comfy.get("/object_info")
    for entry in api.values():
        inputs = known[entry["class_type"]]["input"]
        assert set(inputs.get("required", {})) <= set(entry["inputs"])
        given = {name.split(".")[0] for name in entry["inputs"]}  # what follows a point belongs to the choice before it
        assert given <= set(inputs.get("required", {})) | set(inputs.get("optional", {}))
    if name.startswith("tessera_text_to_"):
        return  # its files come with the pack: the tests below run it
    with pytest.raises(PromptRefusedError) as error:
        any_comfy.queue(api)
    complaints = [complaint for report in error.value.body["node_errors"].values() for complaint in report["errors"]]
    if name in (UPSCALE_FILE, OWN_CLIP):
        (file, advice) = ("your_video.mp4", "") if name == UPSCALE_FILE else ("your_clip.webm", "upload it, or ")
        assert {complaint["details"].split(" - ")[-1] for complaint in complaints} == {
            f"file is '{file}', which is not in ComfyUI's input folder; {advice}copy it there"
        }
        return
    if name == OWN_PICTURE:
        (own,) = [complaint for complaint in complaints if complaint["type"] == "custom_validation_failed"]
        assert own["details"] == "image - Invalid image file: your_picture.png"
        complaints.remove(own)
    assert {complaint["type"] for complaint in complaints} == {"value_not_in_list"}
    files = {"ckpt_name", "lora_name"} if name == OWN_LORAS else {"unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}
    assert {complaint["extra_info"]["input_name"] for complaint in complaints} <= files


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_video_runs(any_comfy: ComfyServer):
    """The main workflow, with random weights and fewer steps: a video that plays, and a report that says it was sparse."""
    import av

    workflow = read_api("tessera_text_to_video")
    workflow["8"]["inputs"]["steps"] = 6
    workflow["3"]["inputs"]["method.error"] = 0.3  # random queries and keys: to leave anything out costs a lot
    outputs = any_comfy.run(workflow, timeout=600).outputs

    with av.open(io.BytesIO(any_comfy.fetch(outputs["12"]["images"][0]))) as video:
        stream = video.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert float(stream.average_rate) == pytest.approx(16)
    assert len(frames) == 33
    assert {frame.shape for frame in frames} == {(128, 128, 3)}

    report = outputs["9"]["tessera"][0]
    assert report["family"] == "Wan"
    assert report["calls_in_window"] > 0
    assert report["sparse_share_in_window"] >= 0.95
    assert report["searches"] > 0 and report["asked_error"] == 0.3
    assert 0.0 < report["error"] < 0.6 and report["work"] > report["density"]
    assert ", asked 30%" in outputs["9"]["text"][0]
    assert "self-attention calls sparse" in outputs["9"]["text"][0]
    heat_map = Image.open(io.BytesIO(any_comfy.fetch(outputs["9"]["images"][0])))
    assert min(heat_map.size) > 40


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_video_upscaled_runs(any_comfy: ComfyServer):
    """The clip twice as large through the small CATANet that comes with the pack, loaded by the stock loader."""
    graph = read_api("tessera_text_to_video_upscaled")
    graph["8"]["inputs"]["steps"] = 2
    graph["7"]["inputs"]["length"] = 5
    outputs = any_comfy.run(graph, timeout=600).outputs
    assert [frame.shape for frame in decoded(any_comfy, outputs["12"])] == [(256, 256, 3)] * 5
    assert "128 x 128 to 256 x 256: 1 x 2x network" in outputs["15"]["text"][0]
    report = outputs["16"]["tessera"][0]
    assert (report["width"], report["height"], report["frames"]) == (256, 256, 5)


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_video_super_resolution_runs(any_comfy: ComfyServer):
    """A small clip in windows with a patch adapter, the one that belongs to the random weights."""
    graph = read_api("tessera_text_to_video_super_resolution")
    graph["8"]["inputs"]["steps"] = 2
    graph["7"]["inputs"]["length"] = 5
    graph["15"]["inputs"]["adapter_name"] = PATCH_ADAPTER
    outputs = any_comfy.run(graph, timeout=600).outputs
    assert [frame.shape for frame in decoded(any_comfy, outputs["12"])] == [(256, 256, 3)] * 5
    report = outputs["17"]["tessera"][0]
    assert (report["width"], report["height"], report["frames"]) == (256, 256, 5)


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_layers_runs(any_comfy: ComfyServer):
    """A background and a layer for each box of the layout, over one another and in a PSD; and the merged picture."""
    from psd_tools import PSDImage

    graph = read_api("tessera_text_to_layers")
    graph["8"]["inputs"]["steps"] = 2
    outputs = any_comfy.run(graph, timeout=600).outputs
    assert outputs["10"]["text"] == ["4 layers, 128 x 128"]
    psd = PSDImage.open(io.BytesIO(any_comfy.fetch(outputs["11"]["tessera_files"][0])))
    assert psd.size == (128, 128)
    places = {"Background": (0, 0, 128, 128), "left": (16, 16, 64, 64), "right": (64, 32, 112, 80), "below": (32, 64, 80, 112)}
    assert [(layer.name, layer.bbox) for layer in psd] == list(places.items())
    assert Image.open(io.BytesIO(any_comfy.fetch(outputs["12"]["images"][0]))).size == (128, 128)


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_layered_video_runs(any_comfy: ComfyServer):
    """All layers in a WebM, one alone in ProRes 4444, and the merged clip."""
    import av

    graph = read_api("tessera_text_to_layered_video")
    graph["8"]["inputs"]["steps"] = 2
    outputs = any_comfy.run(graph, timeout=600).outputs
    for node, codec in (("12", "vp9"), ("13", "prores")):
        with av.open(io.BytesIO(any_comfy.fetch(outputs[node]["tessera_files"][0]))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == (codec, 128, 128)
            assert stream.metadata.get("alpha_mode") == "1" or stream.pix_fmt.startswith("yuva")
            assert len(list(container.decode(video=0))) == 9
    assert len(outputs["14"]["images"]) == 9


@pytest.mark.comfy
@pytest.mark.slow
def test_upscale_video_file_runs(any_comfy: ComfyServer):
    """With a small size in place of 4K, and a video of the user's."""
    import av
    import numpy as np

    clip = io.BytesIO()
    with av.open(clip, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 32, 24, "yuv420p"
        for number in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((24, 32, 3), 60 * number, np.uint8))))
        container.mux(video.encode(None))
    graph = read_api(UPSCALE_FILE)
    graph["2"]["inputs"] |= {"size": "factor", "size.factor": 2.5}
    del graph["2"]["inputs"]["size.name"]
    with uploaded(any_comfy, "your_video.mp4", clip.getvalue()):
        outputs = any_comfy.run(graph, timeout=600).outputs
    frames = decoded(any_comfy, outputs["2"])
    assert [frame.shape for frame in frames] == [(60, 80, 3)] * 3
    assert [abs(float(frame.mean()) - 60 * number) < 4 for number, frame in enumerate(frames)] == [True] * 3
    assert "32 x 24 to 80 x 60: 3 frames, 2 x 2x network" in outputs["2"]["text"][0]


@pytest.mark.comfy
@pytest.mark.slow
def test_transparent_video_runs(any_comfy: ComfyServer, tmp_path):
    """A clip of the user's, half transparent on its left, over the background, with its sound and rate."""
    import torch

    from tessera.models.layers.video_reader import load
    from tessera.models.layers.video_writer import save
    from tessera.models.media.sound import Sound

    red, background = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0x1E, 0x5A, 0x78]) / 255
    alpha = torch.where(torch.arange(64) < 32, 0.5, 0.0).expand(48, 64)[..., None]
    sound = Sound(torch.zeros(1, 48000), 48000)
    save(tmp_path / "clip.webm", [torch.cat([red.expand(48, 64, 3), alpha], -1)] * 5, 25, "VP9 WebM", sound=sound)
    with uploaded(any_comfy, "your_clip.webm", (tmp_path / "clip.webm").read_bytes()):
        outputs = any_comfy.run(read_api(OWN_CLIP), timeout=600).outputs
    (tmp_path / "result.webm").write_bytes(any_comfy.fetch(outputs["7"]["tessera_files"][0]))
    result = load(tmp_path / "result.webm")
    frames = torch.stack(list(result))
    assert (frames.shape, result.rate) == ((5, 48, 64, 4), 25) and result.sound() is not None
    assert bool((frames[..., 3] == 1).all())
    for columns, expected in ((slice(4, 28), (red + background) / 2), (slice(36, 60), background)):
        assert (frames[:, :, columns, :3] - expected).abs().max() < 0.03


def decoded(server: ComfyServer, output: dict[str, Any]) -> list[Any]:
    """The frames of the one video that a node saved or shows, `(height, width, 3)` uint8."""
    import av

    (video,) = output["images"]
    with av.open(io.BytesIO(server.fetch(video))) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@contextmanager
def uploaded(server: ComfyServer, name: str, data: bytes) -> Iterator[None]:
    """A file in the input folder, as the browser's upload button puts it there; gone afterwards, because tests share a server."""
    head = f'--edge\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: video/mp4\r\n\r\n'
    body = head.encode() + data + b"\r\n--edge--\r\n"
    request = urllib.request.Request(f"{server.url}/upload/image", body, {"Content-Type": "multipart/form-data; boundary=edge"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        assert json.load(answer)["name"] == name
    assert server._base is not None
    try:
        yield
    finally:
        (server._base / "input" / name).unlink()


@pytest.mark.comfy
@pytest.mark.slow
def test_text_to_video_within_a_memory_limit_runs(any_comfy: ComfyServer):
    """The same clip with Layer Offload in front of Sparse Attention: both reports, and the same video, bit for bit."""
    workflow, plain = read_api("tessera_text_to_video_offload"), read_api("tessera_text_to_video")
    videos = []
    for graph in (workflow, plain):
        graph["8"]["inputs"]["steps"] = 2
        graph["16"] = {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "frames"}}
        outputs = any_comfy.run(graph, timeout=600).outputs
        videos.append([any_comfy.fetch(file) for file in outputs["16"]["images"][::8]])
        if graph is workflow:
            report, line = outputs["15"]["tessera"][0], outputs["15"]["text"][0]
            assert outputs["9"]["tessera"][0]["calls"]["sparse"] > 0
    assert pixels(videos[0]) == pixels(videos[1])
    assert report["blocks"] >= 2
    assert report["steps"] == 2
    assert all(seconds > 0 for seconds in report["seconds_per_block"])
    assert "had no effect: this model runs on the CPU" in line or "resident" in line


def pixels(pictures: list[bytes]) -> list[bytes]:
    """The pixels of PNG files, without the workflow that they also hold."""
    return [Image.open(io.BytesIO(picture)).tobytes() for picture in pictures]


@pytest.mark.comfy
@pytest.mark.slow
def test_accelerate_runs(any_comfy: ComfyServer):
    """The other patch node, in place of Sparse Attention: two steps are few, so one is dense and the other keeps half."""
    workflow = read_api("tessera_text_to_video")
    model = workflow["3"]["inputs"]["model"]
    workflow["3"] = {"class_type": "TesseraAccelerate", "inputs": {"model": model, "mode": "fast", "min_tokens": 0}}
    workflow["8"]["inputs"]["steps"] = 2
    report = any_comfy.run(workflow, targets=["9"], timeout=600).outputs["9"]["tessera"][0]
    assert report["sparse_share_in_window"] == 1.0
    assert report["asked_error"] == 0.12 and report["error"] is None, "one sparse step is too few to look"
    assert report["density"] == pytest.approx(0.5, abs=0.01), "half of what is open, which is all"
    assert any("one dense step" in note for note in report["notes"])


@pytest.mark.comfy
@pytest.mark.slow
def test_a_bypassed_patch_node_leaves_the_workflow_running(any_comfy: ComfyServer):
    """What bypassing does in the graph: its consumers get the model that went into it. The report says that nothing was patched."""
    workflow = read_api("tessera_text_to_video")
    model = workflow.pop("3")["inputs"]["model"]
    for node in workflow.values():
        node["inputs"] = {name: model if value == ["3", 0] else value for name, value in node["inputs"].items()}
    workflow["8"]["inputs"]["steps"] = 1
    output = any_comfy.run(workflow, targets=["9"], timeout=600).outputs["9"]
    assert output["text"] == ["No attention patch on this model: it ran as ComfyUI runs it."]
    assert output["tessera"][0]["self_attention_calls"] == 0


BAD_INPUTS = {
    "unknown method": ("3", "method", "magic", "method is not known; use tessera, sparge"),
    "error above 1": ("3", "method.error", 1.5, "method.error is 1.5; use a number from 0 to 1"),
    "error of a method without": ("3", "method", "draft", "method.error is 0.08, but draft cannot predict one; use tessera, or 0 and a density"),
    "looked at never": ("3", "method.search_every", -1, "method.search_every is -1; use a whole number from 0 to 100"),
    "density 0": ("3", "density", 0, "density is 0.0; use a number from 0.01 to 1"),
    "density above 1": ("3", "density", 1.5, "density is 1.5; use a number from 0.01 to 1"),
    "dense_blocks not a number": ("3", "dense_blocks", "x", "dense_blocks is 'x'; use block numbers and ranges such as 0,1 or 0-3"),
    "dense_blocks backwards": ("3", "dense_blocks", "3-1", "dense_blocks is '3-1'; use block numbers and ranges such as 0,1 or 0-3"),
    "dense_blocks without end": ("3", "dense_blocks", "0-99999999999", "dense_blocks is '0-99999999999'; use block numbers"),
    "min_tokens below 0": ("3", "min_tokens", -1, "min_tokens is -1; use a whole number from 0 to 16777216"),
    "unknown precision": ("3", "precision", "int2", "precision is 'int2'; use auto, native"),
    "unknown word": ("5", "text", "purple disc", "'purple' is not in the vocabulary of these weights. It has colour: red, green"),
    "two colours": ("5", "text", "red blue disc", "'red' and 'blue'. Use one."),
}


@pytest.mark.comfy
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused_before_the_run(any_comfy: ComfyServer, case):
    """The answer names the input, the value where ComfyUI passes it on, and what to use instead."""
    node, field, value, message = BAD_INPUTS[case]
    workflow = read_api("tessera_text_to_video")
    workflow[node]["inputs"][field] = value
    with pytest.raises(PromptRefusedError) as error:
        any_comfy.queue(workflow)
    assert message in str(error.value)


@pytest.mark.comfy
def test_linked_texts_are_checked_when_their_value_is_known(any_comfy: ComfyServer):
    """A text widget may be fed by another node; its value is not there yet when ComfyUI validates the workflow."""
    workflow = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": "green square"}},
        "2": {"class_type": "TesseraShapesPrompt", "inputs": {"text": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    assert any_comfy.run(workflow).outputs["3"]["text"]


@pytest.mark.comfy
def test_templates_and_help_are_served(any_comfy: ComfyServer):
    """Under the name of whatever folder the pack lies in."""
    packs = {pack: files for pack, files in any_comfy.get("/workflow_templates").items() if files}
    (pack,) = packs
    assert sorted(packs[pack]) == NAMES
    for name in NAMES:
        assert any_comfy.get(f"/api/workflow_templates/{pack}/{name}.json") == read_ui(name)
        assert download(f"{any_comfy.url}/api/workflow_templates/{pack}/{name}.jpg") == (FOLDER / f"{name}.jpg").read_bytes()
    for node in OWN_NODES:
        assert any_comfy.get(f"/extensions/{pack}/docs/{node}.md") == (HELP / f"{node}.md").read_text()
        for picture in pictures_of(HELP / f"{node}.md"):
            assert download(f"{any_comfy.url}/extensions/{pack}/docs/{picture}") == (HELP / picture).read_bytes()


def download(url: str) -> bytes:
    """The bytes at an address on this machine, whatever proxy the environment names."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as answer:
        return answer.read()
