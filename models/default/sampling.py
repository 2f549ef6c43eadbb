"""Generate clips with the two models: shifted linear schedule, Euler steps, classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import networks, vocabulary


def schedule(steps: int, shift: float) -> Tensor:
    """(steps + 1,) noise levels from 1 to 0."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def latents(
    model: networks.WanTransformer,
    captions: Tensor,
    frames: int = 33,
    size: int = 128,
    steps: int = 20,
    cfg: float = 3.0,
    shift: float = 5.0,
    seed: int = 0,
    probe: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """(B, 3) captions -> whitened latents (B, 16, 1 + frames // 4, size / 8, size / 8). probe(sigma, x, context) sees each step."""
    device = next(model.parameters()).device
    context = vocabulary.embed(captions).to(device)
    both = torch.cat([context, torch.zeros_like(context)])
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), model.channels, (frames - 1) // 4 + 1, size // 8, size // 8, generator=g).to(device)
    levels = schedule(steps, shift)
    for now, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        if probe:
            probe(now, x, context)
        said, unsaid = model(x.repeat(2, 1, 1, 1, 1), torch.full((2 * len(x),), 1000 * now, device=device), both).chunk(2)
        x = x + (after - now) * (unsaid + cfg * (said - unsaid))
    return x


@torch.no_grad()
def decode(vae: networks.WanVAE, z: Tensor) -> Tensor:
    """Whitened latents -> clips in [-1, 1], one at a time."""
    return torch.cat([vae.decode(networks.unwhiten(v[None])).clamp(-1, 1) for v in z])


def sheet(clips: Sequence[Tensor], path: str, columns: int = 6) -> None:
    """One PNG row per clip (3, T, H, W), `columns` frames each, two clips side by side."""
    from PIL import Image

    rows = []
    for c in clips:
        pick = torch.linspace(0, c.shape[1] - 1, columns).round().long()
        row = torch.cat([torch.nn.functional.pad(c[:, i], (1, 1, 1, 1), value=0.2) for i in pick], 2)
        rows.append(torch.nn.functional.pad(row, (0, 6, 0, 0), value=1.0))
    rows += [torch.full_like(rows[0], -1.0)] * (len(rows) % 2)
    half = len(rows) // 2
    image = torch.cat([torch.cat([rows[i], rows[half + i]], 2) for i in range(half)], 1)
    Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().cpu().numpy()).save(path)
