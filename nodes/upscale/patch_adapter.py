"""Load Patch Adapter, and how an adapter takes part in the forward of a stock model."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...models.upscale.patch_adapter import Config, PatchAdapter, Window, load
from ...models.upscale.tiling import last
from ..comfy import OVERRIDE, Kind, Overrides, Wrapper, custom, network_in

FOLDER = "patch_adapters"
KEY = "tessera_patch_adapter"


@dataclass(frozen=True)
class LoadedAdapter:
    """patcher: ComfyUI's patcher around the PatchAdapter. lora: tensors by the base module's name."""

    name: str
    config: Config
    patcher: Any
    lora: dict[str, Tensor]


Adapter = custom("TESSERA_PATCH_ADAPTER", Kind(lambda value: isinstance(value, LoadedAdapter), "a patch adapter", "connect Load Patch Adapter"))


class LoadPatchAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TesseraLoadPatchAdapter",
            display_name="Load Patch Adapter",
            category="Tessera/upscale",
            description="Loads a patch adapter: what makes a video model upscale in windows that know the window's own content and the whole clip.",
            search_aliases=["patchvsr", "video super resolution", "upscale adapter"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip=f"From models/{FOLDER}. An adapter belongs to one base model; tessera_shapes belongs to the built-in tessera_shapes_t2v.",
                )
            ],
            outputs=[Adapter.Output(display_name="adapter", tooltip="For Patch Upscale Video (diffusion).")],
        )

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        config, state, lora = load(folder_paths.get_full_path_or_raise(FOLDER, adapter_name))
        device = mm.get_torch_device()
        dtype = mm.unet_dtype(device, sum(value.numel() for value in state.values()), [torch.bfloat16, torch.float32])
        network = PatchAdapter(config, comfy.ops.manual_cast, dtype=dtype).eval()
        network.load_state_dict(state)
        patcher = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=mm.unet_offload_device())
        return io.NodeOutput(LoadedAdapter(adapter_name, config, patcher, lora))


def adapted(model: Any, adapter: LoadedAdapter) -> Any:
    """A clone of `model` with the adapter's LoRA, which loads the adapter when it is loaded. Raises ValueError where they do not fit."""
    network = network_in(model.model)
    blocks = getattr(network, "blocks", ())
    if not all(hasattr(block, "cross_attn") for block in blocks) or not len(blocks):
        raise ValueError(f"adapter {adapter.name} is for models of the Wan family, and model is {type(network).__name__}; leave the adapter out")
    wanted, found = (adapter.config.layers, adapter.config.dim, adapter.config.channels), (len(blocks), network.dim, network.in_dim)
    if wanted != found:
        raise ValueError(
            f"adapter {adapter.name} is for a model of {wanted} blocks, width and channels, and model has {found}; use its own base model"
        )
    lora = {f"diffusion_model.{name}": value for name, value in adapter.lora.items()}
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    patched.set_additional_models(KEY, [adapter.patcher])
    return patched


class PatchGuide:
    """The adapter at work on one clip.

    enlarged: `(batch, channels, frames, height, width)` the enlarged clip's latent, normalised for the model. whole: the clip's latent at the
    adapter's native size. augmentation: share of noise in what the patch branch sees; seed: of that noise. factor: times enlarged.
    """

    def __init__(self, adapter: LoadedAdapter, enlarged: Tensor, whole: Tensor, augmentation: float, factor: float, seed: int):
        self.network: PatchAdapter = adapter.patcher.model
        noise = torch.randn(enlarged.shape, generator=torch.Generator().manual_seed(seed ^ 0x5EED)).to(enlarged)
        self.patch = torch.lerp(enlarged, noise, augmentation)
        self.whole, self.augmentation, self.factor = whole, augmentation, factor
        self.views: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        self.overrides = Overrides(_override)  # one function for all windows and steps, which others may keep

    def options(self, options: dict[str, Any], window: tuple[slice, ...], sigma: Tensor) -> dict[str, Any]:
        """Transformer options with which the model denoises one window: (time, height, width) of the latent, at noise levels `(batch,)`."""
        call = _Call(self, window, sigma)
        replaced = options.get("patches_replace", {})
        blocks = replaced.get("dit", {})
        ours = {
            ("double_block", index): partial(call.block, index, blocks.get(("double_block", index))) for index in range(self.network.config.layers)
        }
        override = self.overrides[options.get(OVERRIDE)]
        return {**options, "patches_replace": {**replaced, "dit": {**blocks, **ours}}, OVERRIDE: override, KEY: call}

    def window(self, window: tuple[slice, ...]) -> Window:
        height, width = self.patch.shape[-2:]
        return Window(window[1].start / height, window[2].start / width, window[1].stop / height, window[2].stop / width)


@dataclass
class _Call:
    """One forward of the model on one window."""

    guide: PatchGuide
    slices: tuple[slice, ...]
    sigma: Tensor
    hints: list[Tensor] = field(default_factory=list)
    view: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    layer: int = 0
    attentions: int = 0

    def block(self, index: int, previous: Wrapper | None, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        stream = args["img"]
        if not self.hints:
            self._read(stream)
        self.layer, self.attentions = index, 0
        out = extra["original_block"](args) if previous is None else previous(args, extra)
        hint = self.hints[index]
        if hint.shape[1] != stream.shape[1]:
            raise ValueError(
                f"Patch Upscale Video: the model has {stream.shape[1]} tokens in a window where the adapter has {hint.shape[1]}; "
                "leave out reference pictures and other conditions that add tokens"
            )
        return {**out, "img": out["img"] + _as_many(hint, stream)}

    def _read(self, stream: Tensor) -> None:
        guide, batch = self.guide, self.guide.patch.shape[0]
        patch = guide.patch[last(self.slices)].to(stream.device, stream.dtype)
        windows = [guide.window(self.slices)] * batch
        sigma, augmentation, factor = (
            torch.as_tensor(value, device=stream.device, dtype=torch.float32).expand(batch)
            for value in (self.sigma, guide.augmentation, guide.factor)
        )
        self.hints = guide.network.hints(patch, sigma, augmentation, factor, windows)
        key = (tuple((part.start, part.stop) for part in self.slices), stream.dtype)
        if key not in guide.views:
            guide.views[key] = guide.network.view(guide.whole[:, :, self.slices[0]].to(stream.device, stream.dtype), windows)
        self.view = guide.views[key]


def _as_many(x: Tensor, like: Tensor) -> Tensor:
    """Conditional and unconditional share a batch: the clip's samples are repeated for each."""
    return x.repeat(like.shape[0] // x.shape[0], *(1,) * (x.ndim - 1))


def _override(inner: Wrapper) -> Wrapper:
    """Attention that lets the text cross-attention, the second call of a block, also attend to the global view."""

    def override(func: Wrapper, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, transformer_options: Any = None, **kwargs: Any) -> Any:
        arguments = {**kwargs, "transformer_options": transformer_options}
        out = inner(func, q, k, v, heads, *args, **arguments)
        call = None if transformer_options is None else transformer_options.get(KEY)
        if call is None:
            return out
        call.attentions += 1
        if call.attentions != 2:
            return out
        k, v = (_as_many(part, q) for part in call.view[call.layer])
        return out + func(q, k, v, heads)

    return override
