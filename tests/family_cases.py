"""The DiT families on tiny random models of ComfyUI's own, each with what it is sampled with. comfy_families.py runs them in ComfyUI's Python.

Read without ComfyUI, too, for the names: `comfy` is imported by the functions that make the models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """family: its name in FAMILIES. make: a model, as a loader gives it. conditioning: positive and negative. shape: of the latent, long enough
    that half of the blocks that a method chooses is 0.5 to 0.8 of all."""

    family: str
    make: Callable[[], Any]
    conditioning: list
    shape: tuple[int, ...]


def operations():
    import comfy.ops

    return dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def random_weights(network):
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(network.state_dict().items()):
        with torch.no_grad():
            if tensor.ndim >= 2 and not name.endswith(("modulation", "scale_shift_table")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
            elif name.endswith("bias") or tensor.ndim >= 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            else:
                tensor.fill_(1.0)
    return network.state_dict()


def load(state, config):
    """Through ComfyUI's own detection; `config` adds what detection reads from metadata or (Qwen) fixes at full size."""
    import comfy.model_detection as detection
    import comfy.sd

    detect = detection.detect_unet_config

    def with_config(state_dict, prefix, metadata=None):
        found = detect(state_dict, prefix, metadata=metadata)
        return None if found is None else {**found, **config}

    detection.detect_unet_config = with_config
    try:
        return comfy.sd.load_diffusion_model_state_dict(state)
    finally:
        detection.detect_unet_config = detect


def wan(in_dim=16, model_type="t2v"):
    from comfy.ldm.wan.model import WanModel

    sizes = dict(dim=128, ffn_dim=256, text_dim=64, num_heads=2, num_layers=3)
    return load(random_weights(WanModel(model_type=model_type, in_dim=in_dim, freq_dim=256, out_dim=16, **sizes, **operations())), sizes)


def flux():
    from comfy.ldm.flux.model import Flux

    sizes = dict(vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2)
    fixed = dict(axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[])
    network = Flux(image_model="flux", in_channels=16, out_channels=16, mlp_ratio=4.0, **sizes, **fixed, **operations())
    return load(random_weights(network), sizes)


def hunyuan_video():
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    sizes = dict(vec_in_dim=768, context_in_dim=64, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
    fixed = dict(axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, vision_in_dim=None)
    flags = dict(use_cond_type_embedding=False, meanflow_sum=False, patch_size=[1, 2, 2])
    network = HunyuanVideo(image_model="hunyuan_video", in_channels=16, out_channels=16, mlp_ratio=4.0, **sizes, **fixed, **flags, **operations())
    return load(random_weights(network), sizes)


def qwen_image(**layered):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    sizes = dict(num_attention_heads=1, joint_attention_dim=64, num_layers=2)
    return load(random_weights(QwenImageTransformer2DModel(image_model="qwen_image", in_channels=64, **sizes, **layered, **operations())), sizes)


def qwen_image_layered():
    """ComfyUI tells it by its second time embedding, and numbers reference latents -1, -2 ..."""
    model = qwen_image(use_additional_t_cond=True)
    network = model.model.diffusion_model
    assert network.time_text_embed.use_additional_t_cond and network.default_ref_method == "negative_index"
    return model


def ltx_video():
    from comfy.ldm.lightricks.model import LTXVModel

    sizes = dict(in_channels=128, cross_attention_dim=128, attention_head_dim=64, num_attention_heads=2, caption_channels=64, num_layers=2)
    return load(random_weights(LTXVModel(image_model="ltxv", **sizes, **operations())), sizes)


def conditioning(tokens, pooled=None, **extra):
    generator = torch.Generator().manual_seed(tokens)
    pooled = None if pooled is None else torch.randn(1, pooled, generator=generator)
    return [[torch.randn(1, tokens, 64, generator=generator), {"pooled_output": pooled, **extra}]]


VIDEO = (1, 16, 5, 16, 12)
IMAGE = (1, 16, 24, 20)
LAYERS = (1, 16, 7, 16, 12)  # the merged picture and six layers
REFERENCE = [torch.zeros(1, 16, 8, 12)]
CASES = {
    "wan t2v": Case("Wan", wan, conditioning(20), VIDEO),
    "wan t2v, odd size": Case("Wan", wan, conditioning(20), (1, 16, 4, 17, 13)),
    "wan i2v": Case(
        "Wan",
        lambda: wan(36, "i2v"),
        conditioning(20, concat_latent_image=torch.zeros(VIDEO), concat_mask=torch.ones(1, 1, *VIDEO[2:]), clip_vision_output=None),
        VIDEO,
    ),
    "hunyuan video": Case("HunyuanVideo", hunyuan_video, conditioning(16, 768, guidance=6.0), VIDEO),
    "flux": Case("Flux", flux, conditioning(16, 64, guidance=3.5), IMAGE),
    "flux with reference": Case("Flux", flux, conditioning(16, 64, guidance=3.5, reference_latents=REFERENCE), IMAGE),
    "qwen image": Case("Qwen-Image", qwen_image, conditioning(12), IMAGE),
    "qwen image with reference": Case("Qwen-Image", qwen_image, conditioning(12, reference_latents=[torch.zeros(1, 16, 1, 8, 12)]), IMAGE),
    "qwen image layered": Case("Qwen-Image", qwen_image_layered, conditioning(12), LAYERS),
    "qwen image layered with reference": Case(
        "Qwen-Image", qwen_image_layered, conditioning(12, reference_latents=[torch.zeros(1, 16, 1, 16, 12)]), LAYERS
    ),
    "qwen image layered with references, odd size": Case(
        "Qwen-Image",
        qwen_image_layered,
        conditioning(12, reference_latents=[torch.zeros(1, 16, 1, 17, 13), torch.zeros(1, 16, 1, 5, 7)]),
        (1, 16, 7, 17, 13),
    ),
    "ltx video": Case("LTX-Video", ltx_video, conditioning(16, frame_rate=25, attention_mask=torch.ones(1, 16, dtype=torch.long)), (1, 128, 4, 8, 9)),
}
