"""The patch adapter of a video diffusion transformer: a patch branch, a global branch and LoRA, after PatchVSR.

Chen et al. 2025, "PatchVSR" (arXiv 2509.26025) describes it; neither code nor weights were published, so names and sizes are ours.
The base model denoises one window of the enlarged clip. The patch branch reads the same window of the enlarged clip's latent and adds
to the stream after each base block. The global branch reads the whole clip at the base model's own size, with a mask of where the window
lies; each text cross-attention also attends to its tokens, with the same queries and keys and values of their own. Low-rank updates of
the base's matrices (`lora.*`) go through the host's LoRA loader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import FileError
from ..weight_files import COPY, check_fit, check_numbers, read_safetensors

KIND = "tessera_patch_adapter"
LORA = "lora."
LARGEST = 1024  # side of a native latent: four times what the largest video models are trained on


@dataclass(frozen=True)
class Config:
    """channels: of the latent. dim, layers: width and blocks of the base. width, heads, blocks, global_blocks: of the two branches.

    native: height and width of the latent that the base was trained for, which is the size of a window and of the global view.
    """

    channels: int = 16
    dim: int = 192
    layers: int = 6
    width: int = 128
    heads: int = 2
    blocks: int = 3
    global_blocks: int = 2
    native: tuple[int, int] = (16, 16)


@dataclass(frozen=True)
class Window:
    """Where a window lies on the canvas, in fractions of it."""

    top: float
    left: float
    bottom: float
    right: float

    def mask(self, height: int, width: int) -> Tensor:
        """`(1, 1, 1, height, width)`: how much of each position of the global view the window covers."""
        parts = []
        for size, start, stop in ((height, self.top, self.bottom), (width, self.left, self.right)):
            edges = torch.arange(size + 1, dtype=torch.float32) / size
            parts.append(((edges[1:].clamp_max(stop) - edges[:-1].clamp_min(start)) * size).clamp(0, 1))
        return (parts[0][:, None] * parts[1])[None, None, None]


class PatchAdapter(nn.Module):
    """Latents are `(batch, channels, frames, height, width)`, normalised as the base takes them; height and width even.

    operations: where layer classes come from (`Linear`, `Conv3d`, `RMSNorm`, `LayerNorm`), so that a host can manage the weights.
    """

    def __init__(self, config: Config, operations: Any = nn, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.config = config
        where = {"dtype": dtype, "device": device}
        width = config.width
        self.patch_embedding = operations.Conv3d(config.channels, width, (1, 2, 2), (1, 2, 2), **where)
        self.condition = nn.Sequential(
            operations.Linear(7 * SINUSOID, width, **where), nn.SiLU(), operations.Linear(width, width, **where), nn.SiLU()
        )
        self.modulation = operations.Linear(width, 6 * width, **where)
        self.blocks = nn.ModuleList(Block(width, config.heads, True, operations, where) for _ in range(config.blocks))
        self.to_base = nn.ModuleList(operations.Linear(width, config.dim, **where) for _ in range(config.layers))
        self.global_embedding = operations.Conv3d(config.channels + 1, width, (1, 2, 2), (1, 2, 2), **where)
        self.global_blocks = nn.ModuleList(Block(width, config.heads, False, operations, where) for _ in range(config.global_blocks))
        self.reduce = operations.Linear(4 * width, width, **where)
        self.to_k = nn.ModuleList(operations.Linear(width, config.dim, **where) for _ in range(config.layers))
        self.to_v = nn.ModuleList(operations.Linear(width, config.dim, **where) for _ in range(config.layers))
        self.norm_k = nn.ModuleList(operations.RMSNorm(config.dim, eps=1e-6, **where) for _ in range(config.layers))

    def hints(self, patch: Tensor, sigma: Tensor, augmentation: Tensor, factor: Tensor, windows: Sequence[Window]) -> list[Tensor]:
        """What is added to the base's stream after each of its blocks: `(batch, tokens, dim)` each.

        patch: the window of the enlarged clip's latent, mixed with noise: (1 - augmentation) * latent + augmentation * noise. sigma: the
        noise level of the base's input. augmentation, factor (times enlarged): `(batch,)`, and one window a sample.
        """
        frames, height, width = patch.shape[2:]
        crop = torch.tensor([[window.top, window.left, window.bottom, window.right] for window in windows], device=patch.device)
        values = torch.cat([torch.stack([sigma, augmentation, factor.log2() / 4], 1), crop], 1)
        e = self.condition(sinusoid(values).flatten(1).to(patch.dtype))
        e = self.modulation(e).unflatten(1, (6, 1, -1)).unbind(1)
        x = self.patch_embedding(patch).flatten(2).transpose(1, 2)
        table = rotary((frames, height // 2, width // 2), self.config.width // self.config.heads, patch.device)
        streams = []
        for block in self.blocks:
            x = block(x, table, e)
            streams.append(x)
        layers, blocks = self.config.layers, len(self.blocks)
        return [linear(streams[index * blocks // layers]) for index, linear in enumerate(self.to_base)]

    def view(self, whole: Tensor, windows: Sequence[Window]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `(batch, frames * height * width / 16, dim)` for the cross-attention of each base block.

        whole: latent of the whole clip at the base's own size, height and width multiples of 4. It does not depend on the noise level.
        """
        frames, height, width = whole.shape[2:]
        masks = torch.cat([window.mask(height, width) for window in windows]).to(whole)
        x = self.global_embedding(torch.cat([whole, masks.expand(-1, -1, frames, -1, -1)], 1))
        grid = (frames, height // 2, width // 2)
        x = x.flatten(2).transpose(1, 2)
        table = rotary(grid, self.config.width // self.config.heads, whole.device)
        for block in self.global_blocks:
            x = block(x, table)
        x = x.unflatten(1, (frames, grid[1] // 2, 2, grid[2] // 2, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(1, 3)
        x = self.reduce(x)
        return [(norm(k(x)), v(x)) for k, v, norm in zip(self.to_k, self.to_v, self.norm_k, strict=True)]


SINUSOID = 32  # numbers a condition is spread over


def sinusoid(values: Tensor) -> Tensor:
    """`(...)` in about 0..1 -> `(..., SINUSOID)`: cosines and sines of wavelengths from 2 down to 1/64."""
    angle = values[..., None].float() * math.pi * torch.logspace(0, 7, SINUSOID // 2, base=2, device=values.device)
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary(grid: tuple[int, int, int], head_dim: int, device: Any) -> tuple[Tensor, Tensor]:
    """cos and sin `(tokens, head_dim / 2)`: a third of the pairs turns with each of time, height and width, as in Wan."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (size, count) in enumerate(zip(grid, counts, strict=True)):
        angle = torch.arange(size)[:, None] * 10000.0 ** (-torch.arange(count) / count)
        shape = [1, 1, 1, count]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, count))
    angle = torch.cat(angles, -1).flatten(0, 2)
    return angle.cos().to(device), angle.sin().to(device)


class Block(nn.Module):
    """Self-attention and a feed-forward network on `(batch, tokens, width)`, modulated by conditions or not."""

    def __init__(self, width: int, heads: int, modulated: bool, operations: Any, where: dict[str, Any]):
        super().__init__()
        self.heads = heads
        self.norm1 = operations.LayerNorm(width, eps=1e-6, elementwise_affine=not modulated, **where)
        self.qkv = operations.Linear(width, 3 * width, **where)
        self.norm_q, self.norm_k = (operations.RMSNorm(width // heads, eps=1e-6, **where) for _ in range(2))
        self.out = operations.Linear(width, width, **where)
        self.norm2 = operations.LayerNorm(width, eps=1e-6, elementwise_affine=not modulated, **where)
        self.ffn = nn.Sequential(
            operations.Linear(width, 3 * width, **where), nn.GELU(approximate="tanh"), operations.Linear(3 * width, width, **where)
        )

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], e: Sequence[Tensor] | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = e if e is not None else (0.0,) * 6
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        q, k = rotate(self.norm_q(q), table), rotate(self.norm_k(k), table)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y) * (1 + gate1)
        return x + self.ffn(self.norm2(x) * (1 + scale2) + shift2) * (1 + gate2)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of `(batch, heads, tokens, head_dim)`."""
    cos, sin = (part.to(x.dtype) for part in table)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def initialise(adapter: PatchAdapter, seed: int = 0) -> PatchAdapter:
    """Random weights with which the base is unchanged: what reaches it starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.startswith(("to_base", "to_v", "modulation")):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return adapter


def load(path: str | Path) -> tuple[Config, dict[str, Tensor], dict[str, Tensor]]:
    """A file's configuration, the adapter's state dict, which fits it, and the LoRA's tensors by their base module's name.

    Raises FileNotFoundError, and FileError for a file that is not an adapter, or of which the configuration and the tensors disagree.
    """
    tensors, metadata = read_safetensors(path)
    if KIND not in metadata:
        raise FileError(f"{path} is not a patch adapter: its metadata has no {KIND!r}; use a file of train_patch_adapter")
    check_numbers(path, tensors)
    lora = {name.removeprefix(LORA): value for name, value in tensors.items() if name.startswith(LORA)}
    state = {name: value for name, value in tensors.items() if not name.startswith(LORA)}
    try:
        config = _config(metadata[KIND], state)
        check_fit(state, lambda: PatchAdapter(config), "the patch adapter that its metadata describe")
        _check_lora(lora)
    except ValueError as error:
        raise FileError(f"{path}: {error}; {COPY}") from error
    return config, state, lora


def _config(text: str, state: Mapping[str, Tensor]) -> Config:
    """What `metadata` wrote. Raises ValueError, also for parts that the tensors do not bear out: a number costs a file nothing."""
    try:
        settings = json.loads(text)
        config = Config(**{**settings, "native": tuple(settings["native"])})
    except (KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(f"its metadata describe no patch adapter: {text[:200]!r}") from None
    numbers = (config.channels, config.dim, config.layers, config.width, config.heads, config.blocks, config.global_blocks, *config.native)
    if not all(type(number) is int and 0 < number for number in numbers) or len(config.native) != 2:
        raise ValueError(f"its metadata describe no patch adapter: {text[:200]!r}")
    if max(config.native) > LARGEST or any(side % 2 for side in config.native):
        raise ValueError(f"native is {config.native} in its metadata; a latent has even sides of {LARGEST} at most")
    for name, part in (("layers", "to_base"), ("blocks", "blocks"), ("global_blocks", "global_blocks")):
        found = len({key.split(".")[1] for key in state if key.startswith(f"{part}.")})
        if getattr(config, name) != found:
            raise ValueError(f"{name} is {getattr(config, name)} in its metadata, and its tensors are of {found}")
    if config.width % (2 * config.heads):
        raise ValueError(f"width is {config.width} and heads {config.heads} in its metadata; a head has an even share of the width")
    return config


def _check_lora(lora: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a half of a pair of matrices, and for two that have no product."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in lora.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        pairs.setdefault(module, {})[part] = value
    for module, pair in pairs.items():
        if (
            pair.keys() != {"lora_up", "lora_down"}
            or any(value.ndim != 2 for value in pair.values())
            or pair["lora_up"].shape[1] != len(pair["lora_down"])
        ):
            shapes = ", ".join(f"{part} {tuple(value.shape)}" for part, value in pair.items())
            raise ValueError(f"{LORA}{module} is no pair of matrices of a LoRA: {shapes}")


def metadata(config: Config) -> dict[str, str]:
    """What `load` expects in a file's metadata."""
    return {KIND: json.dumps(asdict(config))}
