"""The demo's parts, and the demo itself through each host on random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tessera.__main__ import main
from tessera.cli import demo, pictures, run


@pytest.fixture
def workflow():
    return json.loads(demo.WORKFLOW.read_text())


@pytest.fixture
def quick(workflow, tmp_path, monkeypatch):
    """A smaller job through the same code."""
    workflow[demo._node(workflow, "EmptyHunyuanLatentVideo")]["inputs"].update(width=64, height=64, length=9)
    workflow[demo._node(workflow, "KSampler")]["inputs"].update(steps=6)
    workflow[demo._node(workflow, "TesseraSparseAttention")]["inputs"].update({"block": "16", "method.error": 0.3})
    file = tmp_path / "quick.json"
    file.write_text(json.dumps(workflow))
    monkeypatch.setattr(demo, "WORKFLOW", file)
    return workflow


def test_variants_differ_in_what_is_asked_for_only(workflow):
    variants = dict(demo.variants(workflow))
    assert variants["accelerated"] == workflow
    dense = variants["dense"]
    node = demo._node(workflow, "TesseraSparseAttention")
    assert dense[node]["inputs"]["density"] == 1.0 and dense[node]["inputs"]["method.error"] == 0.0
    dense[node]["inputs"].update({name: workflow[node]["inputs"][name] for name in ("density", "precision", "method.error")})
    assert dense == workflow


def test_savers_hang_on_the_sampler_and_the_decoder(workflow):
    saved = demo.with_savers(workflow)
    assert saved["latents"]["inputs"]["samples"][0] == demo._node(workflow, "KSampler")
    assert saved["frames"]["inputs"]["images"][0] == demo._node(workflow, "VAEDecode")
    assert "latents" not in workflow


def test_a_node_must_be_there_once(workflow):
    with pytest.raises(ValueError, match="0 nodes of class NoSuchNode"):
        demo._node(workflow, "NoSuchNode")


def test_attention_settings_follow_the_widgets(workflow):
    job = demo.read_job(workflow)
    settings = demo.attention_settings(job.attention, dense=False)
    settings.validate()
    assert settings.density == job.attention["density"] and settings.method == job.attention["method"]
    assert settings.error == job.attention["method.error"] > 0
    dense = demo.attention_settings(job.attention, dense=True)
    assert (dense.density, dense.error) == (1.0, None)
    others = {"method": "sparge", "method.similarity": 0.3, "method.error": 0.0, "tail": True}
    settings = demo.attention_settings(job.attention | others, dense=False)
    settings.validate()
    assert settings.method_settings == {"similarity": 0.3} and settings.error is None and settings.tail


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert pictures.psnr(a, a) == float("inf")
    assert pictures.psnr(a, a + 255) == 0.0
    assert pictures.psnr(a, a + 51) == pytest.approx(20 * np.log10(5))


def test_mp4_round_trip(tmp_path):
    clip = np.zeros((9, 48, 64, 3), np.uint8)
    clip[:, :, 32:] = 200
    pictures.write_mp4(tmp_path / "a.mp4", clip)
    back = pictures.read_mp4(tmp_path / "a.mp4")
    assert back.shape == clip.shape
    assert pictures.psnr(clip, back) > 25


def test_comparison_picture_shows_the_difference():
    a = np.zeros((9, 16, 16, 3), np.uint8)
    picture = np.asarray(pictures.comparison(a, a + 10, ("one", "two"), columns=3))
    assert picture.shape == (3 * (16 + 16), 3 * 16, 3)
    assert (picture[-16:] == 10 * pictures.GAIN).all()


def test_change_a_workflow(workflow):
    sampler = demo._node(workflow, "KSampler")
    run.change(workflow, f"{sampler}.seed=5")
    run.change(workflow, f"{sampler}.sampler_name=heun")
    assert workflow[sampler]["inputs"]["seed"] == 5 and workflow[sampler]["inputs"]["sampler_name"] == "heun"
    with pytest.raises(ValueError, match=r"node\.input=value"):
        run.change(workflow, "99.seed=5")


def check_output(folder, capsys):
    printed = capsys.readouterr().out
    words = ["sampling time", "attention time", "an error of 30%", "measured", "density", "work", "looked", "sparse calls"]
    for word in (*words, "PSNR", "latent error", "backend", "side by side", "heat map"):
        assert word in printed
    for file in ("dense.mp4", "accelerated.mp4", "side_by_side.png", "heat_map_accelerated.png"):
        assert (folder / file).stat().st_size > 0
    report = json.loads((folder / "report.json").read_text())
    assert report["dense"]["calls"].get("sparse", 0) == 0
    assert report["accelerated"]["calls"]["sparse"] > 0
    assert report["accelerated"]["sparse_share_in_window"] == 1.0
    assert report["accelerated"]["asked_error"] == 0.3 and 0.0 < report["accelerated"]["error"] < 0.6
    assert report["accelerated"]["searches"] > 0


@pytest.mark.slow
def test_demo_without_comfyui(quick, tiny_models, tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(demo, "find_comfy", lambda: None)
    assert main(["demo", "--models", str(tiny_models), "--output", str(tmp_path / "out")]) == 0
    check_output(tmp_path / "out", capsys)


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.parametrize("version", ["comfy", "comfy_old"])
def test_demo_with_comfyui(version, quick, tiny_models, tmp_path, monkeypatch, capsys, request):
    install = request.getfixturevalue(version).comfy
    monkeypatch.setattr(demo, "find_comfy", lambda: install)
    assert main(["demo", "--models", str(tiny_models), "--output", str(tmp_path / "out")]) == 0
    check_output(tmp_path / "out", capsys)


@pytest.mark.slow
def test_demo_fails_when_nothing_was_sparse(quick, tiny_models, tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    quick[demo._node(quick, "TesseraSparseAttention")]["inputs"]["min_tokens"] = 1 << 20
    demo.WORKFLOW.write_text(json.dumps(quick))
    monkeypatch.setattr(demo, "find_comfy", lambda: None)
    assert main(["demo", "--models", str(tiny_models), "--output", str(tmp_path / "out")]) == 1
    assert "no attention call was sparse" in capsys.readouterr().err


def test_doctor_names_every_backend(capsys):
    from tessera.kernels import dispatch

    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert dispatch.implementations()
    for implementation in dispatch.implementations():
        assert implementation.name in printed
