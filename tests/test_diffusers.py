"""The diffusers host: our native files load, the patch changes nothing at density 1, and sparse runs are sparse."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load, load_file

from tessera.cli import demo
from tessera.models.default import networks
from tessera.models.default.vocabulary import encode
from tessera.models.errors import FileError
from tessera.models.patchers import diffusers as host
from tessera.models.patchers.attention import AttentionPatch
from tessera.models.patchers.report import SPARSE
from tessera.models.patchers.settings import AttentionSettings
from tiny_models import DIFFUSION_MODEL, VAE

pytest.importorskip("diffusers", reason="needs diffusers: `pip install tessera-nodes[diffusers]`, or `make test`")

SIZE = dict(width=64, height=64, frames=9)
RUN = dict(**SIZE, steps=4, cfg=3.0, shift=5.0, seed=3)


@pytest.fixture(scope="module")
def files(tiny_models):
    return tiny_models / "diffusion_models" / DIFFUSION_MODEL, tiny_models / "vae" / VAE


@pytest.fixture(scope="module")
def model(files):
    return host.load(*files)


def test_files_of_something_else_are_named(files, tmp_path):
    transformer, vae = files
    for given, name in (((vae, vae), vae.name), ((transformer, transformer), transformer.name)):
        with pytest.raises(FileError, match=rf"{name}: not (a Wan text-to-video transformer|the VAE of Wan 2\.1)"):
            host.load(*given)
    (tmp_path / "cut.safetensors").write_bytes(transformer.read_bytes()[:-9])
    with pytest.raises(FileError, match=r"cut\.safetensors: not a safetensors file"):
        host.load(tmp_path / "cut.safetensors", vae)


def settings(**changes) -> AttentionSettings:
    return AttentionSettings(**{"precision": "native", "min_tokens": 0, "density": 0.5, "block": 16, **changes})


def sample(model, **changes):
    return host.sample(model, encode("red disc moving right"), encode(""), **{**RUN, **changes})


def test_the_loaded_networks_compute_what_the_native_ones_do(files, model):
    """The same file in our own native-layout networks and in diffusers' classes."""
    transformer = networks.build_transformer(layers=2).eval()
    transformer.load_state_dict(load_file(files[0]))
    vae = networks.build_vae().eval()
    vae.load_state_dict(load_file(files[1]))
    x, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([700.0]), encode("blue square")
    with torch.inference_mode():
        ours = transformer(x, t, text)
        theirs = model.transformer(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model.vae.decode(x, return_dict=False)[0], vae.decode(x).clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_density_one_is_bitwise_dense_and_the_module_comes_back(model):
    plain = sample(model)
    patch = AttentionPatch(settings(density=1.0))
    with host.accelerated(model.transformer, patch):
        assert torch.equal(sample(model, patch=patch), plain)
    assert "forward" not in vars(model.transformer)
    assert torch.equal(sample(model), plain)
    report = patch.report.as_dict()
    assert report["self_attention_calls"] == RUN["steps"] * 2 * 2
    assert report["calls"].get(SPARSE, 0) == 0
    assert report["reasons"]["cross-attention"] == RUN["steps"] * 2 * 2


@pytest.mark.parametrize("method", ["tessera", "rainfusion2", "draft", "sparge"])
def test_every_call_in_the_window_is_sparse(model, method):
    patch = AttentionPatch(settings(method=method, dense_blocks=frozenset({0})))
    with host.accelerated(model.transformer, patch):
        out = sample(model, patch=patch)
    report = patch.report.as_dict()
    assert torch.isfinite(out).all()
    assert report["sparse_share_in_window"] == 1.0
    assert report["calls"][SPARSE] > 0
    assert report["density"] < 1.0
    assert report["family"] == "Wan"


def test_an_error_in_the_run_leaves_no_patch(model):
    patch = AttentionPatch(settings())
    with pytest.raises(RuntimeError, match="stop"), host.accelerated(model.transformer, patch):
        raise RuntimeError("stop")
    assert "forward" not in vars(model.transformer)


def test_non_finite_output_is_repeated_dense(model, monkeypatch):
    plain = sample(model)
    patch = AttentionPatch(settings(start_percent=0.0))
    original = patch._sparse

    def broken(*args):
        return original(*args) * float("nan")

    monkeypatch.setattr(patch, "_sparse", broken)
    with host.accelerated(model.transformer, patch):
        out = sample(model, patch=patch)
    assert torch.equal(out, plain)
    assert patch.report.repeated > 0


@pytest.fixture
def pipeline(model):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=RUN["shift"])
    return WanPipeline(tokenizer=None, text_encoder=None, vae=model.vae, scheduler=scheduler, transformer=model.transformer)


def call_pipeline(pipeline, steps):
    texts = dict(prompt_embeds=encode("red disc moving right"), negative_prompt_embeds=encode(""))
    run = dict(height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=3.0, output_type="latent")
    return pipeline(**texts, **run, generator=torch.Generator().manual_seed(1)).frames


def test_a_pipeline_keeps_its_first_steps_dense(pipeline):
    """Two calls a step for guidance, two layers a call: 3 of 10 steps lie before 30 % of the schedule, and the run after it is one of its own."""
    patch = AttentionPatch(settings(start_percent=0.3, dense_blocks=frozenset()))
    with host.accelerated(pipeline.transformer, patch, pipeline.scheduler):
        for steps, dense in ((10, 3), (20, 6)):
            call_pipeline(pipeline, steps)
            report = patch.report.as_dict()
            assert report["calls"] == {"host": dense * 4, "sparse": (steps - dense) * 4}
            assert report["reasons"]["outside the sparse steps"] == dense * 4


def test_a_pipelines_few_steps_are_noticed(pipeline):
    patch = AttentionPatch(settings(density=0.2, gentle_few_steps=True))
    with host.accelerated(pipeline.transformer, patch, pipeline.scheduler):
        call_pipeline(pipeline, 4)
    report = patch.report.as_dict()
    assert report["calls"] == {"host": 4, "sparse": 12}
    assert report["asked_density"] == 0.5


@pytest.mark.parametrize("changes", [{}, dict(start_percent=0.0, end_percent=0.9), dict(start_percent=0.0, gentle_few_steps=True)])
def test_a_schedule_that_is_needed_and_not_known_is_refused(pipeline, changes):
    patch = AttentionPatch(settings(**changes))
    with pytest.raises(ValueError, match="pass the pipeline's scheduler"), host.accelerated(pipeline.transformer, patch):
        call_pipeline(pipeline, 2)
    assert "forward" not in vars(pipeline.transformer)


def test_without_a_schedule_all_steps_may_be_sparse(pipeline):
    patch = AttentionPatch(settings(start_percent=0.0))
    with host.accelerated(pipeline.transformer, patch):
        call_pipeline(pipeline, 2)
    report = patch.report.as_dict()
    assert (report["calls"], report["searches"]) == ({"host": 4, "sparse": 4}, 4), "the first step is looked at"


def test_what_others_have_put_on_the_module_comes_back(model, monkeypatch):
    """A hook of another library's, and a context in a context."""
    plain, calls = sample(model), []

    def hooked(*args, original=model.transformer.forward, **kwargs):
        calls.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", hooked)
    with host.accelerated(model.transformer, AttentionPatch(settings(density=1.0, start_percent=0.0))):
        with host.accelerated(model.transformer, AttentionPatch(settings(density=1.0))) as patch:
            sample(model, patch=patch)
    assert model.transformer.forward is hooked
    assert torch.equal(sample(model), plain)
    assert len(calls) == 2 * 2 * RUN["steps"]


def test_a_copy_made_inside_is_a_model_of_its_own(model):
    """It has weights of its own, and no patch."""
    patch = AttentionPatch(settings(density=1.0, start_percent=0.0))
    text = torch.randn(1, 6, model.transformer.config.text_dim)
    inputs = dict(hidden_states=torch.randn(1, 16, 3, 8, 8), timestep=torch.tensor([700.0]), encoder_hidden_states=text, return_dict=False)
    with torch.inference_mode():
        plain = model.transformer(**inputs)[0]
        with host.accelerated(model.transformer, patch):
            copied = deepcopy(model.transformer)
            copied.proj_out.weight.data.zero_()
            flat = copied(**inputs)[0].squeeze(0).reshape(16, -1, 2, 2)
        assert patch.report.as_dict()["self_attention_calls"] == 0
        assert torch.allclose(flat, flat[:, :1].amax((1, 2, 3), keepdim=True), atol=1e-6) or flat.std() < plain.std() / 2
        assert torch.equal(model.transformer(**inputs)[0], plain)


def test_another_model_is_refused_by_name():
    from diffusers import FluxTransformer2DModel

    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, in_channels=16, joint_attention_dim=32)
    flux = FluxTransformer2DModel(**sizes, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6))
    with pytest.raises(ValueError, match="transformer is a FluxTransformer2DModel"), host.accelerated(flux, AttentionPatch(settings())):
        pass
    assert "forward" not in vars(flux)


def test_decode_gives_a_clip(model):
    clip = host.decode(model, sample(model, steps=1))
    assert clip.shape == (SIZE["frames"], SIZE["height"], SIZE["width"], 3)
    assert clip.min() >= 0 and clip.max() <= 1


def test_schedule_matches_the_flow_formula(model):
    """sigma = shift s / (1 + (shift - 1) s) at s = 1 - step / steps, which is what percent_to_sigma inverts."""
    sigma = host.percent_to_sigma(5.0)
    assert sigma(0.0) == 1.0 and sigma(1.0) == 0.0
    assert sigma(0.5) == pytest.approx(5 * 0.5 / 3)


@pytest.mark.comfy
def test_both_hosts_make_the_same_latents(any_comfy, model):
    """Same file, seed, schedule and settings in ComfyUI and in diffusers, dense and sparse."""
    workflow = json.loads(demo.WORKFLOW.read_text())
    inputs = {entry["class_type"]: entry["inputs"] for entry in workflow.values()}
    inputs["EmptyHunyuanLatentVideo"].update(width=SIZE["width"], height=SIZE["height"], length=SIZE["frames"])
    inputs["KSampler"].update(steps=RUN["steps"], cfg=RUN["cfg"], seed=RUN["seed"])
    inputs["ModelSamplingSD3"]["shift"] = RUN["shift"]
    inputs["TesseraSparseAttention"].update(block="16", density=0.5)
    for name, graph in demo.variants(demo.with_savers(workflow)):
        result = any_comfy.run(graph, targets=["latents"])
        theirs = load(any_comfy.fetch(result.outputs["latents"]["latents"][0]))["latent_tensor"]
        attention = demo.attention_settings(demo.read_job(workflow).attention, dense=name == "dense")
        patch = AttentionPatch(attention)
        with host.accelerated(model.transformer, patch):
            ours = sample(model, patch=patch)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
