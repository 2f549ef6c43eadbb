"""How ART's anonymous regions are put into stock Flux, Qwen-Image and Wan models, by hooks alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.model_base import LongCatImage
from comfy.model_sampling import ModelSamplingFlux
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...models.layers.regions import LAYER_SPACING, PATCH, Regions, positions
from ..comfy import BOXES, Wrapper, attached, network_in

KEY = "tessera_regions"  # of the hooks; of a latent's regions, too: samplers pass on what they do not know
CHANNELS = 16  # of the latents of the Wan models that regions are for
# Of a condition: what is laid over the picture, or joined to its tokens, at places that a strip of regions has not.
UNUSABLE = ("control", "area", "mask", "gligen", "concat_latent_image", "time_dim_concat", "context_latents")


def network_of(model: Any) -> Any:
    """The transformer of a model that regions are for. Raises ValueError for another."""
    network = network_in(model.model)
    if type(network) is WanModel:
        plain = network.model_type == "t2v" and network.ref_conv is None and network.in_dim == network.out_dim == CHANNELS
        fits = plain and tuple(network.patch_size) == (1, PATCH, PATCH)
    else:
        known = isinstance(network, Flux | QwenImageTransformer2DModel) and not isinstance(model.model, LongCatImage)  # it moves Flux's positions
        fits = known and network.patch_size == PATCH and len(network.pe_embedder.axes_dim) == 3
    if not fits:
        name = type(model.model if isinstance(network, Flux) else network).__name__
        raise ValueError(f"model is {name}, and regions are for Flux.1, Qwen-Image and Wan text-to-video (2.1, 2.2 14B); load one of those")
    return network


def patch_regions(model: Any, regions: Regions, embedding: Tensor | None, shift: float | None) -> Any:
    """A clone of `model` that samples latents of `regions`, and nothing else. shift: of Flux's schedule; None leaves the model's own.

    embedding: `(layers, width)` of a Flux, Qwen-Image or Wan text-to-video transformer, or None. Raises ValueError for another model, and for
    clips where the model makes pictures.
    """
    network = network_of(model)
    if regions.frames > 1 and not isinstance(network, WanModel):
        raise ValueError(f"frames is more than 1, and model is {type(network).__name__}, which makes pictures; set frames to 1, or load a Wan model")
    hook = _Regions(regions, embedding, network)
    wrappers: dict[str, Wrapper] = {WrappersMP.OUTER_SAMPLE: hook.outer_sample}
    if hook.video:
        wrappers[WrappersMP.DIFFUSION_MODEL] = hook.diffusion_model
    patched = attached(model, KEY, hook, wrappers)
    if not hook.video:
        patches = patched.model_options["transformer_options"].setdefault("patches", {})
        others = [patch for patch in patches.get("post_input", ()) if not isinstance(getattr(patch, "__self__", None), _Regions)]
        patches["post_input"] = [*others, hook.post_input]
    patched.model_options["transformer_options"][BOXES] = tuple((regions.frames, height, width) for _, _, width, height in regions.boxes)
    sampling = model.get_model_object("model_sampling")
    if shift is not None and isinstance(sampling, ModelSamplingFlux):  # a distilled model's fixed schedule stays
        sampling = type(sampling)(model.model.model_config)
        sampling.set_parameters(shift=shift)
        patched.add_object_patch("model_sampling", sampling)
    return patched


class _Regions:
    """Sampling happens on a strip of the tokens inside the boxes, which to the model is a picture one token high, of one frame.

    Noise, latent and mask are cropped before sampling and the result is put back after it, so that samplers, memory estimates and every other
    patch see as many tokens as there are. The strip's positions are replaced by the true ones after the patch embedding.
    """

    def __init__(self, regions: Regions, embedding: Tensor | None, network: Any):
        self.regions, self.embedding = regions, embedding
        self.video, self.centred = isinstance(network, WanModel), isinstance(network, QwenImageTransformer2DModel)
        self.framed = self.video or self.centred  # whether latents have an axis of frames

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        *rest: Any,
        latent_shapes: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        regions = self.regions
        if not regions.fits(latent_image, PATCH):
            wanted = (*latent_image.shape[:2], *regions.latent(PATCH))
            raise ValueError(
                f"latent_image is {tuple(latent_image.shape)}, and the model's regions need {wanted}; use model and latent of one Region Layers node"
            )
        conds = [cond for group in executor.class_obj.conds.values() for cond in group]
        names = (*UNUSABLE, "reference_latents") if self.video else UNUSABLE
        unusable = [name for name in names if any(cond.get(name) is not None for cond in conds)]
        if unusable:
            raise ValueError(
                f"the conditioning has {', '.join(unusable)}, which know nothing of regions; leave them out, the boxes say what is where"
            )

        def strip(x: Tensor) -> Tensor:
            x = regions.crop(x, PATCH)
            return x.unsqueeze(2) if self.framed else x

        def whole(x: Tensor, around: Tensor) -> Tensor:
            return regions.scatter(x.squeeze(2) if self.framed else x, around, PATCH)

        in_model_space = executor.class_obj.model_patcher.model.process_latent_in(latent_image)  # as what samplers show is

        def shown(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            layers = whole(denoised, in_model_space)
            if self.framed:
                callback(step, layers, x, total)
                return
            # The previewers of a picture model read one picture, and SamplerCustomAdvanced keeps the tensor that it is given here as its
            # denoised_output: it is the merged picture while it is shown, and all layers from then on.
            picture = layers[:, :, 0].clone()
            callback(step, picture, x, total)
            picture.data = layers

        cropped = strip(latent_image)
        if denoise_mask is not None:
            denoise_mask = strip(denoise_mask)
        watched = None if callback is None else shown
        shapes = None if latent_shapes is None else [cropped.shape]
        sampled = executor(strip(noise), cropped, sampler, sigmas, denoise_mask, watched, *rest, latent_shapes=shapes, **kwargs)
        return whole(sampled, latent_image)

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """Positions and layer embeddings of the region tokens, which are the first of `img`; reference pictures follow.

        Core counts reference pictures from 1, as regions count layers: they are counted from the last layer on. Negative numbers stay.
        """
        regions, img, img_ids = self.regions, args["img"], args["img_ids"].clone()
        tokens = img.shape[1] - sum(args["transformer_options"].get("reference_image_num_tokens", ()))
        self._check(tokens)
        ids = positions(regions, 1).to(img_ids)
        if self.centred:  # Qwen-Image counts rows and columns from the middle, and its text from the middle of the longer side
            ids = ids - ids.new_tensor([0, regions.height // 2, regions.width // 2])
            start = max(regions.height // 2, regions.width // 2)
            text = args["txt_ids"]
            args = {**args, "txt_ids": torch.arange(start, start + text.shape[1], device=text.device).to(text)[None, :, None].expand_as(text)}
        img_ids[:, : regions.tokens] = ids
        numbers = img_ids[:, regions.tokens :, 0]
        numbers[numbers >= 1] += len(regions.boxes) - 1
        if self.embedding is not None:
            img = torch.cat([img[:, : regions.tokens] + self._embedded(img), img[:, regions.tokens :]], 1)
        return {**args, "img": img, "img_ids": img_ids}

    def diffusion_model(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Any,
        clip_fea: Any = None,
        time_dim_concat: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A call of Wan, which has no patch after its patch embedding: every block gets the true positions, the first one the embeddings."""
        network = executor.class_obj
        rope = network.rope_embedder(positions(self.regions, LAYER_SPACING)[None].to(x.device, torch.float32)).movedim(1, 2)
        options = transformer_options or {}
        replaced = options.get("patches_replace", {})
        blocks = replaced.get("dit", {})
        names = [("double_block", index) for index in range(len(network.blocks))]
        ours = {name: partial(self._block, rope, name == names[0], blocks.get(name)) for name in names}
        options = {**options, "patches_replace": {**replaced, "dit": {**blocks, **ours}}}
        return executor(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _block(self, rope: Tensor, first: bool, previous: Wrapper | None, args: dict[str, Any], extra: dict[str, Any]) -> Any:
        img = args["img"]
        if first:
            self._check(img.shape[1])
            img = img if self.embedding is None else img + self._embedded(img)
        args = {**args, "img": img, "pe": rope.to(args["pe"])}
        return extra["original_block"](args) if previous is None else previous(args, extra)

    def _embedded(self, img: Tensor) -> Tensor:
        """`(tokens, width)`: what is added to `img`'s region tokens."""
        assert self.embedding is not None
        return self.embedding.to(img)[self.regions.ids[:, 0].to(img.device)]

    def _check(self, tokens: int) -> None:
        if tokens != self.regions.tokens:
            raise ValueError(
                f"the model got {tokens} picture tokens and its regions have {self.regions.tokens}; "
                "give the model of Region Layers to a sampler, not to a node that tiles or adds frames"
            )
