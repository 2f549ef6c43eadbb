"""DiT families: where the video grid and the text are in a self-attention sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...kernels import registry
from .family import Family, TokenSpans
from .flux import FLUX
from .hunyuan_video import HUNYUAN_VIDEO
from .ltx_video import LTX_VIDEO
from .qwen_image import QWEN_IMAGE
from .wan import WAN

FAMILIES = tuple(registry.by_name("DiT family", (WAN, HUNYUAN_VIDEO, FLUX, QWEN_IMAGE, LTX_VIDEO)).values())

__all__ = ["FAMILIES", "WAN", "Family", "TokenSpans", "find", "spans_of"]


def find(network: Any) -> Family | None:
    """The family of a network, looked up through its class and base classes; None when it is unknown."""
    modules = [cls.__module__ for cls in type(network).__mro__]
    return next((family for module in modules for family in FAMILIES if module.startswith(family.modules)), None)


def spans_of(network: Any, latent_shape: tuple[int, ...], extras: Mapping[str, Any]) -> TokenSpans | None:
    """The spans of one model call's tokens; None for an unknown family and for latents without height and width."""
    family = find(network)
    return family.spans(network, latent_shape, extras) if family is not None and len(latent_shape) in (4, 5) else None
