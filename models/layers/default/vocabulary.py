"""The closed vocabulary of the layered weights: a caption names the objects, and the ground, and not which layer is which.

One token for each object, the sum of the vectors of its words; one more for the ground. Imports torch only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...default.vocabulary import COLOURS, FILLERS, MOTIONS, TEXT_DIM

SHAPES = ("disc", "square", "triangle", "diamond", "ring", "cross")
MAX_OBJECTS = 8  # kinds in one caption; any number of layers may show each
WORDS = (*COLOURS, *SHAPES, *MOTIONS, "on")


class Kind(NamedTuple):
    """Indices into COLOURS, SHAPES and MOTIONS; motion -1: at rest."""

    colour: int
    shape: int
    motion: int = -1


class Caption(NamedTuple):
    """ground: index into COLOURS, -1: not said."""

    kinds: tuple[Kind, ...]
    ground: int = -1


def describe() -> str:
    """One line listing every word that carries meaning."""
    return f"colour: {', '.join(COLOURS)}; shape: {', '.join(SHAPES)}; direction: {', '.join(MOTIONS)}; and 'on' with the colour of the ground"


def parse(text: str) -> Caption:
    """`red disc, blue ring moving left on green` -> Caption. An empty text is an empty caption. Raises ValueError."""
    head, *grounds = re.split(r"\bon\b", text.lower())
    if len(grounds) > 1:
        raise ValueError(f"{text!r:.60} has 'on' {len(grounds)} times; say the ground once, at the end: red disc, blue ring on green")
    ground = -1
    if grounds:
        ground, shape, motion = _words(grounds[0])
        if ground < 0 or shape >= 0 or motion >= 0:
            raise ValueError(f"'on' is followed by {grounds[0].strip()!r:.60}; name one colour there, and nothing else: on green")
    kinds = []
    for phrase in filter(str.strip, re.split(r"[,;.]|\band\b", head)):
        colour, shape, motion = _words(phrase)
        if colour < 0 or shape < 0:
            raise ValueError(
                f"{phrase.strip()!r:.60} has no {'colour' if colour < 0 else 'shape'}; each object is a colour and a shape: red disc, blue ring"
            )
        kinds.append(Kind(colour, shape, motion))
    if len(kinds) > MAX_OBJECTS:
        raise ValueError(f"the caption names {len(kinds)} objects; use at most {MAX_OBJECTS}, each of which any number of layers can show")
    return Caption(tuple(kinds), ground)


def _words(phrase: str) -> list[int]:
    """Indices of colour, shape and motion, -1 where not said."""
    found = [-1, -1, -1]
    for word in re.findall(r"\w+", phrase):
        if word in FILLERS:
            continue
        for slot, words in enumerate((COLOURS, SHAPES, MOTIONS)):
            if word in words:
                if found[slot] not in (-1, words.index(word)):
                    raise ValueError(f"{phrase.strip()!r:.60} has two of a kind: {words[found[slot]]} and {word}; put a comma between objects")
                found[slot] = words.index(word)
                break
        else:
            raise ValueError(f"the word {word!r:.60} is not in the vocabulary of these weights; it has {describe()}")
    return found


def word_vectors() -> Tensor:
    """`(len(WORDS), 64)`: rows 1, 2, ... of the 64 x 64 Hadamard matrix; orthogonal, every entry +1 or -1."""
    bits = torch.arange(1, 1 + len(WORDS))[:, None] & torch.arange(TEXT_DIM)[None]
    parity = torch.zeros_like(bits)
    for i in range(6):
        parity ^= (bits >> i) & 1
    return 1.0 - 2.0 * parity.float()


def embed(caption: Caption) -> Tensor:
    """`(objects + 1, 64)` float32, the ground last; zeros where it is not said."""
    table = word_vectors()
    rows = [table[kind.colour] + table[len(COLOURS) + kind.shape] + _said(table, kind.motion, len(COLOURS) + len(SHAPES)) for kind in caption.kinds]
    return torch.stack([*rows, _said(table, caption.ground, 0) + (table[-1] if caption.ground >= 0 else 0)])


def _said(table: Tensor, index: int, start: int) -> Tensor:
    return table[start + index] if index >= 0 else torch.zeros(TEXT_DIM)


def text(caption: Caption) -> str:
    """The inverse of `parse`."""
    phrases = [
        f"{COLOURS[kind.colour]} {SHAPES[kind.shape]}" + (f" moving {MOTIONS[kind.motion]}" if kind.motion >= 0 else "") for kind in caption.kinds
    ]
    return ", ".join(phrases) + (f" on {COLOURS[caption.ground]}" if caption.ground >= 0 else "")


def kinds(motions: Sequence[int] = (-1,)) -> list[Kind]:
    """Every object there is."""
    return [Kind(colour, shape, motion) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)) for motion in motions]
