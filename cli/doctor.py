"""What this machine can run, in words."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from ..kernels import attention, dispatch, gpu
from .comfy_server import HOW_TO_GET, find_comfy

HEAD_DIM = 128
TOKENS = 32_760  # Wan 2.1 at 480p, 81 frames


def report() -> Iterator[str]:
    """One finding a line."""
    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("torch", "triton", "diffusers", "av"):
        yield f"{package:11} {_version(package)}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = gpu.of(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA device"
    yield f"gpu         {name} ({found.arch}, {found.name}); tensor-core types: {', '.join(sorted(found.precisions)) or 'none'}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    problem = dispatch.Problem(device, dtype, 12, 12, TOKENS, TOKENS, HEAD_DIM, blocks=(128, 128))
    chosen = attention.explain(problem).implementation
    yield f"attention   block-sparse, {str(dtype).removeprefix('torch.')}, head_dim {HEAD_DIM}: {'none' if chosen is None else chosen.name}"
    for implementation in dispatch.implementations():
        yield f"            {implementation.name}: {implementation.refuse(problem) or 'usable'}"
    comfy = find_comfy()
    yield f"comfyui     {f'not found: {HOW_TO_GET}' if comfy is None else f'{comfy.path}, run by {comfy.python}'}"


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed, version unknown"
