"""Upscaling networks from files, in a form that other processes and machines can load too."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from . import catanet
from .pictures import Network
from .tiling import Operator

BUILT_IN = {scale: Path(__file__).parent / "upscale_models" / f"tessera_catanet_x{scale}.safetensors" for scale in (2, 4)}
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class NetworkFile:
    """The weights of a network, not yet on a device. An instance is what `workers.processes` and `workers.ray_cluster` load."""

    name: str
    weights: bytes  # safetensors, because these bytes travel

    def load(self, device: torch.device) -> Network:
        """The network on a device, in evaluation mode and float32."""
        state = safetensors.torch.load(self.weights)
        if "first_conv.weight" in state and "mid_convs.7.weight" in state:
            network = catanet.build(state).to(device)
            return Network(network, network.upscale)
        return _spandrel(self.name, state, device)

    def __call__(self, device: torch.device) -> Operator:
        """Maps one patch, `(3, height, width)`."""
        return self.load(device).on_patch


def built_in(factor: float) -> NetworkFile:
    """CATANet with the weights of this package: the x2 network for factors up to 2, the x4 one beyond."""
    return read_network(BUILT_IN[2 if factor <= 2 else 4])


def read_network(file: Path) -> NetworkFile:
    """A file of CATANet's published layout, or of an architecture that spandrel knows.

    Nothing in it is executed. Raises FileNotFoundError, and ValueError for what is no state dict.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such weight file; give a path, catanet or bicubic", str(file))
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{file} ends in {file.suffix!r}; a weight file ends in {', '.join(SUFFIXES)}")
    state: Any
    try:
        if file.suffix.lower() == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} cannot be read as weights ({reason}); get a complete copy of it, best as .safetensors") from error
    for key in ("params_ema", "params", "state_dict"):  # what training code wraps them in
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"{file} holds no weights, but {type(state).__name__}; use the state dict of an upscaling network")
    return NetworkFile(file.name, safetensors.torch.save({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}))


def _spandrel(name: str, state: dict[str, Tensor], device: torch.device) -> Network:
    try:
        import spandrel
    except ImportError as error:
        raise ValueError(f"{name} is not CATANet, and other architectures need spandrel ({error}); pip install spandrel") from error
    try:
        found: Any = spandrel.ModelLoader(device).load_from_state_dict(state)
    except spandrel.UnsupportedModelError as error:
        raise ValueError(f"{name} is no architecture that spandrel {spandrel.__version__} or Tessera knows; use another upscaling network") from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.input_channels != 3 or found.output_channels != 3:
        raise ValueError(f"{name} is {found.architecture.name} for {found.purpose}; use a network that maps RGB pictures to larger ones")
    requirements = found.size_requirements
    return Network(found.eval(), found.scale, max(requirements.minimum, 1), max(requirements.multiple_of, 1))
