"""Published ESSAformer checkpoints to safetensors, offline, without running anything that is in the file.

The published file is `torch.save({"epoch": ..., "model": network})`: a pickle of the whole network object, which Python's unpickler would
import and run code for. Here torch's restricted unpickler (`weights_only`) reads it, and every class of a network that the list below names is
replaced by an empty stand-in: no class of the file's choosing is imported, and only the stored tensors are taken out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import FileError, reading
from ..weight_files import COPY, check_numbers, read_torch, state_dict
from .essaformer import ESSAformer, build

# Under whatever module the authors' script had: their names, and what they are made of.
NETWORK = {"ESSA", "blockup", "Convup", "Convdown", "PatchEmbed", "PatchUnEmbed", "ESSAttn", "Upsample", "Downsample"}
LAYERS = {"container.Sequential", "conv.Conv2d", "linear.Linear", "normalization.LayerNorm", "activation.LeakyReLU", "dropout.Dropout2d"}
LAYERS |= {"pixelshuffle.PixelShuffle", "pixelshuffle.PixelUnshuffle"}
ALLOWED = {f"torch.nn.modules.{layer}" for layer in LAYERS} | {"torch.nn.parallel.data_parallel.DataParallel"}


class _Module:
    """Stands in for every class of the network: it has the attributes that were stored, and no behaviour."""

    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    _modules: dict[str, Any]


def _is_network(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last in NETWORK and module.partition(".")[0] != "torch"


def _stand_in(name: str) -> type[_Module]:
    """The class that the unpickler finds under the dotted `name`."""
    module, _, last = name.rpartition(".")
    return type(last, (_Module,), {"__module__": module})


def read_checkpoint(path: Path) -> ESSAformer:
    """The network of a published checkpoint (whole network or state dict, bare or under "model"), in evaluation mode and float32.

    Raises FileError, before anything of the file is built, when it names another class or function than those of the network; also for a
    file that is no checkpoint or holds other tensors.
    """
    with reading(path, "a checkpoint of torch 1.6 or later that can be read safely", COPY):
        asked = set(get_unsafe_globals_in_checkpoint(path))
    refused = sorted(name for name in asked if name not in ALLOWED and not _is_network(name))
    if refused:
        raise FileError(f"{path}: asks for {', '.join(refused)}, which no ESSAformer needs; nothing was run. Do not load it by other means either")
    with safe_globals([_stand_in(name) for name in asked]):
        checkpoint = read_torch(path)
    if isinstance(checkpoint, dict) and "model" in checkpoint:
        checkpoint = checkpoint["model"]
    with reading(path, "a checkpoint of an ESSAformer", COPY):
        found = dict(_tensors(checkpoint)) if isinstance(checkpoint, _Module) else checkpoint
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict(path, found).items()}  # of DataParallel
    check_numbers(path, tensors)
    try:
        return build(tensors)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names as in a state dict."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in module._modules.items():
        yield from _tensors(child, f"{prefix}{name}.")


def convert(source: Path, target: Path) -> ESSAformer:
    """Write the network of the checkpoint `source` to the safetensors file `target`, float32, and return it. Raises as `read_checkpoint`."""
    network = read_checkpoint(source)
    save_file(network.state_dict(), target)
    return network
