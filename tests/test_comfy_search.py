"""The default method together with what else users connect, in real ComfyUI, on the built-in model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import _installed

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
LAYERS, STEPS, DENSE = 6, 10, 4  # of the model, of a run, and those before 30 % of the schedule


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def result(request, package_path) -> dict:
    install = _installed(old=request.param)
    script = Path(__file__).parent / "comfy_search.py"
    done = subprocess.run([install.python, script, install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def test_a_run_looks_in_its_last_dense_step(result):
    report = result["plain"]["report"]
    assert report["searches"] == LAYERS and report["calls"] == {"host": LAYERS * DENSE, "sparse": LAYERS * (STEPS - DENSE)}
    assert 0.04 < report["error"] < 0.12 and not report["notes"]
    assert 0.0 < result["plain"]["error"] < 0.5
    assert result["bypassed"], "the user's model is as it was"


@pytest.mark.parametrize("cache", ["easycache", "lazycache"])
def test_skipped_steps(result, cache):
    report = result[cache]["report"]
    assert report["self_attention_calls"] < LAYERS * STEPS, "nothing was skipped"
    assert report["searches"] >= LAYERS and report["calls"]["sparse"] > 0 and report["error"] < 0.16
    assert result[cache]["finite"]
    assert cache == "easycache" or result[cache]["error"] < 0.7, "EasyCache itself skips other steps where outputs differ a little"


def test_context_windows_have_their_own_masks(result):
    report, alone = result["windows"]["report"], result["plain"]["report"]
    windows = report["self_attention_calls"] // alone["self_attention_calls"]
    assert windows > 1 and result["windows"]["finite"]
    assert report["searches"] == windows * alone["searches"] and report["calls"]["sparse"] == windows * alone["calls"]["sparse"]


def test_two_models_share_a_schedule(result):
    """The first has too few sparse steps to look, and says so; the second begins where it ended, and looks in its first step."""
    assert result["two_experts"]["same"] and result["two_experts"]["finite"]
    high, low, *again = result["two_experts"]["reports"]
    assert high["searches"] == 0 and high["notes"] == {"too few sparse steps to look exactly: blocks are chosen by their means": LAYERS}
    assert low["searches"] == LAYERS and low["calls"] == {"host": LAYERS, "sparse": 4 * LAYERS}
    assert again == [high, low]


def test_a_run_does_not_depend_on_those_before_it(result):
    """Others between them had another prompt, length and sampler, and one was interrupted."""
    assert result["interleaved"] == {"same": True, "interrupted": True, "heun_finite": True}


def test_batches_and_few_steps(result):
    assert result["batch"]["finite"]
    assert result["batch"]["report"]["mask_bytes"]["device"] == 2 * result["plain"]["report"]["mask_bytes"]["device"]
    assert result["few_steps"]["searches"] == LAYERS and result["few_steps"]["calls"] == {"host": LAYERS, "sparse": 3 * LAYERS}


def test_under_torch_compile(result):
    assert result["compiled"]["captured"] > 100 and result["compiled"]["error"] < 1e-4
    assert result["compiled"]["report"]["searches"] == LAYERS
