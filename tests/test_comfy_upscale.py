"""Upscaling in real ComfyUI, old and new: the fused windows with known operators in process, and the nodes through the server's queue."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from conftest import _installed
from PIL import Image

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError
from tessera.cli.comfy_server import ComfyServer

HERE = Path(__file__).parent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path) -> dict[str, dict]:
    install = _installed(old=request.param)
    command = [install.python, HERE / "comfy_upscale.py", install.path, package_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


def test_windows_put_together_are_the_whole(results):
    cases = [line for name, line in results.items() if name.startswith("windows")]
    assert len(cases) == 12
    for line in cases:
        assert line["error"] < 5e-6 and line["constant"] < 1e-6
        assert line["largest"] == 16, "a window of eight tokens has sixteen latent positions, never more"
        assert line["used"] and line["untouched"]
        assert [0.0, 0.0] in line["shifts"] and len(line["shifts"]) > 6
    assert not results["small"]["used"]


def test_conditions_are_cut_where_they_lie_on_the_latent(results):
    assert results["conditions"]["cut"] and results["conditions"]["whole"] and results["conditions"]["untouched"]
    assert results["conditions"]["windows"] > 4
    assert "control net" in results["control"]["error"]


def test_an_image_to_video_model_sees_the_whole_and_its_part(results):
    """Wan I2V's concatenated picture goes with the window; the tokens that CLIP vision made of the whole picture go to every window."""
    line = results["image to video"]
    assert line["cut"] and line["whole"] and line["windows"] == line["different"] == 15


def test_joint_modulation_has_less_seam_than_multidiffusion(results):
    assert results["seams"]["joint"] < 1.0 < results["seams"]["average"]


def clip_graph(**changes) -> dict[str, dict]:
    """Five frames of 64 x 64 by the default model in two steps."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "tessera_shapes_vae.safetensors"}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc right"}},
        "4": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 6, "color": 0x202020}},
        "5": {
            "class_type": "TesseraPatchUpscaleVideo",
            "inputs": {
                **{"model": ["1", 0], "vae": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "image": ["4", 0]},
                **{"size": "factor", "size.factor": 2.7, "denoise": 0.5, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"},
                **{"seed": 1, "tile": 64, "frames": 0, "coordinates": "canvas", "fusion": "joint", "colour": "wavelet", **changes},
            },
        },
        "6": {"class_type": "TesseraUpscaleReport", "inputs": {"image": ["5", 0], "tile": 64, "overlap": 0}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "up"}},
    }


OTHER = {"frames": 5, "coordinates": "window", "fusion": "average", "colour": "lab"}


@pytest.mark.parametrize("changes", [{"denoise": 0.1}, OTHER], ids=["joint", "average"])
def test_a_clip_through_the_queue(any_comfy: ComfyServer, changes):
    """Odd size, six frames (no 4 n + 1): as many come out, of the size asked for. What is on them is random weights' doing."""
    outputs = any_comfy.run(clip_graph(**changes), timeout=600).outputs
    pictures = [Image.open(io.BytesIO(any_comfy.fetch(file))) for file in outputs["7"]["images"]]
    assert [picture.size for picture in pictures] == [(173, 130)] * 6
    report = outputs["6"]["tessera"][0]
    assert (report["width"], report["height"], report["frames"]) == (173, 130, 6) and report["flicker"] >= 0


def test_bad_sizes_are_refused(any_comfy: ComfyServer):
    with pytest.raises(PromptRefusedError, match=r"TesseraPatchUpscaleVideo \(node 5\).*factor"):
        any_comfy.run(clip_graph(**{"size.factor": 0.0}))
    graph = clip_graph()
    graph["6"]["inputs"]["reference"] = ["4", 0]
    with pytest.raises(PromptFailedError, match="give the same size"):
        any_comfy.run(graph, timeout=600)


@pytest.mark.parametrize("case", ["stop", "memory"])
def test_an_interrupted_video_goes_on(results, case):
    """Stopped at the first patch of the sixth frame: five frames are kept, shown, and not computed again, except by a run with other settings."""
    line = results[f"interrupted {case}"]
    assert line["found"] == {"stop": "InterruptProcessingException", "memory": "OutOfMemoryError"}[case]
    before, after = line["files"]
    assert len(before) == 1 and before[0].startswith(f"{case}.") and before[0].endswith(".part.mp4")
    assert after == [f"{case}_00001_.mp4", f"{case}_00002_.mp4"] and line["frames"] == 12
    assert line["calls"] == [11, 24, 14]
    assert (line["opened"], line["decoded"]) == (1, 12), "the source, by a run from its first frame on"


def test_progress_is_shown_as_text_and_picture(results):
    """What is shown in between depends on the time, but the first patch and the last frame always are."""
    line = results["interrupted stop"]
    said = line["said"]
    assert said[0].startswith("frame 1 of 12, patch 1 of 2, ") and said[0].endswith(" left")
    assert any(words.startswith("The 5 finished frames are in ") and words.endswith("Queue the same again to go on from there") for words in said)
    assert "frame 12 of 12, 0 s left" in said and any(words.startswith("frame 6 of 12, patch 1 of 2") for words in said)
    assert said[-1].startswith("96 x 48 to 192 x 96: 12 frames, 1 x 2x network, 2 patches a frame, h264")
    assert [1, 24, [192, 96]] in line["previews"] and line["previews"][-1] == [24, 24, [192, 96]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_interrupted_pictures_go_on(results, channels):
    """Six patches in all, computed once each; every value is the one of its nearest pixel, alpha too, finer than 16 bit."""
    line = results[f"pictures {channels}"]
    assert line["calls"] == [3, 6] and line["shape"] == [3, 96, 192, channels] and line["error"] < 1e-6
    assert line["said"][0].startswith("picture 1 of 3, patch 1 of 2, ") and line["said"][-1].endswith("2 patches")


def test_progress_of_a_clip_of_unknown_length(results):
    (words,) = results["unknown length"]["said"]
    assert words.startswith("frame 1, ") and words.endswith(" s each")
