"""How LoRA Composer is put into a ComfyUI model: its part of a sampling run, of a model call and of an attention call."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from server import PromptServer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..models.patchers.lora_composer.composer import Call, Composer
from ..models.patchers.lora_composer.latent import Schedule, enhancement_loss, reinitialise
from ..models.patchers.lora_composer.maps import Maps, map_size
from .host import OVERRIDE

KEY = "tessera_lora_composer"


def patch(model: Any, composer: Composer, reinitialise: bool, enhancement: float, node_id: str | None) -> Any:
    """A clone of `model` in which `composer` is at work."""
    patched = model.clone()
    host = _Host(composer, reinitialise, enhancement, node_id)
    for wrapper, method in (
        (WrappersMP.APPLY_MODEL, host.apply_model),
        (WrappersMP.CALC_COND_BATCH, host.calc_cond_batch),
        (WrappersMP.SAMPLER_SAMPLE, host.sampler_sample),
        (WrappersMP.PREDICT_NOISE, host.predict_noise),
    ):
        patched.remove_wrappers_with_key(wrapper, KEY)
        patched.add_wrapper_with_key(wrapper, KEY, method)
    patched.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, KEY)
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, host.cleanup)
    return patched


class _Host:
    """Connects a Composer to ComfyUI's sampling life cycle."""

    def __init__(self, composer: Composer, reinitialise: bool, enhancement: float, node_id: str | None):
        self.composer, self.reinitialise, self.enhancement, self.node_id = composer, reinitialise, enhancement, node_id
        self.schedule: Schedule | None = None
        self.maps: Maps | None = None
        self.seen = -1
        self.size: tuple[int, ...] | None = None  # of the run's latent
        self.overrides: dict[Any, Any] = {}

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """Once a sampling run, the model being loaded: the concepts choose their parts of the noise."""
        function = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "")
        if self.enhancement > 0 and (denoise_mask is not None or "unipc" in function):
            what = f"sampler {function}" if denoise_mask is None else "a latent with a noise mask"
            raise ValueError(f"LoRA Composer: enhancement moves the sampler's own latent, which {what} does not hand out; set enhancement to 0")
        self.schedule, self.seen = Schedule(len(sigmas) - 1, self.enhancement), -1
        self.composer.counts = dict.fromkeys(self.composer.counts, 0)
        self.size = tuple(noise.shape[-2:])
        if self.reinitialise:
            sampling = guider.inner_model.model_sampling
            x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise) if latent_image is None else latent_image, True)
            maps = self._maps(guider, x, sigmas[:1].to(x.device).expand(len(x)), extra_args["model_options"], with_self=False)
            noise = reinitialise(noise, maps, self.composer.concepts, self.composer.canvas)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    def predict_noise(self, executor, x, timestep, model_options, seed=None):
        """Before the first prediction of a step: the gradient step, on the sampler's own latent."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        found = (sigmas == timestep.flatten()[0].to(sigmas)).nonzero()
        step = int(found[0]) if len(found) else self.seen
        if self.schedule is not None and step > self.seen:
            self.seen = step
            size = self.schedule.size(step)
            if size > 0:
                self._enhance(executor.class_obj, x, timestep, model_options, step, size)
        return executor(x, timestep, model_options, seed)

    def _enhance(self, guider, x: Tensor, timestep: Tensor, model_options, step: int, size: float) -> None:
        with torch.inference_mode(False), torch.enable_grad(), _Differentiable():
            z = x.clone().requires_grad_(True)
            maps = self._maps(guider, z, timestep.clone(), model_options, with_self=True)
            loss = enhancement_loss(maps, self.composer.concepts, self.composer.canvas)
            (gradient,) = torch.autograd.grad(loss, z)
            value = float(loss.detach())
        # The paper's latent has variance 1 in all; ComfyUI's has the signal's scale, and its gradient the inverse.
        scale = guider.inner_model.model_sampling.calculate_input(timestep.flatten()[:1], torch.ones_like(x[:1, :1])).flatten()[0]
        x.sub_(gradient.to(x) * (size / scale**2))
        assert self.schedule is not None
        self.schedule.record(step, value)

    def _maps(self, guider, x: Tensor, sigma: Tensor, model_options, *, with_self: bool) -> Maps:
        """The attention maps of the prompt's forward at `x`."""
        self.maps = maps = Maps(map_size(self.composer.network, tuple(x.shape)), with_self)
        try:
            comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma, model_options)
        finally:
            self.maps = None
        return maps

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """In joint attention the concepts' prompts are part of the sequence of the prompt's forward alone, so each goes by itself."""
        if self.composer.kind != "joint":
            return executor(model, conds, x, timestep, model_options)
        return [executor(model, [cond if i == j else None for j, cond in enumerate(conds)], x, timestep, model_options)[i] for i in range(len(conds))]

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = dict(transformer_options or {})
        if "attn2" in options.get("patches_replace", {}):
            raise ValueError("LoRA Composer: another node replaces the model's cross-attention (such as IPAdapter); remove it")
        conditional = [entry == 0 for entry in options.get("cond_or_uncond", [0])]
        if self.size not in (None, tuple(x.shape[-2:])):
            raise ValueError("LoRA Composer: the model is called on a part of the picture; remove conditioning areas and context windows")
        before = dict(self.composer.counts)
        with self.composer.call(tuple(x.shape), c_crossattn, conditional, kwargs, self.maps) as call:
            text = c_crossattn
            if self.composer.kind == "joint":
                text = call.appended(c_crossattn)
                mask = kwargs.get("attention_mask")
                if mask is not None:
                    kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
            options |= {KEY: call, OVERRIDE: self._override(options.get(OVERRIDE))}
            out = executor(x, t, c_concat, text, control, options, **kwargs)
        done = {name: count - before[name] for name, count in self.composer.counts.items()}
        if not done["linear"]:
            raise RuntimeError("LoRA Composer: no layer of the model took part; remove the node that compiles or replaces it (TorchCompileModel)")
        if (self.composer.isolate or call.prompts) and not done["block mask"] + done["dense mask"]:
            raise RuntimeError("LoRA Composer: another node computes the model's self-attention; put LoRA Composer after it, or turn isolation off")
        return out

    def cleanup(self, patcher: Any) -> None:
        """After every sampling run, also a failed or interrupted one."""
        self.composer.release()
        schedule, self.schedule, self.size = self.schedule, None, None
        if schedule is None:
            return
        counts = self.composer.counts
        line = f"{len(self.composer.concepts)} concepts; cross-attention calls with regions {counts['injected']}; "
        line += f"self-attention isolated by blocks {counts['block mask']}, by a dense mask {counts['dense mask']}"
        if self.enhancement > 0 and not schedule.losses:
            line += "; no gradient step: the sampler calls the model at none of its sigmas"
        elif schedule.losses:
            line += f"; {len(schedule.losses)} gradient steps, loss {schedule.losses[0]:.2f} to {schedule.losses[-1]:.2f}"
        logging.info("Tessera: LoRA Composer: %s", line)
        if self.node_id is not None and getattr(PromptServer, "instance", None) is not None:
            PromptServer.instance.send_progress_text(line, self.node_id)

    def _override(self, previous):
        """Our override on top of `previous`. Cached, so that others see one function object."""
        if previous not in self.overrides:
            self.overrides[previous] = _make_override(previous)
        return self.overrides[previous]


def _make_override(previous):
    def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
        def host(mask: Tensor | None) -> Tensor:
            shape = dict(attn_precision=attn_precision, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
            if previous is None:
                return func(q, k, v, heads, mask=mask, **shape, **kwargs)
            return previous(func, q, k, v, heads, mask=mask, **shape, **kwargs)

        call: Call | None = (kwargs.get("transformer_options") or {}).get(KEY)
        if call is None or call.inside_cross:
            return host(mask)

        def split(x: Tensor) -> Tensor:
            return x if skip_reshape else x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2)

        def masked(bias: Tensor) -> Tensor:
            out = host(bias if mask is None else _both(bias, mask))
            if not skip_output_reshape:
                out = out.unflatten(-1, (heads, -1)).transpose(1, 2)
            return out

        out = call.attend(split(q), split(k), split(v), masked, kwargs.get("scale"), mask is None)
        if out is None:
            return host(mask)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    setattr(override, "chain", getattr(previous, "chain", ()))  # noqa: B010 (mypy knows no attributes of functions)
    return override


def _both(bias: Tensor, mask: Tensor) -> Tensor:
    """An additive mask `(tokens, tokens)` and the model's own (2 to 4 dimensions, boolean or additive), as ComfyUI reads them."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill_(~mask, float("-inf"))
    return bias + mask.to(bias.dtype)


class _Differentiable(TorchFunctionMode):
    """Autograd keeps no inference tensors, and ComfyUI's weights are such: every operation gets ordinary copies of them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Tensor, _ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


def _ordinary(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x
