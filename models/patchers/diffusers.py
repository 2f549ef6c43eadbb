"""The attention patch in Hugging Face diffusers: the other host besides ComfyUI. Covers Wan.

    pipe = WanPipeline.from_pretrained(...)
    with accelerated(pipe.transformer, AttentionPatch(AttentionSettings(density=0.3)), pipe.scheduler) as patch:
        frames = pipe(prompt=..., ...).frames
    print(summary(patch.report.as_dict()))

diffusers is imported only when these functions run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import reading
from ..families import WAN
from ..weight_files import read_safetensors
from .attention import AttentionPatch, ModelCall

TRAIN_TIMESTEPS = 1000.0
"""Wan is given t = 1000 sigma (Wan2.1, wan/utils/fm_solvers.py)."""


@dataclass
class WanModel:
    """A transformer and a VAE of diffusers, ready to run on `device`. dtype: of the transformer's inputs."""

    transformer: Any
    vae: Any
    device: torch.device
    dtype: torch.dtype


def load(diffusion_model: Path, vae: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanModel:
    """Load single files in Wan's native key layout, the ones that ComfyUI's UNETLoader and VAELoader take.

    dtype: of the transformer; the VAE stays in float32. Raises FileNotFoundError, and FileError for a file of something else.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    device = torch.device(device)
    weights, config = _read(diffusion_model)
    with reading(diffusion_model, "a Wan text-to-video transformer in the layout that ComfyUI takes", "use that of Wan"):
        dim, _, *patch_size = weights["patch_embedding.weight"].shape
        heads = config.get("num_heads", dim // 128)
        transformer = WanTransformer3DModel(
            patch_size=tuple(patch_size),
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=weights["patch_embedding.weight"].shape[1],
            out_channels=weights["head.head.weight"].shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
            text_dim=weights["text_embedding.0.weight"].shape[1],
            freq_dim=weights["time_embedding.0.weight"].shape[1],
            ffn_dim=weights["blocks.0.ffn.0.weight"].shape[0],
            num_layers=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        )
        transformer.load_state_dict(convert_wan_transformer_to_diffusers(weights))
    vae_weights, _ = _read(vae)
    with reading(vae, "the VAE of Wan 2.1 in the layout that ComfyUI takes", "use that of Wan 2.1"):
        autoencoder = AutoencoderKLWan(base_dim=vae_weights["decoder.head.0.gamma"].shape[0], z_dim=vae_weights["conv2.weight"].shape[0])
        autoencoder.load_state_dict(convert_wan_vae_to_diffusers(vae_weights))
    sensitive = transformer._keep_in_fp32_modules  # norms and the timestep embedding, by diffusers' own list
    for name, parameter in transformer.named_parameters():
        if not set(name.split(".")) & set(sensitive):
            parameter.data = parameter.data.to(dtype)
    return WanModel(transformer.to(device).eval().requires_grad_(False), autoencoder.to(device).eval().requires_grad_(False), device, dtype)


@contextmanager
def accelerated(transformer: Any, patch: AttentionPatch, scheduler: Any = None) -> Iterator[AttentionPatch]:
    """Give the self-attention of a WanTransformer3DModel to `patch` inside the `with` block; afterwards the module is as it was.

    scheduler: the pipeline's, whose schedule says which steps lie between start_percent and end_percent; every run over it (a new
    `set_timesteps`) begins a new report. Without one, begin each run with `patch.start`, as `sample` does. No forward is copied:
    diffusers' default attention processor ends in torch's scaled_dot_product_attention, and that one call is intercepted while this
    transformer runs.

    Raises ValueError for another class of model, and at its first call where the schedule is needed and not known.
    """
    classes = [cls.__name__ for cls in type(transformer).__mro__]
    if "WanTransformer3DModel" not in classes:
        raise ValueError(f"accelerated: transformer is a {classes[0]}; only WanTransformer3DModel of diffusers is supported, others in ComfyUI")
    original, before = transformer.forward, vars(transformer).get("forward")  # before: what another hook has put there
    timesteps = None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal timesteps
        arguments = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        if scheduler is not None and timesteps is not scheduler.timesteps:
            timesteps = scheduler.timesteps
            patch.start(*_schedule(timesteps))
        if not patch.knows_its_schedule:
            raise ValueError(
                "accelerated: start_percent, end_percent and gentle_few_steps need the noise schedule; pass the pipeline's scheduler, "
                "call patch.start before the run, or set them to 0, 1 and False"
            )
        spans = WAN.spans(SimpleNamespace(patch_size=transformer.config.patch_size), tuple(latents.shape), {})
        # Wan 2.2 5B gives a timestep for each token, 0 for what is given already.
        call = ModelCall(spans, float(arguments["timestep"].max()) / TRAIN_TIMESTEPS, text.data_ptr(), latents.device)
        patch.begin(call)
        patch.report.family = WAN.name
        with _Intercept(patch, call):
            out = original(*args, **kwargs)
        if patch.finish(call):
            with _Intercept(patch, patch.again(call)):
                out = original(*args, **kwargs)
        return out

    transformer.forward = _Forward(forward, transformer, before)
    try:
        yield patch
    finally:
        if before is None:
            del transformer.forward  # the class's own shows again
        else:
            transformer.forward = before
        patch.release()


class _Forward:
    """The forward of a transformer inside `accelerated`. A copy of the transformer has weights of its own and runs as diffusers runs it."""

    def __init__(self, forward: Callable[..., Any], transformer: Any, before: Any):
        self.forward, self.transformer, self.before = forward, transformer, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is None:
            return MethodType(type(self.transformer).forward, memo[id(self.transformer)])
        return deepcopy(self.before, memo)


def _schedule(timesteps: Tensor) -> tuple[Callable[[float], float], list[float]]:
    """(percent_to_sigma, sigmas) of a scheduler's decreasing timesteps: a step is an equal part of sampling, and the last one ends at 0."""
    sigmas = [*(float(timestep) / TRAIN_TIMESTEPS for timestep in timesteps), 0.0]

    def percent_to_sigma(percent: float) -> float:
        place = percent * (len(sigmas) - 1)
        step = min(int(place), len(sigmas) - 2)
        return sigmas[step] + (place - step) * (sigmas[step + 1] - sigmas[step])

    return percent_to_sigma, sigmas


@torch.inference_mode()
def sample(
    model: WanModel,
    positive: Tensor,
    negative: Tensor,
    *,
    width: int,
    height: int,
    frames: int,
    steps: int,
    cfg: float,
    shift: float,
    seed: int,
    patch: AttentionPatch | None = None,
) -> Tensor:
    """Euler flow matching with classifier-free guidance: final latents `(1, 16, 1 + (frames - 1) / 4, height / 8, width / 8)`.

    positive, negative: text embeddings `(1, words, text_dim)`. The latents are what the VAE decodes, as in ComfyUI's LATENT. The
    noise and the schedule are those of ComfyUI's KSampler with "euler", "simple" and ModelSamplingSD3 at the same seed and shift.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0 - step / steps for step in range(steps)], device=model.device)
    if patch is not None:
        patch.start(percent_to_sigma(shift), _schedule(scheduler.timesteps)[1])
    positive, negative = positive.to(model.device, model.dtype), negative.to(model.device, model.dtype)
    shape = (1, model.transformer.config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)
    for timestep in scheduler.timesteps:
        inputs = dict(hidden_states=latents.to(model.dtype), timestep=timestep.expand(1), return_dict=False)
        towards, away = (model.transformer(encoder_hidden_states=text, **inputs)[0].float() for text in (positive, negative))
        latents = scheduler.step(away + cfg * (towards - away), timestep, latents, return_dict=False)[0]
    mean, std = _statistics(model.vae, latents)
    return latents * std + mean


@torch.inference_mode()
def decode(model: WanModel, latents: Tensor) -> Tensor:
    """Latents of `sample` -> float32 video `(frames, height, width, 3)` in 0..1, on the CPU."""
    video: Tensor = model.vae.decode(latents, return_dict=False)[0]
    return (video[0].permute(1, 2, 3, 0).float() / 2 + 0.5).clamp(0, 1).cpu()


def percent_to_sigma(shift: float) -> Callable[[float], float]:
    """Percent of sampling (0..1) -> noise level, for a flow model at this shift."""
    return lambda percent: shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, `(1, channels, 1, 1, 1)`; the transformer works on whitened ones."""
    mean, std = (like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


class _Intercept(TorchFunctionMode):
    """While active, scaled_dot_product_attention goes to the patch."""

    def __init__(self, patch: AttentionPatch, call: ModelCall):
        super().__init__()
        self.patch = patch
        self.call = call

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        unsupported = "attention mask" if arguments.get("attn_mask") is not None or arguments.get("is_causal") else None
        return self.patch.attend(
            self.call,
            arguments["query"],
            arguments["key"],
            arguments["value"],
            lambda: function(*args, **kwargs),
            lambda out: out,
            unsupported=unsupported,
            scale=arguments.get("scale"),
        )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a safetensors file in float32, and the transformer's configuration from its metadata."""
    tensors, metadata = read_safetensors(file)
    with reading(file, "a model of which the metadata describe the transformer"):
        config = json.loads(metadata.get("config", "{}")).get("transformer", {})
    return {name: value.float() for name, value in tensors.items()}, config
