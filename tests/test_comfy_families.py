"""Every supported family in real ComfyUI, old and new: bitwise where it must be, sparse where it should be, and removable."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import _installed

from family_cases import CASES

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path) -> dict[str, dict]:
    install = _installed(old=request.param)
    script = Path(__file__).parent / "comfy_families.py"
    done = subprocess.run([install.python, script, install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


@pytest.fixture(params=CASES)
def result(request, results) -> dict:
    return results[request.param]


def test_dense_is_bitwise_stock(result):
    assert result["stock_finite"]
    assert result["density_1_bitwise"]
    assert result["bypass_bitwise"], "the user's model changed after the patched clones ran"
    assert result["model_untouched"]


@pytest.mark.parametrize("method", ["rainfusion2", "draft", "sparge"])
def test_every_call_in_the_window_is_sparse(result, method):
    run = result[method]
    assert run["finite"]
    assert run["report"]["family"] == CASES[result["case"]].family
    assert run["report"]["sparse_share_in_window"] == 1.0
    assert run["report"]["calls"]["sparse"] == run["report"]["calls_in_window"]
    assert set(run["report"]["reasons"]) <= {"cross-attention", "another length than the video's"}
    # Half of random-weight attention dropped: different from stock, and far from unrelated (two unrelated outputs differ by about 1.4).
    assert 1e-4 < run["error"] < 0.3
    # Half of what is open to choice; text, references and the first frame come on top and are much of these short sequences.
    assert 0.5 < run["report"]["density"] < 0.8


@pytest.mark.parametrize("method", ["rainfusion2", "draft", "sparge"])
def test_the_calls_of_the_report_are_those_that_another_hook_counts(result, method):
    """A hook of the test's own sees every call of a stock run, and in a patched run those that the host still computes."""
    total, left = result["hooked"]["stock"], result["hooked"][method]
    report = result[method]["report"]
    assert report["self_attention_calls"] == total > 0
    assert report["calls"]["sparse"] == total - left
    assert report["calls"].get("host", 0) == left


def test_masks_are_not_shared_between_context_windows(result):
    """In the one step of this run there is nothing to reuse."""
    assert result.get("windows_share_nothing", True)
    assert ("windows_share_nothing" in result) == (result["case"] == "wan t2v")


def test_all_blocks_through_our_kernel_equal_stock(result):
    """The permutation, text placement and kernel are right: with every block kept only rounding differs."""
    assert result["all_blocks_error"] < 1e-5


def test_patch_replaces_an_earlier_one(result):
    assert result["applied_twice"]["density"] == result["rainfusion2"]["report"]["density"]
    assert result["applied_twice"]["calls"] == result["draft"]["report"]["self_attention_calls"]


def test_few_steps_are_noticed(result):
    assert any("one dense step" in note for note in result["accelerate"]["notes"])


def test_accelerate_asks_for_the_error_of_its_mode(result):
    report = result["accelerate"]
    assert (report["method"], report["asked_error"]) == ("tessera", 0.12)
    assert report["asked_density"] == 0.5, "the density of runs that are too short to look, as gentle with few steps"


def test_a_run_looks_once_in_its_first_step_and_keeps_the_error(result):
    report = result["looked"]["report"]
    assert result["looked"]["finite"]
    steps = 4
    assert report["searches"] * steps == report["calls_in_window"] > 0
    assert report["calls"]["sparse"] == report["searches"] * (steps - 1)
    assert report["asked_error"] == 0.3
    assert 0.1 < report["error"] < 0.4


def test_the_tail_of_another_method_takes_error_away(result):
    assert 1e-4 < result["tail_error"] < 0.9 * result["rainfusion2"]["error"]


def test_non_finite_output_is_repeated_dense(result):
    assert result["nan_recovers"]
    assert result["nan_report"]["repeated"] >= 1
    assert any("non-finite" in note for note in result["nan_report"]["notes"])


def test_other_overrides_are_chained_in_either_order(result):
    assert all(count > 0 for count in result["other_override_seen"])
    assert len(set(result["other_override_seen"])) == 1


def test_interrupt_leaves_nothing_behind(result):
    assert result["interrupt"] == {"layouts_released": True, "reported": True}


def test_a_model_of_no_known_family_falls_back_and_says_why(results):
    """A UNet: methods that need the grid leave it as it is, with the reason; sparge runs."""
    result = results["unknown family"]
    assert result["bypass_bitwise"]
    assert result["rainfusion2"]["bitwise"]
    assert any(reason.startswith("unknown model family") for reason in result["rainfusion2"]["report"]["reasons"])
    assert not result["sparge"]["bitwise"]
    assert result["sparge"]["error"] < 1.0
    assert result["sparge"]["report"]["sparse_share_in_window"] == 1.0
