"""Predict offload from a weight file and a GPU's name, with neither loaded: before buying or renting.

Compute is 2 P N + 4 N^2 d operations a block and pass (P weights, N tokens, d width) at an assumed share of the GPU's rate; transfers are
the file's bytes at an assumed rate of the link. The schedule between them is no estimate: the real scheduler runs, in virtual time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import FileError
from ..weight_files import read_sizes
from .shards import model_files

# Share of the data sheet's rate that matrix products of a transformer reach. An assumption; a measured rate can be given instead.
EFFICIENCY = 0.6

GIGA = 1e9

# Where checkpoints with all parts of a pipeline have the diffusion model: a convention of Stable Diffusion's first release that all follow.
IN_CHECKPOINT = "model.diffusion_model."


@dataclass(frozen=True)
class Card:
    """memory: GB of 2**30 bytes. tflops: dense fp16 with fp32 accumulation, from NVIDIA's data sheets and architecture white papers.
    gbps: 1e9 bytes a second over the card's PCIe link in practice (25 for Gen4 x16, 50 for Gen5 x16, half for x8)."""

    memory: float
    tflops: float
    gbps: float


CARDS = {
    "RTX 3060": Card(12, 25, 25),
    "RTX 3070": Card(8, 41, 25),
    "RTX 3080": Card(10, 60, 25),
    "RTX 3090": Card(24, 71, 25),
    "RTX 4060 Ti": Card(16, 44, 12.5),
    "RTX 4070": Card(12, 58, 25),
    "RTX 4080": Card(16, 97, 25),
    "RTX 4090": Card(24, 165, 25),
    "RTX 5070": Card(12, 62, 50),
    "RTX 5080": Card(16, 113, 50),
    "RTX 5090": Card(32, 210, 50),
    "A100": Card(80, 312, 25),
    "H100": Card(80, 989, 50),
    "H200": Card(141, 989, 50),
}


def card(name: str) -> Card:
    """The card of a name such as "RTX 3060", in any case, with or without spaces. Raises ValueError with the known ones."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
    for known, found in CARDS.items():
        if re.sub(r"[^a-z0-9]", "", known.lower()) in (wanted, "rtx" + wanted):
            return found
    raise ValueError(f"gpu is {name!r}, which is not in the list: {', '.join(CARDS)}. Give --tflops and --gbps of yours instead")


@dataclass(frozen=True)
class FileBlock:
    """A repeated block of a weight file. weights: elements of its matrices. width: features of a token."""

    name: str
    nbytes: int
    weights: int
    width: int

    def operations(self, tokens: int) -> float:
        """Floating-point operations of one pass over `tokens` tokens."""
        return 2.0 * self.weights * tokens + 4.0 * tokens**2 * self.width


def read_blocks(path: str | Path) -> tuple[list[FileBlock], int]:
    """(repeated blocks in the order of the file's names, bytes outside them), from the headers of the safetensors files of a model.

    path: as for `model_files`. Of a whole checkpoint (with text encoders and VAE) only the diffusion model counts: the others are not on the
    GPU while it runs. Raises FileNotFoundError or FileError that names the file, what was found and what to do.
    """
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in model_files(path):
        tensors |= read_sizes(file)
    if any(name.startswith(IN_CHECKPOINT) for name in tensors):
        tensors = {name: sizes for name, sizes in tensors.items() if name.startswith(IN_CHECKPOINT)}
    total = sum(nbytes for _, nbytes in tensors.values())
    lists: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in tensors:
        found = re.match(r"(.*?)\.?(?<![^.])(\d{1,9})\.", name)
        if found:
            lists[found[1]][int(found[2])].append(name)
    blocks = []
    for prefix, members in lists.items():
        nbytes = {index: sum(tensors[name][1] for name in names) for index, names in members.items()}
        if len(members) < 2 or sum(nbytes.values()) <= 0.05 * total:
            continue
        for index in sorted(members):
            matrices = [tensors[name][0] for name in members[index] if len(tensors[name][0]) > 1]
            # The width of a token is the size that the block's matrices have in common.
            sizes_seen = Counter(size for shape in matrices for size in {shape[0], prod(shape[1:])} if size)
            width = max(sizes_seen, key=lambda size: (sizes_seen[size], -size)) if sizes_seen else 1
            blocks.append(FileBlock(f"{prefix}.{index}", nbytes[index], sum(prod(shape) for shape in matrices), width))
    if not blocks:
        raise FileError(f"{path} has no repeated blocks (names such as blocks.0.): give the file of a transformer")
    return blocks, total - sum(block.nbytes for block in blocks)


def tokens_of(shape: str) -> int:
    """Tokens of "81x480x832" (frames, height, width) or "1024x1024" for latent video models of stride 4 x 8 x 8 and 2 x 2 patches.

    A single number is taken as tokens. Raises ValueError that names what was found.
    """
    parts = [part.strip() for part in shape.lower().split("x")]
    # Nine digits: no model is asked for more, and products stay numbers.
    if len(parts) > 3 or not all(part.isdecimal() and len(part) <= 9 and int(part) > 0 for part in parts):
        raise ValueError(f"shape is {shape[:80]!r}; give frames x height x width such as 81x480x832, height x width, or a number of tokens")
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        return numbers[0]
    frames, height, width = ([1] * (3 - len(numbers)) + numbers)[-3:]
    return ((frames - 1) // 4 + 1) * -(-height // 16) * -(-width // 16)
