"""The patch adapter on ComfyUI's own model, old and new: equal to the library's forward; and through the server's queue."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from conftest import _installed
from PIL import Image

from tessera.cli.comfy_client import PromptRefusedError
from tessera.cli.comfy_server import ComfyServer
from tiny_models import PATCH_ADAPTER

HERE = Path(__file__).parent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path, tmp_path_factory) -> dict[str, dict]:
    install = _installed(old=request.param)
    command = [install.python, HERE / "comfy_patch_adapter.py", install.path, package_path, tmp_path_factory.mktemp("adapters")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", ["parity plain", "parity attention patch"])
def test_the_stock_model_with_hooks_is_the_library_s_network(results, case):
    """Branches, LoRA and the shared query, by two implementations: ComfyUI's Wan with hooks and the plain one of the default weights."""
    line = results[case]
    assert line["error"] < 1e-5
    assert line["windows"] == line["views"] == 3
    assert line["functions"] == 1, "a function of its own for every window would fill the caches of others"
    assert line["two"] > 1e-3, "two texts, two predictions"


def test_the_node_start_to_end(results):
    line = results["sampling"]
    assert line["shape"] == [5, 144, 192, 3] and line["repeatable"] and line["different"] > 0.01
    assert line["untouched"] and line["options"] == []


def test_what_does_not_fit_is_refused(results):
    assert "adapter small.safetensors is for a model of (2, 96, 16) blocks" in results["other base"]["error"]
    assert "plain.safetensors is not a patch adapter" in results["no adapter"]["error"]
    assert "cut.safetensors: not a safetensors file, or damaged" in results["cut off"]["error"]
    assert "many.safetensors: layers is 100000000 in its metadata, and its tensors are of 2" in results["many layers"]["error"]


def graph(adapter: str) -> dict[str, dict]:
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "tessera_shapes_vae.safetensors"}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": ""}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 24, "batch_size": 6, "color": 0x202020}},
        "5": {"class_type": "TesseraLoadPatchAdapter", "inputs": {"adapter_name": adapter}},
        "6": {
            "class_type": "TesseraPatchUpscaleVideo",
            "inputs": {
                **{"model": ["1", 0], "vae": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "image": ["4", 0], "adapter": ["5", 0]},
                **{"size": "factor", "size.factor": 5.5, "denoise": 1.0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
                **{"seed": 1, "tile": 512, "frames": 0, "coordinates": "window", "fusion": "joint", "colour": "none", "augmentation": 0.1},
            },
        },
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "adapted"}},
    }


def test_through_the_queue(any_comfy: ComfyServer):
    outputs = any_comfy.run(graph(PATCH_ADAPTER), timeout=600).outputs
    pictures = [Image.open(io.BytesIO(any_comfy.fetch(file))) for file in outputs["7"]["images"]]
    assert [picture.size for picture in pictures] == [(176, 132)] * 6


def test_an_unknown_file_is_refused(any_comfy: ComfyServer):
    with pytest.raises(PromptRefusedError, match="adapter_name"):
        any_comfy.run(graph("../secret.safetensors"))
