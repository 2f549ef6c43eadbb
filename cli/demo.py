"""The main job, twice: a text-to-video workflow with dense attention and with sparse attention, same seed, side by side.

Where there is a ComfyUI, its server runs the workflow file; else diffusers runs the same weights, patch and kernels.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ..models.patchers.report import SPARSE, heat_map
from . import pictures, saved_files
from .comfy_server import HOW_TO_GET, PACK, ComfyInstall, ComfyServer, find_comfy

WORKFLOW = PACK / "workflows" / "api" / "tessera_text_to_video.json"
DEFAULT_MODELS = PACK / "models" / "default"
WARM_UP_STEPS = 2
"""Enough for one dense and one sparse step, so that loading, self-tests and compilation are not timed."""

Workflow = dict[str, dict[str, Any]]


class DemoError(ValueError):
    """The demo ran and what came out is wrong."""


@dataclass
class Run:
    """One sampled video. clip: uint8 `(frames, height, width, 3)`. seconds: sampling only, without loading and decoding."""

    clip: np.ndarray
    latents: Tensor
    seconds: float
    report: dict[str, Any]
    video: Path
    heat_map: Path


@dataclass(frozen=True)
class Job:
    """What the workflow file asks for, for a host that cannot read workflows."""

    diffusion_model: str
    vae: str
    positive: str
    negative: str
    width: int
    height: int
    frames: int
    steps: int
    cfg: float
    shift: float
    seed: int
    attention: dict[str, Any]


def run_demo(output: Path, models: Path | None = None) -> None:
    """Run both variants, print the figures, leave the pictures in `output`.

    models: folder with diffusion_models/ and vae/ to use instead of the default weights.
    Raises DemoError when no call was sparse or a video does not decode, and whatever the host raises.
    """
    workflow: Workflow = json.loads(WORKFLOW.read_text())
    job = read_job(workflow)
    if models is not None and not models.is_dir():
        raise FileNotFoundError(f"--models {models}: there is no such folder; name one with diffusion_models/ and vae/")
    saved_files.make_folder(output)
    comfy = find_comfy()
    if comfy is None:
        print(f"No ComfyUI here: the same weights, patch and kernels run in diffusers. To use ComfyUI, {HOW_TO_GET}.")
        runs = run_in_diffusers(job, models or DEFAULT_MODELS, output)
    else:
        print(f"ComfyUI at {comfy.path}, run by {comfy.python}")
        runs = run_in_comfy(comfy, workflow, models, output)
    (output / "report.json").write_text(json.dumps({name: run.report for name, run in runs.items()}, indent=1) + "\n")
    dense, sparse = runs["dense"], runs["accelerated"]
    side_by_side = output / "side_by_side.png"
    title = f"{sparse.report['method']}, work {_number(sparse.report['work'])}"
    pictures.comparison(dense.clip, sparse.clip, ("dense", title)).save(side_by_side)
    print("\n".join(_lines(job, dense, sparse)))
    print(f"side by side     {side_by_side}")
    _check(job, runs)


def read_job(workflow: Workflow) -> Job:
    """The settings of a workflow made of the default text-to-video graph's nodes."""
    sampler, size = _inputs(workflow, "KSampler"), _inputs(workflow, "EmptyHunyuanLatentVideo")
    return Job(
        diffusion_model=_inputs(workflow, "UNETLoader")["unet_name"],
        vae=_inputs(workflow, "VAELoader")["vae_name"],
        positive=workflow[sampler["positive"][0]]["inputs"]["text"],
        negative=workflow[sampler["negative"][0]]["inputs"]["text"],
        width=size["width"],
        height=size["height"],
        frames=size["length"],
        steps=sampler["steps"],
        cfg=sampler["cfg"],
        shift=_inputs(workflow, "ModelSamplingSD3")["shift"],
        seed=sampler["seed"],
        attention={name: value for name, value in _inputs(workflow, "TesseraSparseAttention").items() if name != "model"},
    )


def with_savers(workflow: Workflow) -> Workflow:
    """The workflow with its latents and its single frames saved too, under the node ids "latents" and "frames"."""
    sampler, decoder = _node(workflow, "KSampler"), _node(workflow, "VAEDecode")
    return {
        **copy.deepcopy(workflow),
        "latents": {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/demo"}},
        "frames": {"class_type": "SaveImage", "inputs": {"images": [decoder, 0], "filename_prefix": "frames/demo"}},
    }


def variants(workflow: Workflow) -> Iterator[tuple[str, Workflow]]:
    """("dense", ...) with every attention call left to ComfyUI but timed, and ("accelerated", ...), the workflow as it is."""
    dense = copy.deepcopy(workflow)
    _inputs(dense, "TesseraSparseAttention").update({"density": 1.0, "precision": "native", "method.error": 0.0})
    yield "dense", dense
    yield "accelerated", workflow


def run_in_comfy(comfy: ComfyInstall, workflow: Workflow, models: Path | None, output: Path) -> dict[str, Run]:
    """Queue both variants on one headless server."""
    workflow = with_savers(workflow)
    # ComfyUI's default on a CPU is slower than torch's own attention: the dense run gets the best there is.
    with ComfyServer(comfy, models=models, arguments=["--use-pytorch-cross-attention"]) as server:
        print(f"ComfyUI {server.version} is up at {server.url}")
        return {name: _run_variant(server, name, graph, output) for name, graph in variants(workflow)}


def _run_variant(server: ComfyServer, name: str, workflow: Workflow, output: Path) -> Run:
    warm_up = copy.deepcopy(workflow)
    _inputs(warm_up, "KSampler")["steps"] = WARM_UP_STEPS
    server.run(warm_up, targets=["latents"])
    sampled = server.run(workflow, targets=["latents"])
    # The rest of the graph; the sampler's output is cached.
    outputs = server.run(workflow).outputs
    report = outputs[_node(workflow, "TesseraAttentionReport")]
    video, chart = output / f"{name}.mp4", output / f"heat_map_{name}.png"
    video.write_bytes(server.fetch(outputs[_node(workflow, "SaveVideo")]["images"][0]))
    chart.write_bytes(server.fetch(report["images"][0]))
    return Run(
        clip=np.stack([pictures.decode_png(server.fetch(file)) for file in outputs["frames"]["images"]]),
        latents=load_safetensors(server.fetch(sampled.outputs["latents"]["latents"][0]))["latent_tensor"],
        seconds=sampled.seconds,
        report=report["tessera"][0],
        video=video,
        heat_map=chart,
    )


def run_in_diffusers(job: Job, models: Path, output: Path) -> dict[str, Run]:
    """Run both variants in this process."""
    if importlib.util.find_spec("diffusers") is None:
        raise DemoError(f"there is no diffusers either: pip install 'tessera-nodes[diffusers]'; or {HOW_TO_GET}")
    from ..models.default.vocabulary import encode
    from ..models.patchers import diffusers
    from ..models.patchers.attention import AttentionPatch

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = diffusers.load(models / "diffusion_models" / job.diffusion_model, models / "vae" / job.vae, device, dtype)
    embeddings = encode(job.positive), encode(job.negative)
    sample = partial(
        diffusers.sample, model, *embeddings, width=job.width, height=job.height, frames=job.frames, cfg=job.cfg, shift=job.shift, seed=job.seed
    )
    runs = {}
    for name in ("dense", "accelerated"):
        patch = AttentionPatch(attention_settings(job.attention, dense=name == "dense"))
        with diffusers.accelerated(model.transformer, patch):
            sample(steps=WARM_UP_STEPS, patch=patch)
            start = time.perf_counter()
            latents = sample(steps=job.steps, patch=patch).cpu()
            seconds = time.perf_counter() - start
        report = patch.report.as_dict()
        clip = (diffusers.decode(model, latents.to(model.device)) * 255).round().byte().numpy()
        video, chart = output / f"{name}.mp4", output / f"heat_map_{name}.png"
        pictures.write_mp4(video, clip)
        Image.fromarray((heat_map(report)[0] * 255).byte().numpy()).save(chart)
        runs[name] = Run(clip, latents, seconds, report, video, chart)
    return runs


def _check(job: Job, runs: dict[str, Run]) -> None:
    """Raise DemoError unless the accelerated run was sparse and both videos are whole."""
    for name, run in runs.items():
        shape = pictures.read_mp4(run.video).shape
        expected = (job.frames, job.height, job.width, 3)
        if shape != expected:
            raise DemoError(f"{run.video} holds {shape}, expected {expected} (frames, height, width, channels)")
        if not torch.isfinite(run.latents).all():
            raise DemoError(f"the {name} run's latents are not finite")
    report = runs["accelerated"].report
    if not report["calls"].get(SPARSE):
        raise DemoError(f"no attention call was sparse; reasons: {report['reasons']}")


def _lines(job: Job, dense: Run, sparse: Run) -> Iterator[str]:
    """The figures, in words."""
    report = sparse.report
    error = torch.linalg.vector_norm(sparse.latents - dense.latents) / torch.linalg.vector_norm(dense.latents)
    calls, total = report["calls"].get(SPARSE, 0), report["self_attention_calls"]
    yield f'"{job.positive}", {job.frames} frames of {job.width} x {job.height}, {job.steps} steps, seed {job.seed}'
    yield f"{'':17}{'dense':>10}{'accelerated':>13}"
    yield f"{'sampling time':17}{dense.seconds:>8.2f} s{sparse.seconds:>11.2f} s"
    yield f"{'attention time':17}{dense.report['attention_seconds']:>8.2f} s{report['attention_seconds']:>11.2f} s   self-attention only"
    asked = f"density {report['asked_density']}" if report["asked_error"] is None else f"an error of {report['asked_error']:.0%}"
    yield f"method           {report['method']}, asked for {asked}"
    if report["error"] is not None:
        yield f"error            {report['error']:.1%} measured on a few queries of every sparse call, {report['predicted_error']:.1%} predicted"
    yield f"density          {_number(report['density'])} of the sparse calls, {_number(report['overall_density'])} overall (dense steps included)"
    yield f"work             {_number(report['work'])} of the sparse calls with what is pooled, {_number(report['overall_work'])} overall"
    if report["searches"]:
        sizes = report["mask_bytes"]
        yield f"looked           {report['searches']} calls, {report['search_seconds']:.2f} s; masks of {sum(sizes.values()) / 1e6:.2g} MB"
    yield f"sparse calls     {calls} of {total} self-attention calls ({_share(calls, total)})"
    yield f"                 {_share_in_window(report)} of those in the sparse steps and blocks"
    yield f"PSNR             {pictures.psnr(dense.clip, sparse.clip):.1f} dB between the two videos"
    yield f"latent error     {error:.4f} relative to the dense run"
    yield f"backend          {', '.join(f'{name} ({times} calls)' for name, times in report['backends'].items()) or 'none'}"
    for name, reason in report["refusals"].items():
        yield f"                 not {name}: {reason}"
    for reason, times in report["reasons"].items():
        yield f"not sparse       {reason} ({times} calls)"
    for note in report["notes"]:
        yield f"note             {note}"
    yield f"videos           {dense.video}  {sparse.video}"
    yield f"heat map         {sparse.heat_map}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def _share_in_window(report: dict[str, Any]) -> str:
    share = report["sparse_share_in_window"]
    return "none" if share is None else f"{share:.0%}"


def attention_settings(widgets: dict[str, Any], dense: bool) -> Any:
    """The Sparse Attention node's inputs in API form, as AttentionSettings."""
    from ..kernels.sparsity import get
    from ..models.patchers.settings import AttentionSettings, parse_layers

    recipe = get(widgets["method"])
    return AttentionSettings(
        method=recipe.name,
        method_settings={name: widgets[f"method.{name}"] for name in recipe.settings},
        density=1.0 if dense else widgets["density"],
        error=None if dense else widgets.get("method.error") or None,
        precision="native" if dense else widgets["precision"],
        start_percent=widgets["start_percent"],
        end_percent=widgets["end_percent"],
        dense_blocks=parse_layers(widgets["dense_blocks"]),
        min_tokens=widgets["min_tokens"],
        block=None if widgets["block"] == "auto" else int(widgets["block"]),
        mask_refresh=widgets["mask_refresh"],
        search_every=widgets.get("method.search_every", 0),
        tail=widgets["tail"],
    )


def _node(workflow: Workflow, class_type: str) -> str:
    """Id of the one node of a class."""
    found = [node for node, entry in workflow.items() if entry["class_type"] == class_type]
    if len(found) != 1:
        raise ValueError(f"the workflow has {len(found)} nodes of class {class_type}; the demo needs exactly one")
    return found[0]


def _inputs(workflow: Workflow, class_type: str) -> dict[str, Any]:
    inputs: dict[str, Any] = workflow[_node(workflow, class_type)]["inputs"]
    return inputs
