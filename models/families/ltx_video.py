"""LTX-Video and LTX-2: self-attention over the latent itself (patch size 1), text by cross-attention.

Calls whose length is not the grid's (dropped or appended keyframe guides, audio streams) are not that self-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Family, TokenSpans, patches


def spans(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans:
    return TokenSpans(*patches(latent_shape, (1, 1, 1)))


LTX_VIDEO = Family("LTX-Video", ("comfy.ldm.lightricks.",), spans)
