"""Layer Offload in real ComfyUI, old and new: on a pretended GPU (see `pretend_gpu`) in process, and through the server's queue."""

from __future__ import annotations

import io
import itertools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import _installed
from PIL import Image

from tessera.cli.comfy_client import PromptFailedError, PromptRefusedError
from tessera.cli.comfy_server import ComfyServer

HERE = Path(__file__).parent
GB = 1024**3

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the tiny model in six blocks."""
    from tiny_models import write_models

    return write_models(tmp_path_factory.mktemp("deep"), layers=6, heads=2)


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def results(request, package_path, deep_model) -> dict[str, dict]:
    install = _installed(old=request.param)
    command = [install.python, HERE / "comfy_offload.py", install.path, package_path, deep_model]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


@pytest.fixture(params=["limits, video", "limits, image"])
def limits(request, results) -> dict[str, Any]:
    return results[request.param]


def test_every_limit_gives_the_stock_result(limits):
    assert all(row["bitwise"] for row in limits["rows"])
    assert limits["bypass_bitwise"]
    assert limits["bypass_loads_all"], "without the node, all weights are on the device again"
    assert limits["untouched"]


def test_weights_stay_within_the_limit_and_use_it(limits):
    """Down from everything to the smallest limit and up again: what is on the device fits, and what is left is less than one module."""
    for row in limits["rows"]:
        assert row["loaded"] == row["reported"]
        assert row["loaded"] + row["buffer"] <= row["budget"]
        assert row["most while loading"] <= row["budget"], "the manager itself stops there; nothing is taken back afterwards"
        # When the limit grows, ComfyUI leaves weights on the device that it plans to stream, and does not count them: less than a module.
        assert row["on device"] + row["buffer"] <= row["budget"] + limits["module"]
        assert row["within"]
        if row["loaded"] < limits["weights"]:
            assert row["budget"] - row["loaded"] - row["buffer"] < limits["module"]
        else:
            assert "nothing streamed" in row["line"]
    loaded = [row["loaded"] for row in limits["rows"]]
    assert loaded[0] == limits["weights"], "the largest limit holds every weight"
    assert min(loaded) < limits["weights"] * 0.6
    assert loaded == loaded[::-1], "the same limit places the same weights, wherever it came from"


def test_hooks_are_there_only_while_sampling(limits):
    assert {row["hooks"] for row in limits["rows"]} == {0}


def test_the_report_adds_up(limits):
    report = limits["report"]
    assert report["backend"] == "legacy"
    assert report["activations_from"] == "estimated"
    assert report["limit_bytes"] - report["activation_bytes"] - report["reserve_bytes"] == report["weights_budget_bytes"]
    assert report["resident_bytes"] + report["streamed_bytes"] == report["weights_bytes"] == limits["weights"]
    assert report["copied_bytes_per_step"] == report["streamed_bytes"] * report["model_calls_per_step"]
    assert sum(report["block_bytes"]) + report["outside_blocks_bytes"] == report["weights_bytes"]
    assert report["steps"] == 3
    assert len(report["seconds_per_block"]) == report["blocks"] >= 5
    assert all(seconds > 0 for seconds in report["seconds_per_block"])
    assert report["peak_bytes"] is report["hidden_share"] is report["copied_bytes_per_second"] is None, "not measured without a CUDA device"
    timeline = report["timeline"]
    starts = [start for _, start, _ in timeline["compute"]]
    assert [block for block, _, _ in timeline["compute"]] == list(range(report["blocks"]))
    assert starts == sorted(starts)
    assert 0 <= starts[0] < timeline["compute"][-1][2] <= timeline["seconds"]


def test_the_report_is_drawn(limits):
    (batch, height, width, channels), low, high = limits["picture"]
    assert (batch, channels) == (1, 3)
    assert min(height, width) > 200
    assert 0 <= low < high <= 1


def test_superpipeline_keeps_a_window(results):
    runs = [results["policies"][f"k {k}"] for k in (2, 3)]
    for run, k in zip(runs, (2, 3), strict=True):
        report = run["report"]
        assert run["bitwise"]
        assert report["weights_budget_bytes"] == report["outside_blocks_bytes"] + k * max(report["block_bytes"])
        assert run["loaded"] <= report["weights_budget_bytes"]
        assert report["notes"] == ["k_prime has no effect: without DynamicVRAM, ComfyUI looks ahead by layers, by itself"]
    assert runs[0]["loaded"] < runs[1]["loaded"]


@pytest.mark.parametrize("case", ["two streams", "no stream"])
def test_the_predicted_copies_are_those_that_core_makes(results, case):
    """As many, and as many bytes, as ComfyUI's own cast function was called for; on the measured time line, one at a time."""
    run = results["copies"][case]
    report = run["report"]
    predicted, timeline, steps = report["predicted"], report["timeline"], report["steps"]
    copies = predicted["copies"]
    assert run["bitwise"] and not run["hooks"]
    assert len(copies) * steps == run["calls"] > 20
    assert predicted["copied_bytes"] * steps == run["bytes"]
    assert predicted["copied_bytes"] == pytest.approx(report["copied_bytes_per_step"], rel=0.02), "but for weights that no layer reads"
    assert predicted["bytes_per_second"] == report["link_bytes_per_second"] == 2e9
    assert all(start <= waited <= end <= timeline["seconds"] for _, start, waited, end in copies)
    assert all(before[3] <= after[1] for before, after in itertools.pairwise(copies))
    assert sum(end - waited for _, _, waited, end in copies) == pytest.approx(predicted["wait_seconds"])
    assert sum(end - start for _, start, _, end in copies) == pytest.approx(predicted["copy_seconds"])
    assert predicted["hidden_share"] == pytest.approx(1 - predicted["wait_seconds"] / predicted["copy_seconds"])
    for block, _, waited, end in copies:
        if block is not None and waited < end:
            spans = [(begin, done) for index, begin, done in timeline["compute"] if index == block]
            assert any(begin <= waited and end <= done + 1e-6 for begin, done in spans), "a block waits for its copies within its own time"
    assert f"predicted: {predicted['hidden_share']:.0%} of the copies hidden" in run["line"]
    assert predicted["streams"] == {"two streams": 2, "no stream": 0}[case]
    assert predicted["hidden_share"] == 0 if case == "no stream" else predicted["hidden_share"] > 0


@pytest.mark.parametrize(
    ("case", "missing"),
    [("no link", "not predicted: the rate of the link was not measured"), ("nothing streamed", "none: every weight stays where it is")],
)
def test_without_a_link_or_a_copy_none_is_predicted(results, case, missing):
    run = results["copies"][case]
    assert run["bitwise"]
    assert (run["report"]["predicted"], run["report"]["predicted_missing"]) == (None, missing)
    assert run["picture"][0] == 1


def test_a_link_that_cannot_be_measured_does_not_spoil_the_run(results):
    run = results["copies"]["no room to measure"]
    assert run["bitwise"]
    assert run["report"]["predicted_missing"] == "not predicted: the rate of the link was not measured"


def test_leave_free_leaves_free(results):
    run = results["policies"]["leave free"]
    assert run["bitwise"]
    assert 16 * GB - run["report"]["limit_bytes"] == pytest.approx(float(run["report"]["asked"].split()[2]) * GB, rel=1e-3)
    assert run["loaded"] <= run["report"]["weights_budget_bytes"]


def test_a_share_that_core_keeps_for_weights_is_taken_back(results):
    run = results["policies"]["share kept by core"]
    assert run["bitwise"]
    assert 0 < run["loaded"] <= run["report"]["weights_budget_bytes"]


def test_a_limit_replaces_an_earlier_one(results):
    run = results["policies"]["applied twice"]
    assert run["bitwise"]
    assert run["wrappers"] == 5
    assert run["report"]["resident_bytes"] == run["report"]["weights_bytes"]


def test_other_programs_are_told_and_survived(results):
    run = results["policies"]["other programs"]
    assert run["bitwise"]
    assert run["report"]["notes"][0].startswith("other programs leave ")


def test_lora_is_as_near_as_with_stock_partial_loading(results):
    lora = results["lora"]
    assert lora["patches"] > 20
    assert lora["lora_matters"] > 0.1
    assert any(row["error"] > 0 for row in lora["rows"]), "a partial load rounds patched weights differently, ours like stock's"
    for row in lora["rows"]:
        assert row["error"] <= row["stock_error"]
        assert row["loaded"] == row["stock_loaded"] <= row["budget"]


@pytest.mark.parametrize("order", ["attention first", "limit first"])
def test_attention_patch_in_either_order(results, order):
    run = results["together"][order]
    assert run["bitwise"]
    assert run["sparse"] > 0
    assert run["loaded"] <= run["budget"]


def test_control_net_counts(results):
    run = results["together"]["control net"]
    assert run["bitwise"]
    assert run["report"]["other_weights_bytes"] > 0
    assert run["held"] <= run["room"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_packs_wrapper(results, order):
    assert results["together"][f"other wrapper {order}"] == {"bitwise": True, "within": True}
    assert all({"positive", "negative"} <= set(names) for names in results["together"]["other wrappers saw"])


def test_two_models_each_keep_their_own_limit(results):
    rows = results["together"]["two models"]["rows"]
    assert all(row["bitwise"] for row in rows)
    assert all(row["own"] <= row["held"] <= row["room"] for row in rows), "each limit holds what the other model left on the device"
    assert rows[0]["own"] == rows[2]["own"] < rows[1]["own"] == rows[3]["own"]


@pytest.mark.parametrize("case", ["interrupt", "out of memory"])
def test_a_run_that_ends_early(results, case):
    run = results["failures"][case]
    assert run["raised"]
    assert run["hooks"] == run["handles"] == 0
    assert run["steps"] == 2, "what ran until then is reported"
    assert run["next_bitwise"]
    assert run["next_within"]


def test_out_of_memory_while_loading(results):
    assert results["failures"]["out of memory while loading"] == {"raised": True, "reported": False, "hooks": 0, "next_bitwise": True}


def test_two_hundred_runs_leave_nothing_behind(results):
    """Other limits, interrupts and running out of memory at random points: tensors, wrappers, models and attributes as after sixty."""
    soak = results["soak"]
    assert soak["wrong"] == 0
    assert soak["raised"] == soak["expected"] > 50
    assert soak["settled"] == soak["end"]


ERRORS = {
    "nan": "gb is nan; use a number of gigabytes above 0, such as 8",
    "infinite": "gb is inf; use a number of gigabytes above 0, such as 8",
    "zero": "gb is 0; use a number of gigabytes above 0, such as 8",
    "negative": "gb is -2; use a number of gigabytes above 0, such as 8",
    "more than the device": "gb is 17, and cpu:0 has 16.0 GB; use at most 16.0",
    "leave all": "gb is 16, and cpu:0 has 16.0 GB; use less than 16.0",
    "unknown limit": "limit is 'half'; use one of use at most, leave free",
    "unknown policy": "policy is 'magic'; use one of auto, resident, superpipeline",
    "k 1": "k is 1; use at least 2 blocks, or 0 to let the limit decide",
    "k_prime": "k_prime is 3; use 0 to k, which is 2",
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_settings(results, case):
    assert results["errors"][case] == ERRORS[case]


def test_a_limit_that_cannot_work_says_which_would(results):
    errors = results["errors"]
    assert "this sampling needs" in errors["too small"]
    assert "two blocks" in errors["too small"]
    assert errors["suggestion works"]
    assert not errors["too small, reported"]
    assert errors["model calls"] == 0, "refused before any work"
    assert "leave at most " in errors["leave too much"]
    assert errors["window too large"].endswith("the limit has room for 2; use k 2 or 0")
    assert errors["hooks"] == 0


def test_on_a_cpu_the_limit_has_no_effect_and_says_so(results):
    run = results["cpu"]
    assert run["bitwise"]
    assert run["line"].startswith("use at most 0.1 GB had no effect: this model runs on the CPU, where everything lives in RAM")
    assert run["report"]["backend"] == "none"
    assert run["report"]["streamed_bytes"] == run["hooks"] == 0
    assert run["report"]["predicted_missing"] == "none: this model runs on the CPU, and there is no link to copy over"


def test_dynamic_sets_the_watermark_after_every_load(results):
    """Against a stand-in for DynamicVRAM: loading resets the watermark, so ceiling and floor follow it, and the floor is taken back."""
    dynamic = results["dynamic"]
    for name in ("smallest", "all"):
        run = dynamic[name]
        report = run["report"]
        ceiling = report["weights_budget_bytes"] - 5000  # small weights lie outside the range
        assert run["bitwise"]
        assert report["backend"] == "dynamic"
        assert run["events"] == [["prioritize"], ["set_watermark", ceiling], ["set_watermark_limit", ceiling], ["set_watermark_limit", 0]]
        assert report["resident_bytes"] <= report["weights_budget_bytes"]
        assert report["within_limit"]
        assert run["others_hold"] + report["resident_bytes"] <= report["limit_bytes"] - report["activation_bytes"] - report["reserve_bytes"]
        assert run["other"][0][0] == "free_memory", "the other model's pages are given back as far as the limit demands"
    assert dynamic["bypass"] == {"bitwise": True, "events": [["prioritize"]], "loaded": dynamic["fully"]}


def test_dynamic_copies_are_of_the_modules_without_a_page(results):
    """Layers without a signature are streamed at every use; the others are on the device. With a look-ahead, nothing is predicted."""
    run = results["dynamic"]["copies"]
    predicted = run["report"]["predicted"]
    assert run["bitwise"]
    assert len(predicted["copies"]) == len(run["streamed"])
    assert predicted["copied_bytes"] == sum(run["streamed"])
    assert {block for block, *_ in predicted["copies"]} == {3, 4, 5}
    assert results["dynamic"]["look ahead"]["report"]["predicted_missing"] == "not predicted: blocks are fetched ahead in groups"


def test_dynamic_interrupt(results):
    run = results["dynamic"]["interrupt"]
    assert run["raised"]
    assert run["hooks"] == 0
    assert run["events"][-1] == ["set_watermark_limit", 0]


def test_dynamic_look_ahead_walks_the_queue(results):
    """Six blocks in groups of two, at each of two model calls; nothing but the end is left in core's queues."""
    run = results["dynamic"]["look ahead"]
    report = run["report"]
    assert run["bitwise"]
    assert run["fetched"] == [2] * 6
    assert run["left"] == [1, 1]
    group = 2 * max(report["block_bytes"])
    assert run["events"][1] == ["set_watermark", max(report["weights_budget_bytes"] - group - 5000, 0)]
    without = results["dynamic"]["no look ahead"]
    assert without["bitwise"]
    assert without["report"]["notes"] == ["k_prime has no effect: this ComfyUI cannot look ahead"]


def test_an_aimdo_without_ceiling_is_named(results):
    run = results["dynamic"]["old aimdo"]
    assert run["bitwise"]
    assert run["report"]["no_effect"] == "this version of comfy-aimdo takes no limit"


def graph(gb: float, **changes: Any) -> dict[str, Any]:
    """Loader, Layer Offload, a short sampling, Offload Report, latent to disk."""
    settings = {"limit": "use at most", "gb": gb, "policy": "auto", **changes}
    sampler = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tessera_shapes_t2v.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "TesseraLayerOffload", "inputs": {"model": ["1", 0], **settings}},
        "3": {"class_type": "TesseraShapesPrompt", "inputs": {"text": "red disc"}},
        "4": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 64, "length": 9, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {"model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], **sampler},
        },
        "6": {"class_type": "TesseraOffloadReport", "inputs": {"model": ["2", 0], "samples": ["5", 0]}},
        "7": {"class_type": "SaveLatent", "inputs": {"samples": ["6", 0], "filename_prefix": "offload"}},
    }


def bypassed(workflow: dict[str, Any]) -> dict[str, Any]:
    """The graph with Layer Offload bypassed: its consumers get the model that went into it."""
    nodes = {key: {**node, "inputs": dict(node["inputs"])} for key, node in workflow.items() if key != "2"}
    for node in nodes.values():
        for name, value in node["inputs"].items():
            if value == ["2", 0]:
                node["inputs"][name] = ["1", 0]
    return nodes


def latent(server: ComfyServer, result: Any) -> bytes:
    """The saved latent's numbers, without the workflow that its file also holds."""
    data = server.fetch(result.outputs["7"]["latents"][0])
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_through_the_queue_on_a_cpu(any_comfy: ComfyServer):
    result = any_comfy.run(graph(8.0), timeout=300)
    report = result.outputs["6"]["tessera"][0]
    assert report["backend"] == "none"
    assert result.outputs["6"]["text"][0].startswith("use at most 8 GB had no effect: this model runs on the CPU, where everything lives in RAM")
    picture = Image.open(io.BytesIO(any_comfy.fetch(result.outputs["6"]["images"][0])))
    assert min(picture.size) > 200
    stock = any_comfy.run(bypassed(graph(8.0)), timeout=300)
    assert stock.outputs["6"]["text"] == ["No memory limit on this model: ComfyUI placed its weights by itself."]
    assert latent(any_comfy, stock) == latent(any_comfy, result)


BAD_INPUTS = {
    "nan": ({"gb": math.nan}, "gb is nan; use a number from 0.1 to 1024"),
    "infinite": ({"gb": math.inf}, "gb is inf; use a number from 0.1 to 1024"),
    "zero": ({"gb": 0}, "gb is 0.0; use a number from 0.1 to 1024"),
    "negative": ({"gb": -1}, "gb is -1.0; use a number from 0.1 to 1024"),
    "k": ({"gb": 8, "policy": "superpipeline", "k": 1}, "k is 1; use at least 2 blocks, or 0 to let the limit decide"),
    "limit": ({"gb": 8, "limit": "half"}, "limit is 'half'; use 'use at most' or 'leave free'"),
    "policy": ({"gb": 8, "policy": "magic"}, "policy is 'magic'; use auto, resident or superpipeline"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_are_refused_before_the_run(any_comfy: ComfyServer, case):
    inputs, message = BAD_INPUTS[case]
    with pytest.raises(PromptRefusedError) as error:
        any_comfy.queue(graph(**inputs))
    assert message in str(error.value)


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def server_with_gpu(request):
    """A server whose memory manager believes in a GPU of 16 GB."""
    with ComfyServer(_installed(old=request.param), custom_nodes=[HERE / "pretend_gpu"]) as server:
        yield server


def test_through_the_queue_on_a_gpu(server_with_gpu: ComfyServer):
    """Refused with the smallest limit that works; run with all weights on the device, with as few as work, and without the node: one result."""
    with pytest.raises(PromptFailedError, match=r"KSampler \(node 5\): Layer Offload: gb is 0.2, and .*use at least 0.4"):
        server_with_gpu.run(graph(0.2), timeout=300)
    with pytest.raises(PromptFailedError, match=r"TesseraLayerOffload \(node 2\): gb is 17, and .* has 16.0 GB; use at most 16.0"):
        server_with_gpu.run(graph(17.0), timeout=300)

    everything = server_with_gpu.run(graph(8.0), timeout=300)
    smallest = everything.outputs["6"]["tessera"][0]["smallest_limit_bytes"] / GB + 1e-5
    results = [everything, *(server_with_gpu.run(workflow, timeout=300) for workflow in (graph(smallest), bypassed(graph(8.0))))]
    reports = [result.outputs["6"]["tessera"][0] for result in results[:2]]
    for report in reports:
        assert report["backend"] == "legacy"
        assert report["within_limit"]
    assert reports[0]["streamed_bytes"] == 0
    assert reports[1]["resident_bytes"] < 0.7 * reports[1]["weights_bytes"]
    assert "MB streamed a step" in results[1].outputs["6"]["text"][0]
    assert len({latent(server_with_gpu, result) for result in results}) == 1
    assert [report["predicted_missing"] for report in reports] == [
        "none: every weight stays where it is",
        "not predicted: the rate of the link was not measured",
    ]

    linked = graph(smallest)
    linked["8"] = {"class_type": "PretendLink", "inputs": {"model": ["1", 0], "rate": 1e9}}
    linked["2"]["inputs"]["model"] = ["8", 0]
    drawn = server_with_gpu.run(linked, timeout=300)
    predicted = drawn.outputs["6"]["tessera"][0]["predicted"]
    assert predicted["streams"] == 2
    assert len(predicted["copies"]) > 10
    assert predicted["copied_bytes"] == pytest.approx(reports[1]["copied_bytes_per_step"], rel=0.02)
    assert f"predicted: {predicted['hidden_share']:.0%} of the copies hidden" in drawn.outputs["6"]["text"][0]
    rows = [
        Image.open(io.BytesIO(server_with_gpu.fetch(result.outputs["6"]["images"][0]))).convert("RGB").crop((90, 97, 746, 121))
        for result in (drawn, results[1])
    ]
    blue = [sum(count for count, (red, _, colour) in row.getcolors(1 << 16) if colour > red + 80) for row in rows]
    assert blue[0] > 0 == blue[1], "copies in the colours of their blocks, or words"


def test_the_library_streams_comfyuis_quantized_formats(package_path):
    """FP8, NVFP4 and INT8 tensors, values and scales: bitwise, and their own bytes are copied, not those of a float."""
    install = _installed(old=False)
    done = subprocess.run([install.python, HERE / "comfy_quantized.py", install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(rows) == 3
    for row in rows:
        assert row["equal"] and row["after"], row["case"]
        assert 0 < row["copied"] < 4.5 * row["nbytes"]
