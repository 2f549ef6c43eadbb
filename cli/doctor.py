"""What this machine can run, in words."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from ..kernels.backends import backends, video_problem
from .comfy_server import HOW_TO_GET, find_comfy


def report() -> Iterator[str]:
    """One finding a line."""
    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("torch", "triton", "diffusers", "av"):
        yield f"{package:11} {_version(package)}"
    problem = video_problem()
    name = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else "no CUDA device"
    yield f"gpu         {name} ({problem.gpu.arch}, {problem.gpu.name}); tensor-core types: {', '.join(sorted(problem.gpu.precisions)) or 'none'}"
    found = backends(problem)
    chosen = next((backend.name for backend in found if backend.status == "usable"), "none")
    yield f"attention   block-sparse, {str(problem.dtype).removeprefix('torch.')}, head_dim {problem.head_dim}: {chosen}"
    for backend in found:
        yield f"            {backend.name}: {backend.reason or backend.status}"
    comfy = find_comfy()
    yield f"comfyui     {f'not found: {HOW_TO_GET}' if comfy is None else f'{comfy.path}, run by {comfy.python}'}"


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed, version unknown"
