"""Every diffusion network of the newest ComfyUI that can be built small: whatever shapes it passes, nothing raises and nothing goes wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import _installed

SPARSE = (
    "sd 3.5 medium",
    "flux",
    "aura flow",
    "wan",
    "wan i2v",
    "wan vace",
    "wan camera",
    "wan animate",
    "wan animate 2",
    "wan causal",
    "wan dancer",
    "hunyuan video",
    "chroma",
    "chroma radiance",
    "qwen image",
    "ltxv",
    "lumina 2",
    "z-image",
    "omnigen 2",
    "boogu",
    "hidream",
    "cosmos predict 2",
    "anima",
    "kandinsky 5",
    "mage flow",
    "krea 2",
    "lens",
    "joy image",
    "ideogram 4",
    "cogvideo x",
    "pixeldit",
    "hunyuan 3d 2",
)
ANOTHER_LENGTH = ("wan humo", "wan s2v", "wan scail", "wan scail 2")  # a reference or a pose lies beside the video's tokens
OUT_OF_REACH = ("hunyuan dit", "hunyuan 3d 2.1", "ernie image")  # their calls carry no options

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(package_path) -> dict[str, dict]:
    install = _installed(old=False)
    script = Path(__file__).parent / "comfy_every_model.py"
    done = subprocess.run([install.python, script, install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["network"]: line for line in lines}


def test_all_of_them_were_run(results):
    assert sorted(results) == sorted((*SPARSE, *ANOTHER_LENGTH, *OUT_OF_REACH))


@pytest.mark.parametrize("name", [*SPARSE, *ANOTHER_LENGTH, *OUT_OF_REACH])
def test_nothing_raises_and_our_kernel_computes_what_the_host_does(results, name):
    """With an exact kernel in the place of INT8, as on a GPU that has it, every self-attention call of ours gives the host's result."""
    result = results[name]
    assert "failure" not in result, result["failure"]
    assert result["finite"]
    assert result["quantized"]["error"] < 1e-5
    assert result["sparse"]["error"] < 1.0


@pytest.mark.parametrize("name", SPARSE)
def test_calls_that_are_understood_are_ours(results, name):
    result = results[name]
    assert result["quantized"]["calls"]["dense quantized"] > 0
    assert result["sparse"]["calls"]["sparse"] > 0
    assert result["sparse"]["error"] > 0


@pytest.mark.parametrize("name", ANOTHER_LENGTH)
def test_calls_of_another_length_are_the_hosts_and_counted(results, name):
    for run in (results[name]["quantized"], results[name]["sparse"]):
        assert run["error"] == 0.0
        assert set(run["calls"]) == {"host"}
        assert run["reasons"]["another length than the video's"] == run["calls"]["host"]


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_networks_that_pass_no_options_are_left_alone(results, name):
    assert results[name]["sparse"] == {"error": 0.0, "calls": {}, "reasons": {}}
