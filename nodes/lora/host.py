"""How LoRA Composer is put into a ComfyUI model: its part of a sampling run, of a model call and of an attention call."""

from __future__ import annotations

import logging
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ...models.patchers.lora_composer.composer import Call, Composer
from ...models.patchers.lora_composer.latent import Schedule, enhancement_loss, reinitialise
from ...models.patchers.lora_composer.maps import Maps, map_size
from ..comfy import BOXES, OVERRIDE, Overrides, Wrapper, attached, say

KEY = "tessera_lora_composer"


def patch(model: Any, composer: Composer, reinitialise: bool, enhancement: float, node_id: str | None) -> Any:
    """A clone of `model` in which `composer` is at work."""
    host = _Host(composer, reinitialise, enhancement, node_id)
    wrappers: dict[str, Wrapper] = {
        WrappersMP.APPLY_MODEL: host.apply_model,
        WrappersMP.CALC_COND_BATCH: host.calc_cond_batch,
        WrappersMP.SAMPLER_SAMPLE: host.sampler_sample,
        WrappersMP.PREDICT_NOISE: host.predict_noise,
    }
    return attached(model, KEY, host, wrappers, {CallbacksMP.ON_CLEANUP: host.cleanup})


class _Host:
    """Connects a Composer to ComfyUI's sampling life cycle."""

    def __init__(self, composer: Composer, reinitialise: bool, enhancement: float, node_id: str | None):
        self.composer, self.reinitialise, self.enhancement, self.node_id = composer, reinitialise, enhancement, node_id
        self.schedule: Schedule | None = None
        self.maps: Maps | None = None
        self.seen = -1
        self.skipped = 0  # gradient steps without maps
        self.start = ""  # what became of the noise
        self.size: tuple[int, ...] | None = None  # of the run's latent
        self.prompts: set[Any] = set()  # the ids of the conditionings that the concepts take part in
        self.overrides = Overrides(_override)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Any:
        """Once a sampling run, the model being loaded: the concepts choose their parts of the noise."""
        if BOXES in extra_args["model_options"].get("transformer_options", {}):
            raise ValueError(
                "LoRA Composer: Region Layers makes the latent a strip of layers, in which the boxes have no place; remove one of the two"
            )
        function = getattr(getattr(executor.class_obj, "sampler_function", None), "__name__", "")
        if self.enhancement > 0 and (denoise_mask is not None or "unipc" in function):
            what = f"sampler {function}" if denoise_mask is None else "a latent with a noise mask"
            raise ValueError(f"LoRA Composer: enhancement moves the sampler's own latent, which {what} does not hand out; set enhancement to 0")
        self.composer.check(tuple(noise.shape), self.reinitialise or self.enhancement > 0)
        self.schedule, self.seen, self.skipped, self.start = Schedule(len(sigmas) - 1, self.enhancement, len(noise)), -1, 0, ""
        self.composer.counts = dict.fromkeys(self.composer.counts, 0)
        self.size = tuple(noise.shape[-2:])
        self.prompts = {cond["uuid"] for name in ("positive", "middle") for cond in guider.conds.get(name, ())}
        if self.reinitialise:
            noise = self._reinitialise(guider, sigmas, extra_args["model_options"], noise, latent_image)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    def _reinitialise(self, guider: Any, sigmas: Tensor, model_options: Any, noise: Tensor, latent_image: Tensor | None) -> Tensor:
        if not noise.any():  # a later stage, which goes on with the latent of the one before
            self.start = "not re-initialised: there is no noise"
            return noise
        sampling = guider.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise) if latent_image is None else latent_image, True)
        maps = self._maps(guider, x, sigmas[:1].to(x.device).expand(len(x)), model_options, with_self=False)
        if not maps.complete:
            self.start = "not re-initialised: the prompt is not in force at the first step"
            return noise
        return reinitialise(noise, maps, self.composer.concepts, self.composer.canvas)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any, seed: Any = None) -> Any:
        """Before the first prediction of a step: the gradient step, on the sampler's own latent."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        found = (sigmas == timestep.flatten()[0].to(sigmas)).nonzero()
        step = int(found[0]) if len(found) else self.seen
        assert self.schedule is not None
        if step > self.seen:
            self.seen = step
            size = self.schedule.size(step)
            if size > 0:
                self._enhance(executor.class_obj, x, timestep, model_options, step, size)
        return executor(x, timestep, model_options, seed)

    def _enhance(self, guider: Any, x: Tensor, timestep: Tensor, model_options: Any, step: int, size: float) -> None:
        with torch.inference_mode(False), torch.enable_grad(), _Differentiable():
            z = x.clone().requires_grad_(True)
            maps = self._maps(guider, z, timestep.clone(), model_options, with_self=True)
            if not maps.complete:
                self.skipped += 1
                return
            losses = enhancement_loss(maps, self.composer.concepts, self.composer.canvas)
            (gradient,) = torch.autograd.grad(losses.sum(), z)
        # The paper's latent has variance 1 in all; ComfyUI's has the signal's scale, and its gradient the inverse.
        scale = guider.inner_model.model_sampling.calculate_input(timestep.flatten()[:1], torch.ones_like(x[:1, :1])).flatten()[0]
        assert self.schedule is not None
        moving = self.schedule.record(step, losses.detach().cpu()).to(x)
        x.sub_(gradient.to(x) * (size / scale**2) * moving.view(-1, *[1] * (x.ndim - 1)))

    def _maps(self, guider: Any, x: Tensor, sigma: Tensor, model_options: Any, *, with_self: bool) -> Maps:
        """The attention maps of the prompt's forwards at `x`."""
        self.maps = maps = Maps(map_size(self.composer.network, tuple(x.shape)), with_self)
        try:
            comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds["positive"]], x, sigma, model_options)
        finally:
            self.maps = None
        return maps

    def calc_cond_batch(self, executor: Any, model: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Any) -> Any:
        """In joint attention the concepts' prompts are part of the sequence of the prompt's forward alone, so each goes by itself."""
        if self.composer.kind != "joint":
            return executor(model, conds, x, timestep, model_options)
        return [executor(model, [cond if i == j else None for j, cond in enumerate(conds)], x, timestep, model_options)[i] for i in range(len(conds))]

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        replaced = options.get("patches_replace", {})
        if "attn2" in replaced:
            raise ValueError("LoRA Composer: another node replaces the model's cross-attention (such as IPAdapter); remove it")
        if self.size not in (None, tuple(x.shape[-2:])):
            raise ValueError("LoRA Composer: the model is called on a part of the picture; remove conditioning areas and context windows")
        if "uuids" in options:
            conditional = [uuid in self.prompts for uuid in options["uuids"]]
        else:  # not called by a guider, whose first list is then the prompt's
            conditional = [entry == 0 for entry in options.get("cond_or_uncond", [0])]
        counts = self.composer.counts
        before = dict(counts)
        with self.composer.call(tuple(x.shape), c_crossattn, conditional, kwargs, self.maps) as call:
            text = c_crossattn
            if self.composer.kind == "joint":
                text = call.appended(c_crossattn)
                mask = kwargs.get("attention_mask")
                if mask is not None:
                    kwargs["attention_mask"] = _for_prompts(mask, c_crossattn.shape[1], text.shape[1] - c_crossattn.shape[1])
            options |= {KEY: call, OVERRIDE: self.overrides[options.get(OVERRIDE)]}
            out = executor(x, t, c_concat, text, control, options, **kwargs)
        if not call.reached:
            raise RuntimeError("LoRA Composer: no layer of the model took part; remove the node that compiles or replaces it (TorchCompileModel)")
        if any(conditional) and counts["linear"] == before["linear"]:
            raise ValueError("LoRA Composer: the LoRAs change no layer that works on tokens of picture or text; use LoRAs of another kind")
        if self.composer.isolate or call.prompts:
            missed = call.self_attentions + sum(before[way] - counts[way] for way in ("block mask", "dense mask"))
            if missed > 0 and "attn1" not in replaced:
                raise RuntimeError(
                    f"LoRA Composer: another node computes {missed} of {call.self_attentions} self-attention calls; remove it (ToMe, HyperTile), "
                    "put LoRA Composer after it (Sparse Attention), or turn isolation off"
                )
            counts["replaced"] += missed
        return out

    def cleanup(self, patcher: Any) -> None:
        """After every sampling run, also a failed or interrupted one."""
        self.composer.release()
        schedule, self.schedule, self.size = self.schedule, None, None
        if schedule is None:
            return
        counts = self.composer.counts
        parts = [f"{len(self.composer.concepts)} concepts", f"cross-attention calls with regions {counts['injected']}"]
        blocks = f"{counts['block mask']}"
        if counts["block mask"]:
            blocks += f" ({counts['block density'] / counts['block mask']:.0%} of the block pairs computed)"
        parts.append(f"self-attention isolated by blocks {blocks}, by a dense mask {counts['dense mask']}")
        if counts["replaced"]:
            parts.append(f"{counts['replaced']} calls replaced by another node and not isolated")
        if self.start:
            parts.append(self.start)
        if schedule.losses:
            first, last = (float(losses.mean()) for losses in (schedule.losses[0], schedule.losses[-1]))
            parts.append(f"{len(schedule.losses)} gradient steps, loss {first:.2f} to {last:.2f}")
        elif self.enhancement > 0 and not self.skipped:
            parts.append("no gradient step: the sampler calls the model at none of its sigmas")
        if self.skipped:
            parts.append(f"{self.skipped} gradient steps left out for want of maps: no prompt in force, or self-attention of another node")
        line = "; ".join(parts)
        logging.info("Tessera: LoRA Composer: %s", line)
        say(self.node_id, line)


def _override(inner: Wrapper) -> Wrapper:
    def override(
        func: Wrapper,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Any:
        def host(mask: Tensor | None) -> Any:
            shape = dict(attn_precision=attn_precision, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
            return inner(func, q, k, v, heads, mask=mask, **shape, **kwargs)

        call: Call | None = (kwargs.get("transformer_options") or {}).get(KEY)
        if call is None or call.inside_cross:
            return host(mask)

        def split(x: Tensor) -> Tensor:
            return x if skip_reshape else x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2)

        def masked(bias: Tensor) -> Tensor:
            out: Tensor = host(bias if mask is None else _both(bias, mask))
            if not skip_output_reshape:
                out = out.unflatten(-1, (heads, -1)).transpose(1, 2)
            return out

        out = call.attend(split(q), split(k), split(v), masked, kwargs.get("scale"), mask is None)
        if out is None:
            return host(mask)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def _both(bias: Tensor, mask: Tensor) -> Tensor:
    """An additive mask `(tokens, tokens)` and the model's own (2 to 4 dimensions, boolean or additive), as ComfyUI reads them."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill_(~mask, float("-inf"))
    return bias + mask.to(bias.dtype)


def _for_prompts(mask: Tensor, text: int, more: int) -> Tensor:
    """The model's own mask with `more` prompt tokens behind its `text` tokens: a mask of the text's keys, or additive over all tokens (Redux)."""
    if mask.shape[-1] == text:
        return torch.nn.functional.pad(mask, (0, more), value=1)
    places = torch.arange(mask.shape[-1], device=mask.device)
    places = torch.cat([places[:text], places.new_full((more,), len(places)), places[text:]])
    return torch.nn.functional.pad(mask, (0, 1, 0, 1))[..., places, :][..., places]


class _Differentiable(TorchFunctionMode):
    """Autograd keeps no inference tensors, and ComfyUI's weights are such: every operation gets ordinary copies of them.

    ComfyUI adds a ControlNet's output in place, to a tensor that autograd has saved: `+=` makes a new one here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _ordinary, (args, kwargs or {}))
        return Tensor.add(*args, **kwargs).to(args[0]) if func is Tensor.add_ else func(*args, **kwargs)


def _ordinary(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x
