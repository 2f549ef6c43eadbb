"""Flux and Chroma: joint attention, text first, one image, reference latents appended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, TokenSpans, patches, tokens


def spans(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans:
    patch_size = (network.patch_size, network.patch_size)
    references = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("ref_latents") or ())
    return TokenSpans(*patches(latent_shape, patch_size), text="first", references_after=references)


FLUX = Family("Flux", ("comfy.ldm.flux.", "comfy.ldm.chroma."), spans)
