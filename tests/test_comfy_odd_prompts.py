"""Wrong values and wrong links in every node, through ComfyUI's own validation and queue, old and new: a result, or one sentence.

More prompts than by default: TESSERA_ODD_PROMPTS=36000 pytest tests/test_comfy_odd_prompts.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import _installed

from tessera.kernels.sparsity import RECIPES

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

HERE = Path(__file__).parent
*METHODS, LAST_METHOD = (name for name, recipe in RECIPES.items() if not recipe.control)
PROMPTS = int(os.environ.get("TESSERA_ODD_PROMPTS", "500"))

# What is said, and beside which input; for a choice that ComfyUI keeps to itself that is the first one.
QUEUED = {
    "percents": ("start_percent", "start_percent is 0.95, end_percent 0.9; use 0 <= start_percent <= end_percent <= 1"),
    "blocks": ("dense_blocks", "dense_blocks is '1-x'; use block numbers and ranges such as 0,1 or 0-3, below 10000"),
    "method": ("method", f"method is not known; use {', '.join(METHODS)} or {LAST_METHOD}"),
    "error": ("method.error", "method.error is 1.5; use a number from 0 to 1"),
    "error of a method without": ("method.error", "method.error is 0.08, but sparge cannot predict one; use tessera, or 0 and a density"),
    "search": ("method.search_every", "method.search_every is -1; use a whole number from 0 to 100"),
    "density": ("density", "density is nan; use a number from 0.01 to 1"),
    "range": ("min_tokens", "min_tokens is -1; use a whole number from 0 to 16777216"),
    "choice": ("mode", "mode is 'reckless'; use quality, balanced or fast"),
    "window": ("k", "k is 1; use at least 2 blocks, or 0 to let the limit decide"),
    "overlap": ("overlap", "overlap is 40 and tile 64; use at most 32, half the tile"),
    "overlap of a report": ("overlap", "overlap is 40 and tile 64; use at most 32, half the tile"),
    "factor": ("size.factor", "size.factor is 1000.0; use a number from 0.1 to 64"),
    "size": ("model", "size is not known; use factor, megapixels or named"),
    "video": ("file", "file is 'gone.mp4', which is not in ComfyUI's input folder; copy it there"),
    "clip": ("file", "file is '../gone.mp4', which lies outside ComfyUI's folders; copy the video into the input folder"),
    "document": ("file", "file is 'gone.psd', which is no "),
    "prefix": ("filename_prefix", "filename_prefix is '../x', which leaves the output folder; use folders below it, such as video/new"),
    "alpha": ("alpha", "alpha is premultiplied, and animated WebP holds straight alpha only; use straight, or another format"),
    "edges": ("clean.low", "low is 0.95 and high is 0.9; use 0 <= low < high <= 1"),
    "matte": ("clean.matte", "matte is 'dark'; use none, or a colour such as black, white, grey or #336699"),
    "change": ("layers", "change is not known; use position, size, turn, opacity, 'blend mode', visibility, name, order or mask"),
    "rule": ("layers", "layout is not known; use grid, golden, masks or caption"),
    "socket": ("layers", "layers is 'a text', and not layers; connect Layers from Images, Load Layers or Add Layer"),
    "boxes": ("boxes", "boxes has '0, 0, 5' in line 1; write x, y, width, height in pixels, such as 64, 32, 256, 128"),
    "boxes outside": ("boxes", "box 1 (at 64, 0, 16 x 16) lies outside of the canvas of 64 x 48"),
    "json": ("boxes", "box 1 is 1 and no object"),
    "box": ("width", "width is 0; give the box a width and a height above 0"),
    "word": ("text", "The word 'purple' is not in the vocabulary of these weights."),
    "caption": ("text", "'red disc on green on blue' has 'on' 2 times; say the ground once, at the end: red disc, blue ring on green"),
}
LINKED = {
    "percents": "start_percent is 0.95, end_percent 0.9; use 0 <= start_percent <= end_percent <= 1",
    "density": "density is nan; use a number from 0.01 to 1",
    "error": "method.error is nan; use a number from 0 to 1",
    "error of a method without": "method.error is 0.95, but draft cannot predict one; use tessera, or 0 and a density",
    "overlap": "overlap is 90 and tile 100; use at most 50, half the tile",
    "mode": "mode is 'a text'; use quality, balanced or fast",
    "boxes": "boxes has 'a text' in line 1",
    "document": "file is 'a text', which is no ",
    "clip": "clip is empty: the checkpoint holds no text encoder; load one with a CLIP loader",
    "model": "model is a VAE, and not a diffusion model; connect the MODEL of a model loader",
    "image": "images is (2, 16, 16, 2) of float32, and not pictures (batch, height, width, channels) of 1, 3 or 4 channels",
    "mask": "change.mask is (1, 16, 16, 1) of float32, and not masks (batch, height, width); connect a MASK",
    "whole": "k is 2.5; use a whole number from 0 to 1000",
    "text": "layer is a VAE, and not a text; connect a text",
    "item": "layers has an item without a name with x 'a'; use a number",
    "latent": "latent is (1, 16), and not of pictures or clips; connect the latent that goes into the sampler",
}


@pytest.fixture(scope="module", params=[False, True], ids=["comfy", "comfy_old"])
def answers(request: pytest.FixtureRequest, package_path: Path, tiny_models: Path) -> list[dict]:
    """What comfy_odd_prompts.py prints."""
    install = _installed(old=request.param)
    command = [install.python, HERE / "comfy_odd_prompts.py", install.path, package_path, tiny_models, str(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")]


def test_every_answer_is_a_result_or_one_sentence(answers):
    counts = next(line for line in answers if line["case"] == "counts")
    assert [line for line in answers if line["case"] == "leak"] == []
    assert counts["prompts"] == min(PROMPTS, counts["possible"])
    assert min(counts[kind] for kind in ("result", "refused", "error")) > PROMPTS / 100, "each way is gone"


@pytest.mark.parametrize("case", QUEUED)
def test_one_mistake_is_one_message_beside_its_input_before_anything_runs(answers, case):
    line = next(line for line in answers if line["case"] == case)
    name, text = QUEUED[case]
    ((beside, said),) = line["said"]
    assert beside == name and said.startswith(f"{name} - {text}")


@pytest.mark.parametrize("case", LINKED)
def test_what_links_bring_is_refused_in_the_same_words(answers, case):
    line = next(line for line in answers if line["case"] == f"linked {case}")
    assert line["kind"] == "error" and line["wrong"] is None and line["text"].startswith(LINKED[case])


@pytest.mark.parametrize("case", ["nothing", "number as text", "whole number of NumPy", "flat mask", "no error of a method without", "old"])
def test_nothing_where_it_is_optional_numbers_as_texts_and_single_masks_are_taken(answers, case):
    assert next(line for line in answers if line["case"] == f"linked {case}")["kind"] == "result"
