"""Qwen-Image, Edit and Layered: joint attention, text first, reference latents appended. Layers count as frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, TokenSpans, patches, tokens


def spans(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans:
    patch_size = (network.patch_size, network.patch_size)
    references = sum(tokens(tuple(latent.shape), patch_size) for latent in extras.get("ref_latents") or ())
    return TokenSpans(*patches(latent_shape, patch_size), text="first", references_after=references)


QWEN_IMAGE = Family("Qwen-Image", ("comfy.ldm.qwen_image.",), spans)
