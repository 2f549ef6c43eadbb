"""HunyuanVideo 1 and 1.5: joint attention. ComfyUI puts the text first (upstream puts it last)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, TokenSpans, patches, tokens


def spans(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans:
    """The reference latent of the image-to-video "concat" variant stands directly before the grid."""
    patch_size = tuple(network.patch_size)
    reference = extras.get("ref_latent")
    before = 0 if reference is None else tokens(tuple(reference.shape[:2]) + tuple(reference.shape[-2:]), patch_size[-2:])
    return TokenSpans(*patches(latent_shape, patch_size), text="first", references_before=before)


HUNYUAN_VIDEO = Family("HunyuanVideo", ("comfy.ldm.hunyuan_video.",), spans)
