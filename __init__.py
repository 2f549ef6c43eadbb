"""Tessera: sparse and quantized attention for diffusion models, as ComfyUI nodes and as a library. Everything loads on first use.

There is one package, whoever loads it: ComfyUI under the folder's own name, `import tessera`, or both in either order.
The first copy registers itself as `tessera`; a later copy hands out the first one's names, so custom ops register once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"

_PUBLIC = {
    "attention": "kernels.attention",
    "backends": "kernels.backends",
    "use_backend": "kernels.backends",
    "BlockMask": "kernels.block_mask",
    "PooledTail": "kernels.block_mask",
    "RECIPES": "kernels.sparsity",
    "Recipe": "kernels.sparsity",
    "TokenGrid": "kernels.sparsity",
    "sparse_attention": "kernels.sparsity",
    "offload": "models.offload",
}

sys.modules.setdefault("tessera", sys.modules[__name__])


async def comfy_entrypoint() -> Any:
    """ComfyUI's entry point: the extension with all nodes."""
    return await import_module("tessera.nodes").comfy_entrypoint()


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"tessera.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'tessera' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
