"""The closed vocabulary of the default weights: one colour, one shape, one motion. Imports torch only."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

COLOURS = ("red", "green", "blue", "yellow", "white", "magenta")
SHAPES = ("disc", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")
KINDS = (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS))
FILLERS = frozenset("a an the and is are to with of on in it that moving moves move going goes sliding towards toward".split())
TEXT_DIM = 64


def describe() -> str:
    """One line listing every word that carries meaning."""
    return "; ".join(f"{kind}: {', '.join(words)}" for kind, words in KINDS)


def parse(prompt: str) -> list[int | None]:
    """Indices [colour, shape, motion], None where the prompt does not say. Unknown words raise ValueError."""
    found: list[int | None] = [None, None, None]
    for word in re.findall(r"[^\s,.;:!]+", prompt.lower()):
        if word in FILLERS:
            continue
        for slot, (kind, words) in enumerate(KINDS):
            if word in words:
                other = found[slot]
                if other not in (None, words.index(word)):
                    raise ValueError(f"Two words of the same kind ({kind}): '{words[other]}' and '{word}'. Use one.")
                found[slot] = words.index(word)
                break
        else:
            raise ValueError(f"The word '{word:.60}' is not in the vocabulary of these weights. It has {describe()}.")
    return found


def word_vectors() -> Tensor:
    """(13, 64): rows 1..13 of the 64 x 64 Hadamard matrix; orthogonal, every entry +1 or -1."""
    rows = torch.arange(1, 1 + sum(len(words) for _, words in KINDS))
    bits = rows[:, None] & torch.arange(TEXT_DIM)[None]
    parity = torch.zeros_like(bits)
    for i in range(6):
        parity ^= (bits >> i) & 1
    return 1.0 - 2.0 * parity.float()


def embed(indices: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Index rows (B, 3), -1 for "not said", -> (B, 3, 64) float32; slots are colour, shape, motion, zero where not said."""
    indices = torch.as_tensor(indices)
    offset = torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)], device=indices.device)
    table = word_vectors().to(indices.device)
    said = indices >= 0
    return table[(indices.clamp_min(0) + offset)] * said[..., None]


def encode(prompt: str) -> Tensor:
    """Text -> (1, 3, 64) float32. Order, case and filler words do not matter; an empty prompt gives zeros."""
    return embed([[-1 if i is None else i for i in parse(prompt)]])


def caption(indices: Sequence[int] | Tensor) -> str:
    """[colour, shape, motion] -> text such as "red disc left"."""
    return " ".join(words[int(i)] for (_, words), i in zip(KINDS, indices, strict=True))
