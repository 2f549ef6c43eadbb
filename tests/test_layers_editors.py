"""Documents that GIMP and Krita flatten headless, from our PSD and OpenRaster files without the merged picture.

One file holds all modes, side by side: a layer a mode over one backdrop. What those programs do otherwise is pinned here, with its size.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from psd_tools.psd import PSD
from test_layers_blend import levels

from tessera.models.layers import blend
from tessera.models.layers.compose import composite
from tessera.models.layers.document import Document, Group, Layer, Node
from tessera.models.layers.formats import write
from tessera.models.layers.ora import OPERATORS
from tessera.models.layers.psd import BLEND_KEYS as KEYS

pytestmark = pytest.mark.slow

SIDE = 32
COMPONENTS = {"hue", "saturation", "color", "luminosity"}
CHOICES = {"darker-color", "lighter-color"}
TIES = {"hard-mix", "vivid-light"}  # where two values add up to 255; where the layer is 0 or 255, which wins in Photoshop whatever is below


def modes_of(names: dict) -> list[str]:
    return [mode for mode in names if mode not in ("pass-through", "dissolve")]


def document(modes: list[str], opaque: bool) -> Document:
    """Random colours; the backdrop is opaque, and so are the layers unless asked otherwise."""
    bottom = levels(SIDE, SIDE * len(modes), 4)
    bottom[..., 3] = 1
    layers = [Layer("bottom", bottom)]
    for index, mode in enumerate(modes):
        top = levels(SIDE, SIDE, 4)
        if opaque:
            top[..., 3] = 1
        layers.append(Layer(mode, top, index * SIDE, 0, 1.0, mode))
    return Document(SIDE * len(modes), SIDE, tuple(layers))


def grouped() -> Document:
    """Groups, masks, opacity, hidden and overhanging layers, with modes on which all programs agree."""
    masked = Layer("masked", levels(20, 24, 4), 3, 5, 0.6, "screen", mask=levels(20, 24))
    inner = Group("inner", (masked, Layer("hidden", levels(9, 9, 4), visible=False)), 0.8, "normal")
    outer = Group("outer", (Layer("over", levels(20, 20, 4), 30, -6, 1.0, "multiply"), inner), 0.7, "normal")
    bottom = levels(40, 44, 4)
    bottom[..., 3] = 1
    return Document(44, 40, (Layer("bottom", bottom), Group("through", (Layer("t", levels(9, 9, 4), 10, 20, 1.0, "overlay"),)), outer))


def opaque_groups(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """As Krita 5.1 reads a PSD: without the opacity of groups. GIMP and psd-tools do read it."""
    return tuple(replace(node, layers=opaque_groups(node.layers), opacity=1.0) if isinstance(node, Group) else node for node in nodes)


def without_merged(file: Path) -> None:
    """Blank the merged picture, so that nobody can show it in place of the layers."""
    if file.suffix == ".ora":
        with zipfile.ZipFile(file) as archive:
            kept = {name: archive.read(name) for name in archive.namelist() if name not in ("mergedimage.png", "Thumbnails/thumbnail.png")}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in kept.items():
                archive.writestr(name, data)
        return
    with open(file, "rb") as stream:
        psd = PSD.read(stream)
    psd.image_data.set_data([bytes(psd.header.width * psd.header.height)] * 4, psd.header)
    with open(file, "wb") as stream:
        psd.write(stream)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where the programs keep their settings: empty at first, and kept, because they take a minute to fill it."""
    return tmp_path_factory.mktemp("home")


def flattened(program: str, before: Document, file: Path, home: Path) -> np.ndarray:
    """RGBA in 0..1, by the program; skips where it is not installed."""
    command = {"gimp": "gimp-console", "krita": "krita"}[program]
    if shutil.which(command) is None:
        pytest.skip(f"needs {program}: apt-get install {program}")
    write(before, file)
    without_merged(file)
    out = file.with_suffix(".png")
    if program == "gimp":
        script = (
            f'(let* ((image (car (gimp-file-load RUN-NONINTERACTIVE "{file}" "{file}")))'
            " (layer (car (gimp-image-merge-visible-layers image CLIP-TO-IMAGE))))"
            f' (file-png-save RUN-NONINTERACTIVE image layer "{out}" "{out}" 0 9 0 0 0 0 0))'
        )
        arguments = [command, "-i", "-d", "-f", "-b", script, "-b", "(gimp-quit 0)"]
    else:
        arguments = [command, "--export", "--export-filename", str(out), str(file)]
        if "DISPLAY" not in os.environ:  # Krita insists on X11
            if shutil.which("xvfb-run") is None:
                pytest.skip("krita needs a display: apt-get install xvfb xauth")
            arguments = ["xvfb-run", "-a", *arguments]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "HOME": str(home)}, timeout=600)
    assert out.is_file(), done.stdout + done.stderr
    return np.asarray(Image.open(out).convert("RGBA")) / 255


def differences(theirs: np.ndarray, before: Document, modes: list[str]) -> dict[str, np.ndarray]:
    """For each mode the largest difference of a pixel's colours, in 1/255, `(SIDE, SIDE)`."""
    apart = np.abs(theirs - composite(before).numpy()).max(-1) * 255
    return {mode: apart[:, index * SIDE : (index + 1) * SIDE] for index, mode in enumerate(modes)}


def test_krita_agrees_on_openraster(tmp_path, home, monkeypatch):
    modes = modes_of(OPERATORS)
    before = document(modes, opaque=False)
    theirs = flattened("krita", before, tmp_path / "a.ora", home)
    found = differences(theirs, before, modes)
    for mode in set(modes) - COMPONENTS - CHOICES - TIES:
        assert found[mode].max() <= 2, mode
    assert all(found[mode].max() <= 5 for mode in COMPONENTS), "Krita's weights of red, green and blue are not the W3C's"
    assert all((found[mode] > 2).mean() < 0.03 for mode in TIES)
    assert all((found[mode] > 2).mean() < 0.02 for mode in CHOICES), "only where both are equally bright"
    monkeypatch.setattr(blend, "_LUMINOSITY", (0.299, 0.587, 0.114))  # Krita's, and then these agree as well
    found = differences(theirs, before, modes)
    assert all(found[mode].max() <= 2 for mode in COMPONENTS)


def test_krita_agrees_on_psd(tmp_path, home):
    modes = modes_of(KEYS)
    before = document(modes, opaque=False)
    found = differences(flattened("krita", before, tmp_path / "a.psd", home), before, modes)
    for mode in set(modes) - COMPONENTS - CHOICES - TIES - {"soft-light"}:
        assert found[mode].max() <= 2, mode
    assert all(found[mode].max() <= 5 for mode in COMPONENTS)
    assert 2 < found["soft-light"].max() < 20, "Krita opens PSD's soft light as another formula than OpenRaster's"


def test_gimp_agrees_on_psd(tmp_path, home):
    modes = modes_of(KEYS)
    before = document(modes, opaque=True)
    found = differences(flattened("gimp", before, tmp_path / "a.psd", home), before, modes)
    own = COMPONENTS | CHOICES | {"soft-light"}  # GIMP 2.10 has other formulas for these
    for mode in set(modes) - own - {"hard-mix"}:
        assert found[mode].max() <= 1, mode
    assert (found["hard-mix"] > 1).mean() < 0.03, "only where two values add up to 255"
    assert all(found[mode].max() > 2 for mode in own), "if this fails, the help of Compose Layers can be shortened"


@pytest.mark.parametrize(("program", "ending"), [("gimp", ".psd"), ("krita", ".psd"), ("krita", ".ora")])
def test_groups_and_masks_look_alike(program, ending, tmp_path, home):
    before = grouped()
    shown = replace(before, layers=opaque_groups(before.layers)) if (program, ending) == ("krita", ".psd") else before
    theirs = flattened(program, before, tmp_path / f"a{ending}", home)
    assert np.abs(theirs - composite(shown).numpy()).max() * 255 <= 3  # each 8-bit group rounds once more
