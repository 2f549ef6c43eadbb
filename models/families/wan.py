"""Wan 2.1 and 2.2: text-to-video, image-to-video and variants. Self-attention holds no text; cross-attention is a separate call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, TokenSpans, patches, tokens


def spans(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans:
    """Reference images of `ref_conv` checkpoints stand before the grid, context latents behind it; `time_dim_concat` adds frames."""
    patch_size = tuple(network.patch_size)
    frames, height, width = patches(latent_shape, patch_size)
    appended = extras.get("time_dim_concat")
    if appended is not None:
        frames += patches(tuple(appended.shape), patch_size)[0]
    has_reference = getattr(network, "ref_conv", None) is not None and extras.get("reference_latent") is not None
    context = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("context_latents") or ())
    return TokenSpans(frames, height, width, references_before=height * width if has_reference else 0, references_after=context)


WAN = Family("Wan", ("comfy.ldm.wan.",), spans)
