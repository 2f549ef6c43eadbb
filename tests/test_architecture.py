"""The ways that `docs/` describes are the ways that calls take."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comfy_attention_way import SIGMAS, passed
from conftest import _installed

import tessera
from tessera.kernels import backends
from tessera.models.families import TokenSpans
from tessera.models.patchers.attention import AttentionPatch, ModelCall
from tessera.models.patchers.diffusers import _Intercept
from tessera.models.patchers.settings import AttentionSettings

COMFYUI, DIFFUSERS = "nodes/attention/host.py", "models/patchers/diffusers.py"
UNTOUCHED = "nodes/comfy/patching.py"  # on the way to ComfyUI's own attention
CHOOSE = ("kernels/dispatch.py", "choose")


@pytest.fixture
def text(root: Path) -> str:
    """The section on attention calls."""
    return re.split(r"^## ", (root / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)[1]


def test_what_the_text_names_is_there(root: Path) -> None:
    """Files by their path, or by their name alone in the section of their folder; and links."""
    whole = (root / "docs" / "architecture.md").read_text()
    known = {str(file.relative_to(root)) for folder in ("kernels", "models", "nodes", "cli", "tests") for file in (root / folder).rglob("*.py")}
    names = {Path(file).name for file in known}
    for named in set(re.findall(r"`([\w/]+\.py)`", whole)):
        assert named in (known if "/" in named else names), named
    for link in re.findall(r"\]\(([^)#]+)\)", whole):
        assert (root / "docs" / link).exists(), link
    assert len(re.findall(r"^## (An attention call|A weight|A frame|A layer)$", whole, re.MULTILINE)) == 4


def test_the_page_on_the_method_names_what_is_there(root: Path) -> None:
    """In its table, code by its name in the file that is linked last; and all links."""
    page = (root / "docs" / "method.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (root / "docs" / link).exists(), link
    rows = re.findall(r"^\| .+ \| (`\w+`.*) \|$", page, re.MULTILINE)
    cells = [cell for row in rows for cell in re.findall(r"((?:`\w+`,? ?)+) in \[`[^`]+`\]\(([^)]+)\)", row)]
    named = [(name, link) for names, link in cells for name in re.findall(r"\w+", names)]
    assert len(named) >= 10
    for name, link in named:
        assert re.search(rf"(def |class |^|name=\"){name}\b", (root / "docs" / link).read_text(), re.MULTILINE), (name, link)


def rooms(text: str) -> list[str]:
    return re.findall(r"^\d+\. `(\S+\.py)`: ", text, re.MULTILINE)


def functions(text: str) -> set[tuple[str, str]]:
    """(file, function) of every function that a room's entry begins a sentence with."""
    entries = re.findall(r"^\d+\. `(\S+\.py)`: (.*?)(?=^\d+\. |\n\n)", text, re.MULTILINE | re.DOTALL)
    return {(file, name) for file, entry in entries for name in re.findall(r"(?:^|[.;]\s+)`(\w+)`", entry)}


def asked(text: str, beginning: str) -> set[str]:
    paragraph = next(part for part in text.split("\n\n") if part.startswith(beginning))
    return set(re.findall(r"`(\S+\.py)`", paragraph))


def files(way: list[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(file for file, _ in way))


def check(text: str, look: list[tuple[str, str]], next_one: list[tuple[str, str]], host: str) -> None:
    expected = [host if room == COMFYUI else room for room in rooms(text)]
    every, once = asked(text, "Every call asks"), asked(text, "The first of a kind asks")
    search, last = asked(text, "A call that is looked at"), "kernels/torch_backend/block_sparse.py"
    assert len(expected) <= 9 and expected[-1] == last
    assert [file for file in files(next_one) if file not in every] == expected
    assert set(files(next_one)) == {*expected, *every}
    assert set(files(look)) == {*expected, *every, *search, *once, *([UNTOUCHED] if host == COMFYUI else [])} - {last}
    assert f"`{UNTOUCHED}`" in text
    assert look.count(CHOOSE) == 1 and CHOOSE not in next_one
    named = {(file, name) for file, name in functions(text) if file != COMFYUI}
    assert {file for file, _ in named} >= {"kernels/dispatch.py", "models/patchers/search.py", "kernels/sparsity/plan.py", "kernels/attention.py"}
    assert named <= {*look, *next_one}, "a function is named that the call does not pass"


def ways_of(method: str) -> list[list[tuple[str, str]]]:
    """A call in each of three steps, from diffusers."""
    backends.register_all()
    patch = AttentionPatch(AttentionSettings(method=method, min_tokens=0, start_percent=0.0))
    q = torch.randn(1, 2, 320, 16)
    ways = []
    for sigma in SIGMAS:
        call = ModelCall(TokenSpans(5, 8, 8), sigma)
        patch.begin(call)
        with _Intercept(patch, call):
            ways.append(passed(lambda: F.scaled_dot_product_attention(q, q, q)))
    return ways


def test_an_attention_call_of_diffusers_takes_the_way_of_the_text(text: str) -> None:
    look, _, next_one = ways_of(AttentionSettings().method)
    check(text, look, next_one, DIFFUSERS)


def test_a_method_with_cheap_scores_chooses_in_every_call(text: str) -> None:
    way = ways_of("sparge")[-1]
    rest = {*rooms(text), *asked(text, "Every call asks"), *asked(text, "Methods with cheap scores"), DIFFUSERS}
    assert set(files(way)) == rest - {COMFYUI, "kernels/sparsity/exact.py"}
    assert ("models/patchers/search.py", "decide") not in way


@pytest.mark.comfy
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_an_attention_call_of_comfyui_takes_the_way_of_the_text(text: str, old: bool, package_path: Path) -> None:
    install = _installed(old=old)
    script = Path(__file__).parent / "comfy_attention_way.py"
    done = subprocess.run([install.python, script, install.path, package_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("WAY "))
    look, _, next_one = ([(file, name) for file, name in way] for way in json.loads(line.removeprefix("WAY ")))
    assert look[0] == next_one[0] == (COMFYUI, "override")
    check(text, look, next_one, COMFYUI)


def test_a_call_of_the_op_alone_chooses_once() -> None:
    q = torch.randn(1, 2, 40, 16)
    way = passed(lambda: tessera.attention(q, q, q))
    assert way.count(CHOOSE) == 1 and ("kernels/dispatch.py", "describe") in way
