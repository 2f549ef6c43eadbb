"""Flux and Chroma: joint attention, text first, one image, reference latents appended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layout import Family, TokenLayout, patches, tokens


def layout(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenLayout:
    patch_size = (network.patch_size, network.patch_size)
    references = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("ref_latents") or ())
    return TokenLayout(*patches(latent_shape, patch_size), text="first", references_after=references)


FLUX = Family("Flux", ("comfy.ldm.flux.", "comfy.ldm.chroma."), layout)
