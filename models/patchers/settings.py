"""What a user may ask of the attention patch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...kernels import dispatch
from ...kernels.sparsity import Recipe, get, with_tail

BLOCK_SIZES = (128, 64, 32, 16)

MIN_TOKENS = 12288
"""Below about this length dense quantized attention is at least as fast (SpargeAttn #107, WanVideoWrapper #852; core's own default)."""

FEW_STEPS = 8
"""Distilled models sample in this many steps or fewer; a dense window of 20 % would be less than two of them (ComfyUI #16382)."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a user asked for. `validate` raises ValueError naming the setting, its value and the remedy.

    density: kept / all (query block, key block) pairs of the sparse calls, forced ones included. 1.0 = no sparsity.
    error: for a method that predicts one, the error |out - exact| / |exact| that a call may have, in place of the density, which then only
        serves runs in which looking exactly does not pay. None: the density counts.
    tail: what is left out stands in the softmax as pooled keys, with any method.
    precision: "auto" or one of `dispatch.PRECISIONS`.
    start_percent, end_percent: the part of sampling, in percent of the noise schedule, whose calls may be sparse.
    gentle_few_steps: on schedules of FEW_STEPS steps or fewer, one dense step replaces start_percent and density is at least 0.5.
    dense_blocks: layers (transformer blocks, counted in the order of execution) that stay dense.
    min_tokens: shorter sequences stay dense.
    block: tokens in a block, or None for the largest of 128, 64, 32, 16 that leaves 16 blocks.
    mask_refresh: steps that share one block mask (of one layer, in calls of one conditioning, window and place in the step), of a method
        that chooses at every call. search_every: steps after which a method that looks once looks again; 0: never.
    mask_bytes: memory on the device for masks that are kept; what is beyond it waits in pinned host memory.
    """

    method: str = "tessera"
    density: float = 0.3
    error: float | None = None
    tail: bool = False
    precision: str = "auto"
    method_settings: dict[str, float] = field(default_factory=dict)
    start_percent: float = 0.2
    end_percent: float = 1.0
    gentle_few_steps: bool = False
    dense_blocks: frozenset[int] = frozenset()
    min_tokens: int = MIN_TOKENS
    block: int | None = None
    mask_refresh: int = 1
    search_every: int = 0
    mask_bytes: int = 300 << 20

    @property
    def recipe(self) -> Recipe:
        recipe = get(self.method)
        return with_tail(recipe) if self.tail else recipe

    def validate(self) -> None:
        recipe = self.recipe
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density is {self.density}; use a value above 0 and up to 1 (1 = dense)")
        if self.error is not None and not 0.0 < self.error <= 1.0:
            raise ValueError(f"error is {self.error}; use a value above 0 and up to 1, such as 0.08 for 8 %, or none for a density")
        if self.error is not None and not recipe.by_error:
            raise ValueError(f"error is {self.error}, but {self.method} cannot predict one; use tessera, or give it a density")
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise ValueError(f"start_percent is {self.start_percent}, end_percent {self.end_percent}; use 0 <= start_percent <= end_percent <= 1")
        if self.precision != "auto" and self.precision not in dispatch.PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; use 'auto' or one of {', '.join(dispatch.PRECISIONS)}")
        if self.block is not None and self.block not in BLOCK_SIZES:
            raise ValueError(f"block is {self.block}; use one of {', '.join(map(str, BLOCK_SIZES))}, or 0 for automatic")
        if self.mask_refresh < 1:
            raise ValueError(f"mask_refresh is {self.mask_refresh}; use 1 or more steps")
        if self.search_every < 0:
            raise ValueError(f"search_every is {self.search_every}; use a number of steps, or 0 to look once a run")
        unknown = set(self.method_settings) - set(recipe.settings)
        if unknown:
            raise ValueError(f"{self.method} has no setting {', '.join(sorted(unknown))}; it has {', '.join(recipe.settings) or 'none'}")


MAX_LAYERS = 10000
"""More than any network has: a typing error must not fill the memory with numbers."""


def parse_layers(text: str) -> frozenset[int]:
    """Layer numbers of "0,1" or "0-3, 7". Raises ValueError naming the text."""
    layers: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        numbers = first.isdecimal() and (last.isdecimal() or not dash) and max(len(first), len(last)) <= len(str(MAX_LAYERS))
        if not numbers or not int(first) <= int(last or first) < MAX_LAYERS:
            raise ValueError(f"dense_blocks is {text!r:.60}; use block numbers and ranges such as 0,1 or 0-3, below {MAX_LAYERS}")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)
