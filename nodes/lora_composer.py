"""Concept Region and LoRA Composer: several concept LoRAs in one picture, each in its box."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.weight_adapter import LoRAAdapter
from comfy_api.latest import io
from server import PromptServer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..models.patchers.lora_composer.composer import ALL, CROSS, Call, Composer, kind_of
from ..models.patchers.lora_composer.concepts import Box, Concept, Delta
from ..models.patchers.lora_composer.maps import Maps, Schedule, enhancement_loss, map_size, reinitialise
from .host import OVERRIDE, pause_malloc_graph

KEY = "tessera_lora_composer"
CATEGORY = "Tessera/compose"
Concepts = io.Custom("TESSERA_CONCEPTS")


@dataclass(frozen=True, eq=False)
class Region:
    """What Concept Region hands on: a model with a LoRA, a prompt `(1, tokens, width)`, the rows of it that name the concept, and a box."""

    model: Any
    context: Tensor
    words: tuple[int, ...]
    box: Box


class ConceptRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def pixels(name: str, default: int, tooltip: str) -> io.Input:
            return io.Int.Input(name, default=default, min=0, max=16384, step=8, tooltip=tooltip)

        return io.Schema(
            node_id="TesseraConceptRegion",
            display_name="Concept Region",
            category=CATEGORY,
            description="One concept of a picture: a LoRA, what it shows, and the box in which it shows it. Chain one node a concept.",
            search_aliases=["regional lora", "regional prompt", "multi lora", "character lora", "lora composer"],
            inputs=[
                io.Model.Input("model", tooltip="From a stock LoRA loader, which is connected to the model that goes into LoRA Composer."),
                io.Clip.Input("clip", tooltip="From the same LoRA loader."),
                io.String.Input("prompt", multiline=True, default="", tooltip="What is in the box. It replaces the picture's prompt there."),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The words of the prompt that name the concept, as they stand there; LoRA Composer looks where they are attended to. "
                    "Empty: the whole prompt.",
                ),
                pixels("x", 0, "Left edge of the box, in pixels of the picture."),
                pixels("y", 0, "Upper edge of the box, in pixels of the picture."),
                pixels("width", 512, "Width of the box, in pixels of the picture."),
                pixels("height", 512, "Height of the box, in pixels of the picture."),
                Concepts.Input("concepts", optional=True, tooltip="The concepts before this one."),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="For LoRA Composer, or for the next Concept Region.")],
        )

    @classmethod
    def execute(cls, model, clip, prompt, words, x, y, width, height, concepts=()) -> io.NodeOutput:
        tokens = clip.tokenize(prompt)
        context = clip.encode_from_tokens(tokens)
        return io.NodeOutput((*concepts, Region(model, context, _rows_of(clip, tokens, context.shape[1], words), Box(x, y, x + width, y + height))))


class LoRAComposer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TesseraLoRAComposer",
            display_name="LoRA Composer",
            category=CATEGORY,
            description="Several concept LoRAs in one picture, each in its box (LoRA-Composer, arXiv:2403.11627).",
            search_aliases=["regional lora", "multi lora", "multiple characters", "concept lora", "attention mask lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model without the concepts' LoRAs. It is cloned."),
                Concepts.Input("concepts", tooltip="From Concept Region."),
                io.Int.Input("width", default=1024, min=64, max=16384, step=8, tooltip="Width of the picture, in which the boxes lie."),
                io.Int.Input("height", default=512, min=64, max=16384, step=8, tooltip="Height of the picture."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures in the latent."),
                io.Boolean.Input("isolation", default=True, tooltip="Self-attention does not pass from one concept's box to another's."),
                io.Boolean.Input(
                    "reinitialise",
                    default=True,
                    tooltip="Start each box from that part of the noise in which its concept shows best. One more model call.",
                ),
                io.Float.Input(
                    "enhancement",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the gradient step that makes concepts appear and fill their boxes; 1 is the paper's. It carries most of the "
                    "paper's gain, and costs a forward and a backward pass a step in the first half of the steps. SD1.5 and SDXL; 0: off.",
                ),
                io.Combo.Input(
                    "layers",
                    options=[CROSS, ALL],
                    default=CROSS,
                    advanced=True,
                    tooltip="Which layers of the LoRAs take part. cross-attention: keys, values and output, as in the paper. all layers: every "
                    "linear layer, for the tokens of the box. Models without cross-attention (Flux, Qwen-Image) always take all.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The clone. Prompts for the sampler come from stock nodes."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the picture's size."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, concepts, width, height, batch_size, isolation, reinitialise, enhancement, layers) -> io.NodeOutput:
        network = _network(model)
        if kind_of(network) not in ("unet", None) and enhancement > 0:
            raise ValueError(f"model is a {type(network).__name__}, and enhancement is for SD1.5 and SDXL; set enhancement to 0")
        ready = [Concept(region.box, region.context, region.words, deltas_of(index, region.model, model)) for index, region in enumerate(concepts, 1)]
        composer = Composer(network, ready, (height, width), isolate=isolation, layers=layers, keep=pause_malloc_graph)
        patched = patch(model, composer, reinitialise, enhancement, cls.hidden.unique_id)
        form = model.get_model_object("latent_format")
        frames = (1,) if form.latent_dimensions == 3 else ()
        scale = getattr(form, "spacial_downscale_ratio", 8)
        samples = torch.zeros(batch_size, form.latent_channels, *frames, height // scale, width // scale, device=mm.intermediate_device())
        return io.NodeOutput(patched, {"samples": samples})


def _network(model: Any) -> Any:
    return model.model.diffusion_model


def _rows_of(clip: Any, tokens: dict[str, list], rows: int, words: str) -> tuple[int, ...]:
    """The rows of a prompt encoded in `rows` rows that hold `words`, each time they occur; of the whole prompt where there are none."""

    # The encoding is that of the first tokenizer (CLIP L or G) or, in Flux, of T5 alone.
    key = next((name for name in tokens if "t5" in name), next(iter(tokens)))

    def ids_of(chunk: list) -> list[Any]:
        return [entry[0] if isinstance(entry[0], int) else None for entry in chunk]  # None: an embedding

    def inner(ids: list[Any]) -> tuple[int, list[Any]]:
        """(where the text begins, its tokens): without what is there for an empty text too, start, template, end and padding."""
        same = next((place for place, (a, b) in enumerate(zip(ids, empty, strict=False)) if a != b), min(len(ids), len(empty)) - 1)
        return same, ids[same : next((place for place in range(same, len(ids)) if ids[place] == empty[same]), len(ids))]

    empty = ids_of(clip.tokenize("")[key][0])
    spellings = [inner(ids_of(clip.tokenize(text)[key][0]))[1] for text in (words, " " + words)] if words.strip() else []
    found: list[int] = []
    first = min(rows - sum(len(chunk) for chunk in tokens[key]), 0)  # encoders of chat models cut their template off
    for chunk in tokens[key]:
        start, ids = inner(ids_of(chunk))
        for wanted in spellings or [ids]:
            for place in range(len(ids) - len(wanted) + 1):
                if ids[place : place + len(wanted)] == wanted:
                    found += range(first + start + place, first + start + place + len(wanted))
        first += len(chunk)
    if not found:
        raise ValueError(f"words is {words!r}, which the prompt does not hold; write them as they stand there" if spellings else "prompt is empty")
    return tuple(dict.fromkeys(found))


def deltas_of(index: int, concept: Any, base: Any) -> dict[str, list[Delta]]:
    """What the LoRAs of patcher `concept` add to those of `base`, by the name of the linear layer. Raises ValueError where that is nothing."""
    if concept.model is not base.model:
        raise ValueError(f"concept {index}'s model is another one than model; connect its LoRA loader to the model that goes into LoRA Composer")
    if any(a is not b for key, known in base.patches.items() for a, b in itertools.zip_longest(known, concept.patches.get(key, [])[: len(known)])):
        raise ValueError(f"model has LoRAs that concept {index}'s model has not; connect its LoRA loader behind them, or remove them from model")
    out: dict[str, list[Delta]] = {}
    for key, patches in concept.patches.items():
        known = base.patches.get(key, [])
        added = patches[len(known) :]
        if not added or not key.endswith(".weight"):
            continue
        plain = [_plain(entry) for entry in added]
        found = [delta for delta in plain if delta is not None]
        if len(found) < len(plain):
            found = _whole(concept, base, key, patches)
        out[key.removeprefix("diffusion_model.").removesuffix(".weight")] = found
    if not out:
        raise ValueError(
            f"concept {index}'s LoRA adds nothing to the model: it belongs to another base, its strength is 0, or its loader is not a stock one"
        )
    return out


def _plain(entry: tuple) -> Delta | None:
    """The delta of an ordinary LoRA at one layer, as two small matrices; None for every other kind of patch."""
    strength, adapter, strength_model, offset, function = entry
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None or (offset is not None and offset[0] != 0):
        return None
    up, down, alpha, middle, dora, reshape = adapter.weights
    if any(part is not None for part in (middle, dora, reshape)):
        return None
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return Delta(up.flatten(1).float() * scale, down.flatten(1), 0 if offset is None else offset[1])


def _whole(concept: Any, base: Any, key: str, patches: list) -> list[Delta]:
    """The same as one matrix, by ComfyUI's own arithmetic on the unpatched weight; empty for what is no matrix."""
    weight = base.get_key_patches(key)[key][0][0]
    if weight.ndim != 2:
        return []
    weight = weight.float()
    before = comfy.lora.calculate_weight(base.patches.get(key, []), weight.clone(), key)
    return [Delta(comfy.lora.calculate_weight(patches, weight.clone(), key) - before)]


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
