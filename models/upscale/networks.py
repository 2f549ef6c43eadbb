"""Upscaling networks from files, in a form that other processes and machines can load too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import FileError, reading
from ..weight_files import check_numbers, read_safetensors, read_torch, state_dict
from . import catanet
from .pictures import Network
from .tiling import Operator

BUILT_IN = {scale: Path(__file__).parent / "upscale_models" / f"tessera_catanet_x{scale}.safetensors" for scale in (2, 4)}
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net")  # what training code puts them in


@dataclass(frozen=True)
class NetworkFile:
    """The weights of a network, not yet on a device. An instance is what `workers.processes` and `workers.ray_cluster` load."""

    name: str
    weights: bytes  # safetensors, because these bytes travel

    def load(self, device: torch.device) -> Network:
        """The network on a device, in evaluation mode and float32."""
        state = safetensors.torch.load(self.weights)
        if "first_conv.weight" in state and "mid_convs.7.weight" in state:
            try:
                network = catanet.build(state).to(device)
            except ValueError as error:
                raise FileError(f"{self.name}: {error}; use another upscaling network") from error
            return Network(network, network.upscale)
        return _spandrel(self.name, state, device)

    def __call__(self, device: torch.device) -> Operator:
        """Maps one patch, `(3, height, width)`."""
        return self.load(device).map_patch


def built_in(factor: float) -> NetworkFile:
    """CATANet with the weights of this package: the x2 network for factors up to 2, the x4 one beyond."""
    return read_network(BUILT_IN[2 if factor <= 2 else 4])


def read_network(file: Path) -> NetworkFile:
    """A file of CATANet's published layout, or of an architecture that spandrel knows.

    Nothing in it is executed. Raises FileNotFoundError, and FileError for what is no state dict, or one with NaN.
    """
    suffix = file.suffix.lower()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give the path of a weight file, catanet or bicubic")
    if suffix not in SUFFIXES:
        raise FileError(f"{file} ends in {file.suffix!r}; a weight file ends in {', '.join(SUFFIXES)}")
    if suffix == ".safetensors":
        tensors = read_safetensors(file)[0]
    else:
        state = read_torch(file)
        for key in WRAPPERS:
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        tensors = state_dict(file, state)
    check_numbers(file, tensors)
    tensors = {key.removeprefix("module."): value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    largest = max((int(number) for key in tensors for number in re.findall(r"\d{1,18}", key)), default=0)
    if largest > 1000 + 10 * len(tensors):  # an architecture that counts its layers by their names would be built with that many
        raise FileError(f"{file} has {len(tensors)} tensors and names one of them layer {largest}; use the state dict of an upscaling network")
    return NetworkFile(file.name, safetensors.torch.save(tensors))


def _spandrel(name: str, state: dict[str, Tensor], device: torch.device) -> Network:
    try:
        import spandrel
    except ImportError as error:
        raise FileError(f"{name} is not CATANet, and other architectures need spandrel ({error}); pip install spandrel") from error
    with reading(name, f"a network that spandrel {spandrel.__version__} can build", "use another upscaling network"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on how architectures are written
        try:
            found: Any = spandrel.ModelLoader(device).load_from_state_dict(state)
        except spandrel.UnsupportedModelError as error:
            raise FileError(
                f"{name} is no architecture that spandrel {spandrel.__version__} or Tessera knows; use another upscaling network"
            ) from error
    if not isinstance(found, spandrel.ImageModelDescriptor) or found.input_channels != 3 or found.output_channels != 3:
        raise FileError(f"{name} is {found.architecture.name} for {found.purpose}; use a network that maps RGB pictures to larger ones")
    requirements = found.size_requirements
    return Network(found.eval(), found.scale, max(requirements.minimum, 1), max(requirements.multiple_of, 1))
