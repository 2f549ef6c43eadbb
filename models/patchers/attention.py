"""Decides what happens to each attention call of a patched model, and counts it. Knows no host.

A host glue (`nodes/host.py`, `models/patchers/diffusers.py`) creates one `AttentionPatch` per patched model, one `ModelCall`
per forward of the network, and hands every attention call to `AttentionPatch.attend` with a `dense()` to fall back on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...kernels import attention as kernel
from ...kernels import dispatch
from ...kernels.block_mask import BlockMask, num_blocks
from ...kernels.sparsity import Layout, TokenGrid, get, prepare, sparse_attention
from ..families import TokenLayout
from .report import HOST, QUANTIZED, SPARSE, AttentionReport, CallRecord, clock

MIN_TOKENS = 12288
"""Below about this length dense quantized attention is at least as fast (SpargeAttn #107, WanVideoWrapper #852; core's own default)."""

FEW_STEPS = 8
"""Distilled models sample in this many steps or fewer; a dense window of 20 % would be less than two of them (ComfyUI #16382)."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a user asked for. `validate` raises ValueError naming the setting, its value and the remedy.

    density: kept / all (query block, key block) pairs of the sparse calls, forced ones included. 1.0 = no sparsity.
    precision: "auto" or one of `dispatch.PRECISIONS`.
    start_percent, end_percent: the part of sampling, in percent of the noise schedule, whose calls may be sparse.
    gentle_few_steps: on schedules of FEW_STEPS steps or fewer, one dense step replaces start_percent and density is at least 0.5.
    dense_blocks: transformer blocks, counted in the order of execution, that stay dense.
    min_tokens: shorter sequences stay dense.
    block: tokens in a block, or None for the largest of 128, 64, 32, 16 that leaves 16 blocks.
    mask_refresh: model steps that share one block mask (per layer and per conditioning branch).
    """

    method: str = "rainfusion2"
    density: float = 0.3
    precision: str = "auto"
    method_settings: dict[str, float] = field(default_factory=dict)
    start_percent: float = 0.2
    end_percent: float = 1.0
    gentle_few_steps: bool = False
    dense_blocks: frozenset[int] = frozenset()
    min_tokens: int = MIN_TOKENS
    block: int | None = None
    mask_refresh: int = 1

    def validate(self) -> None:
        get(self.method)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density is {self.density}; use a value above 0 and up to 1 (1 = dense)")
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise ValueError(f"start_percent is {self.start_percent}, end_percent {self.end_percent}; use 0 <= start_percent <= end_percent <= 1")
        if self.precision != "auto" and self.precision not in dispatch.PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; use 'auto' or one of {', '.join(dispatch.PRECISIONS)}")
        if self.block is not None and self.block not in BLOCKS:
            raise ValueError(f"block is {self.block}; use one of {', '.join(map(str, BLOCKS))}, or 0 for automatic")
        if self.mask_refresh < 1:
            raise ValueError(f"mask_refresh is {self.mask_refresh}; use 1 or more steps")
        unknown = set(self.method_settings) - set(get(self.method).settings)
        if unknown:
            raise ValueError(f"{self.method} has no setting {', '.join(sorted(unknown))}; it has {', '.join(get(self.method).settings) or 'none'}")


BLOCKS = (128, 64, 32, 16)


MAX_BLOCKS = 10000
"""More transformer blocks than any network has: a typing error must not fill the memory with numbers."""


def parse_blocks(text: str) -> frozenset[int]:
    """Block numbers of "0,1" or "0-3, 7". Raises ValueError naming the text."""
    blocks: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or not int(first) <= int(last or first) < MAX_BLOCKS:
            raise ValueError(f"dense_blocks is {text!r}; use block numbers and ranges such as 0,1 or 0-3, below {MAX_BLOCKS}")
        blocks.update(range(int(first), int(last or first) + 1))
    return frozenset(blocks)


def auto_block(tokens: int) -> int:
    """Largest block size that leaves at least 16 blocks, so that there is something to choose from."""
    return next((block for block in BLOCKS if tokens >= 16 * block), BLOCKS[-1])


def percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The percent (0..1) of a noise level: the inverse of a decreasing percent_to_sigma, to 1e-4."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return high if high > 1e-3 else 0.0


class ModelCall:
    """One forward of the network: what is known before its first attention call.

    layout: None for an unknown family. sigma: noise level of this call. branch: identifies the conditioning (cond, uncond, ...).
    """

    def __init__(self, layout: TokenLayout | None, sigma: float, branch: Hashable = None):
        self.layout = layout
        self.sigma = sigma
        self.branch = branch
        self.step = 0
        self.layer = 0
        self.force_dense = False
        self.before: tuple[int, Counter[str], Counter[str]] = (0, Counter(), Counter())  # the report when this call began
        self.checks: list[tuple[int, str, Tensor]] = []


class AttentionPatch:
    """The state of one patched model. It dies with the model; `start` forgets everything of an earlier run."""

    def __init__(self, settings: AttentionSettings, keep: Callable[[], AbstractContextManager] = nullcontext):
        """keep: entered around the creation of tensors that outlive an attention call (ComfyUI's compiler must know them)."""
        settings.validate()
        self.settings = settings
        self.recipe = get(settings.method)
        self._keep = keep
        self.start()

    def start(self, percent_to_sigma: Callable[[float], float] | None = None, sigmas: Sequence[float] = ()) -> None:
        """Begin a sampling run and forget the one before.

        percent_to_sigma: the model's noise schedule, decreasing, percent in 0..1. sigmas: this run's noise levels, one more than steps.
        """
        settings = self.settings
        self.density = settings.density
        self._dense_steps = 0
        self._sigma_window = (0.0, math.inf)
        self.report = AttentionReport(settings.method, settings.precision)
        self._sigmas: list[float] = []
        self._layouts: dict[tuple, Layout] = {}
        self._masks: dict[tuple, tuple[int, BlockMask]] = {}
        self._choices: dict[tuple, tuple[str | None, str]] = {}
        self._disabled: set[tuple[int, str]] = set()
        if percent_to_sigma is not None:
            start = settings.start_percent
            if settings.gentle_few_steps and len(sigmas) > 1:
                first, last = percent_of(sigmas[0], percent_to_sigma), percent_of(sigmas[-1], percent_to_sigma)
                # A run over a part of the schedule (high/low-noise pairs) is judged by the steps that the whole would have.
                whole = round((len(sigmas) - 1) / max(last - first, 1e-3))
                if whole <= FEW_STEPS:
                    start = 0.0
                    self._dense_steps = 1 if first < 0.5 / whole else 0
                    self.density = max(self.density, 0.5)
                    self.report.notes[f"{whole} steps: one dense step, density at least 0.5"] += 1
            self._sigma_window = (percent_to_sigma(settings.end_percent), percent_to_sigma(start) if start > 0.0 else math.inf)
        self.report.density = self.density

    def release(self) -> None:
        """Drop the tensors; the report stays."""
        self._layouts.clear()
        self._masks.clear()

    def begin(self, call: ModelCall) -> None:
        """Announce a model call. Steps are counted by distinct sigma, so that any sampler and any split of CFG counts alike."""
        if call.sigma not in self._sigmas:
            self._sigmas.append(call.sigma)
        call.step = self._sigmas.index(call.sigma)
        call.before = (len(self.report.records), self.report.reasons.copy(), self.report.backends.copy())

    def again(self, call: ModelCall) -> ModelCall:
        """The call that repeats `call` dense. What `call` recorded is struck from the report."""
        first, self.report.reasons, self.report.backends = call.before
        del self.report.records[first:]
        repeat = ModelCall(call.layout, call.sigma, call.branch)
        repeat.force_dense = True
        self.begin(repeat)
        return repeat

    def finish(self, call: ModelCall) -> bool:
        """Close a model call. True when its output is not finite because of this patch: the host must do the call again, dense.

        The one device read of a model call. Layers that produced the value are disabled at that precision for the run.
        """
        if not call.checks:
            return False
        # A sum is finite exactly where all its terms are, at a tenth of the cost of looking at each.
        finite = torch.stack([total for _, _, total in call.checks]).isfinite().tolist()
        bad = [(layer, precision) for (layer, precision, _), ok in zip(call.checks, finite, strict=True) if not ok]
        if not bad:
            return False
        self._disabled.update(bad)
        layer, precision = bad[0]
        self.report.repeated += 1
        self.report.notes[f"non-finite output at layer {layer} ({precision}): the model call was done again dense"] += 1
        return True

    def attend(
        self,
        call: ModelCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dense: Callable[[], Tensor],
        to_host: Callable[[Tensor], Tensor],
        *,
        key_bias: Tensor | None = None,
        unsupported: str | None = None,
        quantize: bool = True,
        scale: float | None = None,
    ) -> Tensor:
        """Compute one attention call and count it.

        q, k, v: `(batch, heads, tokens, head_dim)`. dense(): the host's own attention, in the host's shape; it is what runs, untouched,
        whenever the call is not accelerated. to_host: brings a `(batch, heads, tokens, head_dim)` result into the host's shape.
        key_bias: `(batch, k_len)` or None. unsupported: why the host knows that this call must stay dense. quantize: False forbids
        quantized operands (some models ask for it).
        """
        q_len, k_len = q.shape[2], k.shape[2]
        grid = None
        if call.layout is not None:
            grid = call.layout.grid(q_len, k_len)
        if grid is None and (call.layout is not None or q_len != k_len):
            self.report.reasons["cross-attention" if q_len != k_len else "not the video's self-attention"] += 1
            return dense()

        layer = call.layer
        call.layer += 1
        outcome, reason = self._decide(call, layer, q_len, grid, unsupported)
        in_window = outcome == SPARSE
        precision = None
        if in_window and grid is None and self.recipe.needs_grid:
            outcome, reason = HOST, f"unknown model family: {self.recipe.name} needs the token grid, sparge does not"
        if outcome != HOST:
            blocks = (self._block(q_len),) * 2 if outcome == SPARSE else None
            precision, refusal = self._precision(q, k, blocks, key_bias is not None, quantize, layer)
            if precision is None:
                outcome, reason = HOST, refusal if outcome == SPARSE else reason
        if reason is not None:
            self.report.reasons[reason] += 1

        kept, pairs = None, 1
        start = clock(q.device)
        if outcome == HOST or precision is None:
            out = dense()
        else:
            if outcome == SPARSE:
                result, kept, pairs = self._sparse(call, layer, grid, q, k, v, precision, key_bias, scale)
            else:
                result = kernel.attention(q, k, v, key_bias=key_bias, precision=precision, scale=scale)
            with self._keep():
                call.checks.append((layer, precision, result.sum(dtype=torch.float32)))
            out = to_host(result)
        self.report.records.append(CallRecord(call.step, layer, q_len, outcome, start, clock(q.device), kept, pairs, in_window))
        return out

    def _decide(self, call: ModelCall, layer: int, tokens: int, grid: TokenGrid | None, unsupported: str | None) -> tuple[str, str | None]:
        """(outcome, reason why it is not sparse)."""
        settings = self.settings
        if call.force_dense:
            return HOST, "repeated after non-finite output"
        if unsupported is not None:
            return HOST, unsupported
        if tokens < max(settings.min_tokens, 2 * self._block(tokens)):
            return (
                QUANTIZED,
                f"{tokens} tokens, fewer than min_tokens {settings.min_tokens}" if tokens < settings.min_tokens else f"only {tokens} tokens",
            )
        if self.density >= 1.0:
            return QUANTIZED, "density 1"
        lowest, highest = self._sigma_window
        if not lowest <= call.sigma <= highest or call.step < self._dense_steps:
            return HOST, "outside the sparse steps"
        if layer in settings.dense_blocks:
            return HOST, "dense block"
        return SPARSE, None

    def _block(self, tokens: int) -> int:
        return self.settings.block or auto_block(tokens)

    def _precision(self, q: Tensor, k: Tensor, blocks: tuple[int, int] | None, bias: bool, quantize: bool, layer: int) -> tuple[str | None, str]:
        """The precision to run at, or None and the reason. Dense calls gain nothing from us at native precision: the host keeps them."""
        wanted = self.settings.precision if quantize else "native"
        key = (q.shape, k.shape, q.dtype, q.device, blocks, bias, wanted)
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = self._choose(q, k, blocks, bias, wanted)
        precision, reason = found
        if precision is not None and (layer, precision) in self._disabled:
            return None, f"{precision} disabled at this layer after non-finite output"
        if precision is not None:
            self.report.backends[reason] += 1
            return precision, ""
        return None, reason

    def _choose(self, q: Tensor, k: Tensor, blocks: tuple[int, int] | None, bias: bool, wanted: str) -> tuple[str | None, str]:
        """(precision, implementation name) or (None, reason)."""
        problem = dispatch.Problem(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], blocks, bias)
        choice = kernel.explain(problem, wanted)
        if choice.implementation is None and wanted not in ("auto", "native"):
            self.report.notes[f"{wanted} is not available here, native precision used: {_first_reason(choice)}"] += 1
            self.report.refusals.update(choice.refusals)
            choice = kernel.explain(problem, "native")
        self.report.refusals.update(choice.refusals)
        found = choice.implementation
        if found is None:
            return None, _first_reason(choice)
        if blocks is None and found.precision == "native":
            return None, "native precision"
        return found.precision, found.name

    def _sparse(self, call, layer, grid, q, k, v, precision, key_bias, scale) -> tuple[Tensor, Tensor, int]:
        block = self._block(q.shape[2])
        layout = self._layout(grid, q, block)
        key = (layer, call.branch, q.shape)
        kept = self._masks.get(key) if self.settings.mask_refresh > 1 else None
        mask = kept[1] if kept is not None and call.step - kept[0] < self.settings.mask_refresh else None
        out, used = sparse_attention(
            self.recipe,
            layout,
            q,
            k,
            v,
            density=self.density,
            precision=precision,
            scale=scale,
            mask=mask,
            key_bias=key_bias,
            settings=self.settings.method_settings,
        )
        with self._keep():
            if self.settings.mask_refresh > 1 and mask is None:
                self._masks[key] = (call.step, replace(used, indices=used.indices.clone(), counts=used.counts.clone()))
            pairs = q.shape[0] * q.shape[1] * used.counts.shape[2] * num_blocks(k.shape[2], used.block_n)
            return out, used.counts.expand(*q.shape[:2], -1).sum(), pairs

    def _layout(self, grid: TokenGrid | None, q: Tensor, block: int) -> Layout:
        key = (grid, q.shape[2], q.device, block)
        layout = self._layouts.get(key)
        if layout is None:
            with self._keep():
                layout = self._layouts[key] = prepare(self.recipe, grid, q.device, block=block, seq_len=q.shape[2])
        return layout


def _first_reason(choice: dispatch.Choice) -> str:
    return next((f"{name}: {reason}" for name, reason in choice.refusals.items()), "no backend is registered")
