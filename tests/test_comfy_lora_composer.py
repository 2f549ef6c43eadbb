"""LoRA Composer on real ComfyUI, old and new: tiny SD1.5 through stock loaders, tiny transformers, and the queue."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import _installed
from PIL import Image

from tessera.cli.comfy_client import PromptFailedError
from tessera.cli.comfy_server import ComfyServer

HERE = Path(__file__).parent

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A models folder, which the first run of the script fills."""
    return tmp_path_factory.mktemp("sd15")


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def installed(request):
    return _installed(old=request.param)


@pytest.fixture(scope="module")
def results(installed, package_path, models) -> dict[str, dict]:
    command = [installed.python, HERE / "comfy_lora_composer.py", installed.path, package_path, models]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["case"]: line for line in lines}


def test_each_cross_attention_call_is_the_base_outside_and_the_concept_s_lora_inside(results):
    """Six calls with negative and positive in one batch, three concepts, three boxes."""
    line = results["cross"]
    assert line["outside_equal"], "bitwise"
    assert line["error"] < 1e-5, "against the stock loader's merged weights in float64"
    assert line["changed"] > 0.05
    assert sorted(map(tuple, line["calls"])) == [(12, 8, 8, 4)] * 3 + [(18, 40, 40, 30)] * 3


def test_between_concepts_the_mask_leaves_exactly_nothing(results):
    line = results["isolation"]
    assert line["masked"] == 6 and line["zero"] and line["sums"] < 1e-5
    assert all(line["off"]), "without isolation ComfyUI's own unmasked attention runs"


@pytest.mark.parametrize("case", ["whole", "whole on a style", "sdxl", "flux", "wan", "qwen"])
def test_one_concept_on_the_whole_picture_is_the_stock_lora_loader_s_model(results, case):
    assert results[case]["error"] < 1e-5
    assert results[case]["moved"] > 0.01, "a LoRA that does nothing would pass"


@pytest.mark.parametrize("case", ["flux", "wan", "qwen"])
def test_transformers_keep_a_concept_s_prompt_in_its_box(results, case):
    """The halves touch, and neither has background to pass on what changes in the other."""
    line = results[case]
    assert line["second_half"] == 0 and line["first_half"] > 1e-3
    unavailable, other = line["refused"]
    assert "enhancement is for SD1.5 and SDXL; set enhancement to 0" in unavailable
    assert "concept 1's model is another one than model" in other


@pytest.mark.parametrize(("case", "layers", "tokens"), [("flux", 2, 32), ("wan", 2, 2 * 32), ("qwen", 2, 32)])
def test_transformers_start_where_their_concepts_show(results, case, layers, tokens):
    """A map for each layer, over all frames, of two words; and another picture for it."""
    line = results[case]
    assert line["maps"] == [[[1, tokens, 2]] * layers] * 2
    assert all(line["sampled"]) and line["started"] > 1e-3


@pytest.mark.parametrize(("encoder", "space"), [("clip", ""), ("sdxl", ""), ("t5", "\u2581"), ("qwen", "\u0120")])
def test_the_rows_of_words(results, encoder, space):
    """In the tokenizers' own spelling: nothing of start, template, end and padding."""
    line, end = results["words"][encoder], "</w>" if encoder in ("clip", "sdxl") else ""
    assert line["red cat"] == [f"{space}red{end}", f"{space}cat{end}"] * 2
    assert line["dog"] == [f"{space}dog{end}"]
    everything = "".join(line[""]).replace(end or " ", " ").replace(space or " ", " ")
    assert everything.split() == "a red cat , and a black dog beside the red cat".replace(" ,", " ," if end else ",").split()


def test_other_forms_of_lora(results):
    """A third of a fused layer, and one that ComfyUI's own arithmetic must turn into a matrix, were among those of the test above."""
    assert results["flux"]["parts"] == 1
    assert results["wan"]["kinds"] == ["LoHaAdapter", "LoRAAdapter"]


def test_sampling(results):
    line = results["sampling"]
    assert line["finite"] and line["repeatable"] and line["shape"] == [1, 4, 8, 16]
    assert line["apart"] > 0.01, "regions, start, step and all of them: four different pictures"
    assert line["untouched"] and line["hooks"] == 0 and line["options"] == []


@pytest.mark.parametrize(("case", "steps"), [("gradient", 2), ("control", 1)])
def test_the_latent_follows_the_gradient_of_the_loss(results, case, steps):
    """ComfyUI's latent is sqrt(1 + sigma^2) times the paper's: the slope along the step is measured by differences of the loss.

    Also with a ControlNet, whose output ComfyUI adds in place.
    """
    line = results[case]
    assert len(line["slopes"]) == steps
    for (start, recorded), (slope, expected, length) in zip(line["losses"], line["slopes"], strict=True):
        assert start == pytest.approx(recorded, rel=1e-5)
        assert slope < 0 and slope == pytest.approx(expected, rel=0.03)
        assert length > 0


def test_a_later_stage_goes_on_with_its_latent(results):
    line = results["stages"]
    assert all(line["finite"].values())
    assert line["same"], "without noise there is nothing to re-initialise"
    assert line["lines"]["second"].endswith("not re-initialised: there is no noise")
    assert "re-initialised" not in line["lines"]["second alone"]


def test_several_conditionings_and_those_that_begin_later(results):
    """Two prompts at once are one gradient step; a step at which no prompt is in force is left out, and the line says so."""
    line = results["stages"]
    assert line["moved"] > 0.01 and "; 1 gradient steps, loss " in line["lines"]["several"]
    late = line["lines"]["late"]
    assert "the prompt is not in force at the first step; 1 gradient steps, loss " in late and "; 1 gradient steps left out" in late


def test_the_concepts_belong_to_the_prompt_whatever_the_guider_calls_first(results):
    line = results["guiders"]
    assert line["dual"] == [["middle", True], ["negative", False], ["positive", True]]
    assert line["perpneg"] == [["middle", False], ["negative", False], ["positive", True]], "the middle one is the empty prompt"
    assert line["alone"] == [["negative", False], ["positive", True]]


def test_self_attention_that_another_node_replaces_is_counted(results):
    assert results["guiders"]["line"].endswith("by a dense mask 10; 2 calls replaced by another node and not isolated")


def test_isolation_by_blocks_is_that_by_a_mask(results):
    """Two halves of 1024 tokens, and no background: half of the block pairs. The coarser level keeps the mask."""
    line = results["blocks"]
    assert line["error"] < 1e-5
    assert line["line"].endswith("by blocks 3 (50% of the block pairs computed), by a dense mask 3")
    assert line["dense"].endswith("by blocks 0, by a dense mask 6")
    assert "another node computes 5 of 6 self-attention calls" in line["refused"], "Sparse Attention behind the node, dense in block 0"


def test_sdxl_with_everything(results):
    line = results["sdxl"]
    assert line["maps"] == [2, 4] and all(line["sampled"]) and line["started"] > 1e-3
    assert "; 1 gradient steps, loss " in line["line"]


def test_flux_with_a_mask_over_text_and_picture_and_with_loras_of_few_layers(results):
    line = results["flux only"]
    assert line["redux"] < 1e-5 and line["masked"] > 1e-3
    text, modulation = line["layers"]
    assert text is True
    assert "the LoRAs change no layer that works on tokens" in modulation


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("overlap", "the boxes of concept 1"),
        ("empty", "concept 1 has an empty box"),
        ("outside", "leaves the canvas of 128 x 64"),
        ("other base", "concept 1's LoRA belongs to another base"),
        ("no lora", "concept 1's LoRA adds nothing to the model"),
        ("words", "words is 'horse', which the prompt does not hold"),
        ("prompt width", "concept 1's prompt was encoded in 768 channels, the model's prompt in 32"),
        ("tiny box", "holds no whole token (16 x 8 in all)"),
        ("no cell", "concept 1's box (x 8..16, y 8..16) holds no whole cell of the attention maps (8 x 4 in all); enlarge it"),
        ("other shape", "the sampler's latent is 8 x 16, and the boxes lie in a picture of 128 x 64"),
        ("strip", "Region Layers makes the latent a strip of layers"),
        ("tome", "another node computes 3 of 6 self-attention calls; remove it (ToMe, HyperTile)"),
        ("behind", "model has LoRAs that concept 1's model has not"),
        ("area", "remove conditioning areas"),
        ("unipc", "set enhancement to 0"),
        ("sparse after", "put LoRA Composer after it"),
        ("replaced", "another node replaces the model's cross-attention"),
    ],
)
def test_bad_input_has_one_message(results, case, message):
    assert message in results["refusals"][case]


def graph(width: int = 128, enhancement: float = 1.0) -> dict[str, dict]:
    """The shared workflow with a small picture."""
    out = json.loads((HERE.parent / "workflows" / "api" / "tessera_lora_composer.json").read_text())
    out["8"]["inputs"] |= dict(width=width, height=64, batch_size=2)
    for node, left in (("4", 0), ("5", 64)):
        out[node]["inputs"] |= dict(x=left, width=48, height=64)
    out["9"]["inputs"]["enhancement"] = enhancement
    out["10"]["inputs"]["steps"] = 2
    return out


def test_through_the_queue(installed, results, models):
    with ComfyServer(installed, models=models) as server:
        with pytest.raises(PromptFailedError, match="leaves the canvas of 96 x 64"):
            server.run(graph(width=96), timeout=600)
        pictures = [
            [np.asarray(Image.open(io.BytesIO(server.fetch(file)))) for file in server.run(graph(**changes), timeout=600).outputs["12"]["images"]]
            for changes in ({}, {"enhancement": 0.0})
        ]
        assert [[picture.shape for picture in run] for run in pictures] == [[(64, 128, 3)] * 2] * 2
        assert (pictures[0][0] != pictures[1][0]).any() and (pictures[0][0] != pictures[0][1]).any()
        assert "LoRA Composer: 2 concepts" in server.log and "1 gradient steps" in server.log
