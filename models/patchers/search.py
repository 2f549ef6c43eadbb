"""When a run looks for the blocks to keep, where the masks that it found live until it ends, and whether they still hold.

What is looked at, and how blocks are chosen from it, is `kernels.sparsity`. A recipe with a `quick` estimator looks exactly, once a run:
in the last dense step, or where that was skipped in the first step that could be sparse, which then stays dense. Later steps use the masks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.block_mask import BlockMask, num_blocks
from ...kernels.sparsity import Arrangement, TokenGrid, choose
from .report import HOST, SPARSE
from .settings import AttentionSettings

LOOK = "look"
"""The outcome of a call that runs as the host has it, and is looked at."""

Key = tuple[int | None, Hashable, TokenGrid | None, tuple[int, ...]]
"""(layer, place in the step, grid, shape of q): all that tells a call from others whose queries and keys mean something else."""

FACTOR = 1.75
"""Measured / predicted error before anything is measured: blocks' errors add up worse than the prediction takes them to. On the default
model's recorded heads 1.2 to 2.0 (5 to 95 %), on planted ones 2.4 (bench/results/truth.md). What a run measures takes its place."""

SEARCH_PAYS = 3
"""Sparse steps that a search must serve: it costs about as much as a dense call."""

MOST_WORK = 0.9
"""Of a dense call, beyond which a sparse one gains nothing."""

GUARD_ROWS = (32, 64)
"""Fewest and most queries of a call that are computed exactly, too; between them one in 1024, which costs a thousandth of a dense call."""

LEARNING = 0.3
"""How far one measurement, of so few queries, moves the factor, on the scale of logarithms."""


@dataclass(eq=False)
class Found:
    """A mask of one place in the network, as bits, and what is known of it. kept, work: 0-dim tensors on the mask's device."""

    bits: Tensor
    sizes: tuple[int, int, int, int]  # block_m, block_n, key blocks, width
    turn: int
    kept: Tensor  # block pairs
    work: Tensor  # pairs, the tail's included, of all
    predicted: float | None = None  # error, without a factor
    target: float = math.inf  # error that it was to keep
    dense: bool = False  # to keep that error takes nearly all

    def mask(self, device: torch.device) -> BlockMask:
        return BlockMask.from_bits(self.bits.to(device, non_blocking=True), *self.sizes)


class Masks:
    """The masks of a run: on their device up to a bound, beyond it in pinned host memory."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._found: dict[Key, Found] = {}
        self.peak = {"device": 0, "host": 0}
        """Bytes, the most of the run."""

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Key) -> Found | None:
        return self._found.get(key)

    def put(self, key: Key, mask: BlockMask, arrangement: Arrangement, turn: int) -> Found:
        self._found.pop(key, None)
        key_blocks = num_blocks(arrangement.positions, mask.block_n)
        bits = mask.to_bits(key_blocks)
        if bits.is_cuda and self._bytes("device") + bits.nbytes > self._most_bytes:
            bits = bits.cpu().pin_memory()
        sizes = mask.block_m, mask.block_n, key_blocks, mask.indices.shape[-1]
        batch, heads = key[-1][:2]
        kept = mask.counts.expand(batch, heads, -1).sum()
        found = self._found[key] = Found(bits, sizes, turn, kept, arrangement.work(mask))
        self.peak.update({where: max(peak, self._bytes(where)) for where, peak in self.peak.items()})
        return found

    def keep_since(self, turn: int) -> None:
        """Forget what is older."""
        self._found = {key: found for key, found in self._found.items() if found.turn >= turn}

    def clear(self) -> None:
        self._found.clear()

    def _bytes(self, where: str) -> int:
        """Masks that were never on a CUDA device count as on theirs."""
        pinned = where == "host"
        return sum(found.bits.nbytes for found in self._found.values() if found.bits.is_pinned() == pinned)


class Search:
    """Decides for a recipe that looks once when it does, and learns from what the guard measures."""

    def __init__(
        self, settings: AttentionSettings, masks: Masks, density: float, sigmas: Sequence[float], window: tuple[float, float], dense_steps: int
    ):
        """density: what counts without an error. sigmas: noise levels of the run, () where they are not known. window: lowest and highest level
        whose calls may be sparse."""
        self._settings, self._masks, self._density = settings, masks, density
        self._sigmas, self._window, self._dense_steps = sorted(set(sigmas[:-1])), window, dense_steps
        self._factors: dict[Key, float] = {}
        self._off_target: set[Key] = set()

    def ahead(self, sigma: float, step: int) -> bool:
        """Whether a dense step is the last before sparse ones, enough of them to look now."""
        lowest, highest = self._window
        below = [level for level in self._sigmas if level < sigma]
        last = step == self._dense_steps - 1 if self._dense_steps else bool(below) and lowest <= below[-1] <= highest < sigma
        return last and self.pays(sigma)

    def pays(self, sigma: float) -> bool:
        """Whether enough sparse steps come after this one."""
        lowest, highest = self._window
        return not self._sigmas or sum(lowest <= level <= highest and level < sigma for level in self._sigmas) >= SEARCH_PAYS

    def decide(self, key: Key, sigma: float, turn: int) -> tuple[str, str | None]:
        """(outcome, why it is not sparse) of a call that may be sparse."""
        found, every = self._masks.get(key), self._settings.search_every
        stale = found is None or key in self._off_target or (every > 0 and turn - found.turn >= every)
        if stale and self.pays(sigma):
            return LOOK, "looked at exactly, for the steps that follow"
        if found is not None and found.dense:
            return HOST, f"an error of {100 * found.target:g}% takes nearly all pairs"
        return SPARSE, None

    def look(
        self, key: Key, turn: int, arrangement: Arrangement, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float | None
    ) -> bool:
        """Find the blocks to keep in the calls of `key`, from this one's tensors. False where their scores are not finite: nothing is kept."""
        settings = self._settings
        budget = {"density": self._density} if settings.error is None else {"error": settings.error / self._factors.get(key, FACTOR)}
        mask, errors = choose(settings.recipe, arrangement, q, k, v, **budget, scale=scale, key_bias=key_bias, settings=settings.method_settings)
        assert errors is not None, "a recipe that looks once predicts its error"
        predicted = float(errors.square().mean().sqrt())
        if not math.isfinite(predicted):
            return False
        found = self._masks.put(key, mask, arrangement, turn)
        found.predicted = predicted
        found.target = self.expected(key) if settings.error is None else settings.error
        found.dense = settings.error is not None and bool(found.work > MOST_WORK)
        self._off_target.discard(key)
        return True

    def expected(self, key: Key) -> float:
        """The error that is expected of a call with the mask of `key`, with what this run has learned."""
        found = self._masks.get(key)
        assert found is not None and found.predicted is not None
        return found.predicted * self._factors.get(key, FACTOR)

    def observe(self, key: Key, measured: float) -> None:
        """Learn from a call's measured error. A place beyond twice its target is looked at again."""
        found = self._masks.get(key)
        if found is None or not found.predicted or not 0.0 < measured < math.inf:
            return
        factor = self._factors.get(key, FACTOR)
        self._factors[key] = factor * (measured / found.predicted / factor) ** LEARNING
        if measured > 2 * found.target:
            self._off_target.add(key)


def guard_rows(tokens: int, turn: int, device: torch.device) -> Tensor:
    """Queries of a call to compute exactly, too: spread over the sequence, others in every step; int64."""
    fewest, most = GUARD_ROWS
    count = min(tokens, max(fewest, min(most, tokens // 1024)))
    stride = tokens // count
    row = torch.arange(count, device=device)
    # One in every stride, where in it as good as at random: a fixed place would be one column of the picture.
    return row * stride + (row * row * 31 + row * 7919 + turn * 104729) % stride
