"""Random weights in the layout of the default model files, so that loaders, samplers and servers run before and without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

DIFFUSION_MODEL = "tessera_shapes_t2v.safetensors"
VAE = "tessera_shapes_vae.safetensors"
PATCH_ADAPTER = "tiny_patch_adapter.safetensors"
LAYERED = "tiny_qwen_image_layered.safetensors"
LAYERED_VAE = "tiny_qwen_image_layered_vae.safetensors"
LAYERS = "tessera_layers.safetensors"
LAYERS_VAE = "tessera_layers_vae.safetensors"


def write_models(folder: Path, *, layers: int = 2, heads: int = 3) -> Path:
    """Write diffusion_models/, vae/, patch_adapters/, layer_embeddings/ and transparent_decoders/ under `folder`, in ComfyUI's layout.

    head_dim is 64 as in the default weights.
    """
    from tessera.models.default import networks
    from tessera.models.layers.transparent_vae import TransparentDecoder, published
    from tessera.models.upscale.patch_adapter import Config, PatchAdapter, metadata

    transformer = _randomise(networks.build_transformer(dim=64 * heads, heads=heads, layers=layers, ffn=192 * heads), seed=1)
    vae = _randomise(networks.build_vae(), seed=2)
    for name in (DIFFUSION_MODEL, LAYERS):
        _write(folder / "diffusion_models" / name, transformer, {"config": json.dumps({"transformer": {"text_dim": 64, "num_heads": heads}})})
    for name in (VAE, LAYERS_VAE):
        _write(folder / "vae" / name, vae, {})
    table = torch.randn(1, 52, 1, 1, 64 * heads, generator=torch.Generator().manual_seed(4))
    decoder = published(_randomise(TransparentDecoder(16, 64, 1, 64, tail=True, layer_spacing=4), seed=5))
    for kind, state in (("layer_embeddings", {"layer_pe": table}), ("transparent_decoders", decoder)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        save_file(state, folder / kind / LAYERS)
    config = Config(dim=64 * heads, layers=layers, width=64, heads=1, blocks=1, global_blocks=1, native=(8, 8))
    _write(folder / "patch_adapters" / PATCH_ADAPTER, _randomise(PatchAdapter(config), seed=3), metadata(config))
    return folder


def write_qwen_image_layered(folder: Path) -> Path:
    """Qwen-Image-Layered (text of 64 channels, one head) and its RGBA autoencoder. ComfyUI needs the node pack tests/tiny_sizes to load the first."""
    from diffusers import QwenImageTransformer2DModel

    from tessera.models.default import networks

    sizes = dict(num_attention_heads=1, joint_attention_dim=64)
    transformer = QwenImageTransformer2DModel(num_layers=2, use_additional_t_cond=True, **sizes)
    _write(folder / "diffusion_models" / LAYERED, _randomise(transformer, seed=4), {"tiny_sizes": json.dumps(sizes)})
    vae = networks.build_vae()
    vae.encoder.conv1 = networks.CausalConv3d(4, vae.encoder.conv1.out_channels)
    vae.decoder.head[2] = networks.CausalConv3d(vae.decoder.head[2].in_channels, 4)
    _write(folder / "vae" / LAYERED_VAE, _randomise(vae, seed=5), {})
    return folder


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fan-in scaled weights, so that every output is finite and depends on every input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("modulation"):
                parameter.copy_(noise * 0.1)
            elif name.endswith("gamma") or ("norm" in name and name.endswith("weight") and parameter.ndim == 1):
                parameter.copy_(1 + noise * 0.02)
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.02)
            else:
                parameter.copy_(noise * (1.4 / parameter[0].numel() ** 0.5))
    return model


def _write(file: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(file), metadata=metadata)
