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


def write_models(folder: Path, *, layers: int = 2, heads: int = 3) -> Path:
    """Write diffusion_models/, vae/ and patch_adapters/ under `folder`, in ComfyUI's layout. head_dim is 64 as in the default weights."""
    from tessera.models.default import networks
    from tessera.models.upscale.patch_adapter import Config, PatchAdapter, metadata

    transformer = _randomise(networks.build_transformer(dim=64 * heads, heads=heads, layers=layers, ffn=192 * heads), seed=1)
    _write(folder / "diffusion_models" / DIFFUSION_MODEL, transformer, {"config": json.dumps({"transformer": {"text_dim": 64, "num_heads": heads}})})
    _write(folder / "vae" / VAE, _randomise(networks.build_vae(), seed=2), {})
    config = Config(dim=64 * heads, layers=layers, width=64, heads=1, blocks=1, global_blocks=1, native=(8, 8))
    _write(folder / "patch_adapters" / PATCH_ADAPTER, _randomise(PatchAdapter(config), seed=3), metadata(config))
    return folder


def _randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fan-in scaled weights, so that every output is finite and depends on every input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("modulation"):
                parameter.copy_(noise * 0.1)
            elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + noise * 0.02)
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.02)
            else:
                parameter.copy_(noise * (1.4 / parameter[0].numel() ** 0.5))
    return model


def _write(file: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(file), metadata=metadata)
