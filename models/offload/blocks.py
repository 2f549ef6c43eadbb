"""Find the repeated blocks of a module by structure: the units that are moved between host and device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .memory import nbytes_of

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# A repeated group lighter than this share of the module (two layers of a text embedder, say) is not worth moving.
SMALLEST_SHARE = 0.05


@dataclass(eq=False, frozen=True)
class Block:
    """One unit of offload. nbytes: bytes of its parameters and buffers."""

    name: str
    module: nn.Module
    nbytes: int


def find_blocks(module: nn.Module) -> list[Block]:
    """The repeated blocks of `module`, in order of registration.

    Children of one list that share a class are blocks; nothing inside a block is looked at; groups that together weigh less than 5 %
    of the module are left out. Raises ValueError where there is none.
    """
    total = nbytes_of(module)
    found: list[Block] = []

    def walk(parent: nn.Module, prefix: str) -> None:
        taken: set[str] = set()
        if isinstance(parent, CONTAINERS):
            groups: dict[type, list[Block]] = {}
            for name, child in parent.named_children():
                if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                    continue  # a list of lists: they cannot be called, their members can
                groups.setdefault(type(_unwrapped(child)), []).append(Block(prefix + name, child, nbytes_of(child)))
            for group in groups.values():
                if len(group) > 1 and sum(block.nbytes for block in group) >= max(SMALLEST_SHARE * total, 1):
                    taken.update(block.name for block in group if block.nbytes)
                    found.extend(block for block in group if block.nbytes)
        for name, child in parent.named_children():
            if prefix + name not in taken:
                walk(child, f"{prefix}{name}.")

    walk(module, "")
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no repeated blocks (two or more modules of one class in a ModuleList or Sequential): "
            "there is nothing to exchange. Give its part that has them, or keep it on the device."
        )
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)
