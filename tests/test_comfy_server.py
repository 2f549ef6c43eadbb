"""The server runner, against a real ComfyUI of the newest and the oldest supported version."""

from __future__ import annotations

import threading
import time

import pytest

from tessera.cli import comfy_server
from tessera.cli.comfy_client import PromptFailedError, PromptInterruptedError, PromptRefusedError, ServerStartError
from tessera.cli.comfy_server import ComfyServer, find_comfy
from tessera.cli.pictures import decode_png

PICTURES = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 2, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blue"}},
}

comfy_only = pytest.mark.comfy


def sampling(steps: int) -> dict:
    """A long job for the small random model."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc"}},
        "3": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1}},
        "4": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 0],
                "latent_image": ["3", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": "x"}},
    }


@comfy_only
def test_runs_and_fetches(any_comfy: ComfyServer):
    result = any_comfy.run(PICTURES)
    files = result.outputs["2"]["images"]
    assert len(files) == 2
    picture = decode_png(any_comfy.fetch(files[0]))
    assert picture.shape == (48, 64, 3)
    assert (picture == (0, 0, 255)).all()
    assert result.seconds < 60


@comfy_only
def test_what_is_not_done_again_is_reported_again(any_comfy: ComfyServer):
    first = any_comfy.run(PICTURES)
    assert any_comfy.run(PICTURES).outputs == first.outputs


@comfy_only
def test_targets_run_a_part(any_comfy: ComfyServer):
    graph = {**PICTURES, "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "other"}}}
    assert set(any_comfy.run(graph, targets=["3"]).outputs) == {"3"}


@comfy_only
def test_refusal_names_node_input_and_value(any_comfy: ComfyServer):
    bad = {**PICTURES, "1": {"class_type": "EmptyImage", "inputs": {**PICTURES["1"]["inputs"], "width": -1}}}
    with pytest.raises(PromptRefusedError, match=r"EmptyImage \(node 1\).*-1.*width") as error:
        any_comfy.run(bad)
    assert error.value.status == 400
    assert error.value.body["node_errors"]["1"]["errors"][0]["extra_info"]["received_value"] == -1
    with pytest.raises(PromptRefusedError, match="NoSuchNode"):
        any_comfy.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


@comfy_only
def test_a_failing_node_is_reported(any_comfy: ComfyServer):
    """A start after the end, where a link brings it, is found when the node runs, before any sampling."""
    settings = {"method": "sparge", "method.similarity": 0.0, "density": 0.3, "precision": "native", "dense_blocks": "", "min_tokens": 0}
    settings |= {"start_percent": ["6", 0], "end_percent": 0.2}
    graph = {
        "6": {"class_type": "PrimitiveFloat", "inputs": {"value": 0.8}},
        "2": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "3": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1}},
        "4": {"class_type": "TesseraSparseAttention", "inputs": {"model": ["2", 0], **settings}},
        "5": {"class_type": "TesseraAttentionReport", "inputs": {"model": ["4", 0], "samples": ["3", 0]}},
    }
    with pytest.raises(PromptFailedError, match=r"TesseraSparseAttention \(node 4\): .*start_percent is 0.8") as error:
        any_comfy.run(graph)
    assert "traceback" in error.value.body


@comfy_only
def test_interrupt_and_go_on(any_comfy: ComfyServer):
    prompt = any_comfy.queue(sampling(steps=5000))
    stopped = threading.Event()

    def stop() -> None:
        while not any_comfy.is_running(prompt):
            time.sleep(0.05)
        time.sleep(1)
        any_comfy.interrupt()
        stopped.set()

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(PromptInterruptedError):
        any_comfy.wait(prompt, timeout=120)
    assert stopped.wait(10)
    assert any_comfy.run(PICTURES).outputs


@comfy_only
def test_the_pack_is_loaded_and_tells_its_version(any_comfy: ComfyServer):
    nodes = any_comfy.get("/object_info")
    assert {"TesseraAccelerate", "TesseraSparseAttention", "TesseraLayerOffload", "TesseraShapesPrompt"} <= set(nodes)
    assert any_comfy.version.startswith("0.")
    assert "IMPORT FAILED" not in any_comfy.log


@comfy_only
def test_the_users_folders_stay_untouched(any_comfy: ComfyServer):
    before = {path for folder in ("output", "user", "temp", "input") for path in (any_comfy.comfy.path / folder).rglob("*")}
    any_comfy.run(PICTURES)
    after = {path for folder in ("output", "user", "temp", "input") for path in (any_comfy.comfy.path / folder).rglob("*")}
    assert after == before


def fake_comfy(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("raise SystemExit('broken on purpose')")
    return folder


def test_find_by_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(fake_comfy(tmp_path / "A")))
    monkeypatch.setenv("COMFYUI_PYTHON", "/usr/bin/python3")
    found = find_comfy()
    assert found is not None
    assert found.path == tmp_path / "A"
    assert str(found.python) == "/usr/bin/python3"


def test_a_wrong_variable_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"not a ComfyUI folder"):
        find_comfy()


def test_find_above_custom_nodes(tmp_path, monkeypatch, root):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    comfy = fake_comfy(tmp_path / "B")
    (comfy / "custom_nodes").mkdir()
    (comfy / "custom_nodes" / "any-name").symlink_to(root, target_is_directory=True)
    monkeypatch.setattr(comfy_server, "__file__", str(comfy / "custom_nodes" / "any-name" / "cli" / "comfy_server.py"))
    found = find_comfy()
    assert found is not None
    assert found.path == comfy


def test_find_default_place_and_environments(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_comfy() is None
    comfy = fake_comfy(tmp_path / "comfy" / "ComfyUI")
    for environment in (tmp_path / "comfy" / ".venv", tmp_path / "comfy" / "venv", comfy / "venv", comfy / ".venv"):
        (environment / "bin").mkdir(parents=True)
        (environment / "bin" / "python").touch()
        found = find_comfy()
        assert found is not None
        assert found.python == environment / "bin" / "python"


def test_a_python_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PYTHON", str(tmp_path / "python"))
    found = find_comfy(fake_comfy(tmp_path / "C"))
    assert found is not None
    with pytest.raises(ServerStartError, match=r"python cannot be run \(No such file or directory\); set COMFYUI_PYTHON"), ComfyServer(found):
        pass


def test_a_server_that_dies_says_why(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", str(fake_comfy(tmp_path / "C")))
    found = find_comfy()
    assert found is not None
    server = ComfyServer(found)
    with pytest.raises(ServerStartError, match="broken on purpose"), server:
        pass
    assert server._base is not None and not server._base.exists()
