"""Decides what happens to each attention call of a patched model, and counts it. Knows no host.

A host glue (`nodes/attention/host.py`, `models/patchers/diffusers.py`) creates one `AttentionPatch` per patched model, one `ModelCall`
per forward of the network, and hands every attention call to `AttentionPatch.attend` with a `dense()` to fall back on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import attention as kernel
from ...kernels import dispatch
from ...kernels.block_mask import BlockMask, num_blocks
from ...kernels.sparsity import Arrangement, TokenGrid, describe, get, prepare, sparse_attention
from ..families import TokenSpans
from .report import HOST, QUANTIZED, SPARSE, AttentionReport, CallRecord, ModelCallRecord, clock
from .settings import BLOCK_SIZES, FEW_STEPS, AttentionSettings


def auto_block(tokens: int) -> int:
    """Largest block size that leaves at least 16 blocks, so that there is something to choose from."""
    return next((block for block in BLOCK_SIZES if tokens >= 16 * block), BLOCK_SIZES[-1])


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


CPU = torch.device("cpu")


@dataclass(eq=False)
class ModelCall:
    """One forward of the network: what is known before its first attention call.

    spans: None for an unknown family. sigma: noise level of this call. branch: identifies the conditioning (cond, uncond, ...) and, where
    a host cuts the latent, the window. device: where the network runs. The rest is the patch's own.
    """

    spans: TokenSpans | None
    sigma: float
    branch: Hashable = None
    device: torch.device = CPU
    step: int = 0
    turn: int = 0  # how often sigma has changed in this run
    place: Hashable = None  # what tells this call from the others of its step
    layer: int = 0
    force_dense: bool = False
    start: Any = None
    before: tuple[int, Counter[str]] = (0, Counter())  # the report when this call began
    checks: list[tuple[int | None, str, Tensor]] = field(default_factory=list)


class AttentionPatch:
    """The state of one patched model. It dies with the model; `start` forgets everything of an earlier run."""

    def __init__(self, settings: AttentionSettings, keep: Callable[[], AbstractContextManager[Any]] = nullcontext):
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
        self._scheduled = percent_to_sigma is not None
        self._dense_steps = 0
        self._sigma_window = (0.0, math.inf)
        self.report = AttentionReport(settings.method, settings.precision)
        self._sigmas: list[float] = []
        self._turn = 0
        self._sigma: float | None = None
        self._places: Counter[Hashable] = Counter()
        self._arrangements: dict[Hashable, Arrangement] = {}
        self._masks: dict[Hashable, tuple[int, BlockMask]] = {}
        self._choices: dict[Hashable, dispatch.Choice] = {}
        self._disabled: set[tuple[int | None, str]] = set()
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

    @property
    def knows_its_schedule(self) -> bool:
        """Whether the settings that depend on the noise schedule can be followed: `start` was given it, or no setting asks for it."""
        settings = self.settings
        asks = settings.start_percent > 0.0 or settings.end_percent < 1.0 or settings.gentle_few_steps
        return self._scheduled or not asks

    def release(self) -> None:
        """Drop the tensors; the report stays."""
        self._arrangements.clear()
        self._masks.clear()

    def begin(self, call: ModelCall) -> None:
        """Announce a model call. Steps are counted by distinct sigma, so that any sampler and any split of CFG counts alike."""
        if call.sigma not in self._sigmas:
            self._sigmas.append(call.sigma)
        if call.sigma != self._sigma:
            if self._sigma is not None and call.sigma > self._sigma:
                self._masks.clear()  # noise was added again: what was chosen for less of it is stale
            self._sigma = call.sigma
            self._turn += 1
            self._places.clear()
            self._masks = {key: kept for key, kept in self._masks.items() if self._turn - kept[0] < self.settings.mask_refresh}
        call.step, call.turn = self._sigmas.index(call.sigma), self._turn
        # Guidance passes may share a conditioning: they are told apart by their order in the step.
        call.place = (call.branch, self._places[call.branch])
        self._places[call.branch] += 1
        self._open(call)

    def _open(self, call: ModelCall) -> None:
        call.before = (len(self.report.records), self.report.other.copy())
        call.start = clock(call.device)

    def again(self, call: ModelCall) -> ModelCall:
        """The call that repeats `call` dense. What `call` recorded is struck from the report."""
        first, self.report.other = call.before
        del self.report.records[first:]
        repeat = replace(call, layer=0, force_dense=True, checks=[])
        self._open(repeat)
        return repeat

    def finish(self, call: ModelCall) -> bool:
        """Close a model call. True when its output is not finite because of this patch: the host must do the call again, dense.

        The one device read of a model call. Layers that produced the value are disabled at that precision for the run.
        """
        if call.checks:
            # A sum is finite exactly where all its terms are, at a tenth of the cost of looking at each.
            finite = torch.stack([total for _, _, total in call.checks]).isfinite().tolist()
            bad = [(layer, precision) for (layer, precision, _), ok in zip(call.checks, finite, strict=True) if not ok]
            if bad:
                self._disabled.update(bad)
                layer, precision = bad[0]
                self.report.repeated += 1
                self.report.notes[f"non-finite output at layer {layer} ({precision}): the model call was done again dense"] += 1
                return True
        self.report.model_calls.append(ModelCallRecord(call.start, clock(call.device), self.report.records[call.before[0] :]))
        return False

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
        """Compute one attention call and count it. Whatever a model passes: what is not understood runs dense, with its reason.

        q, k, v: `(batch, heads, tokens, head_dim)`. dense(): the host's own attention, in the host's shape; it is what runs, untouched,
        whenever the call is not accelerated. to_host: brings a `(batch, heads, tokens, head_dim)` result into the host's shape.
        key_bias: `(batch, k_len)` or None. unsupported: why the host knows that this call must stay dense. quantize: False forbids
        quantized operands (some models ask for it).
        """
        try:
            problem = dispatch.describe(q, k, v, key_bias=key_bias)
        except ValueError as error:
            self.report.other[str(error)] += 1
            return dense()
        if problem.q_len != problem.k_len:
            self.report.other["cross-attention"] += 1
            return dense()

        grid = None if call.spans is None else call.spans.grid(problem.q_len, problem.k_len)
        layer = None
        if call.spans is None or grid is not None:
            layer = call.layer
            call.layer += 1
        else:
            unsupported = "another length than the video's"
        outcome, reason, in_window = self._decide(call, layer, problem.q_len, grid, unsupported)
        shape = (q.shape[0], problem.num_heads, problem.num_kv_heads, problem.q_len, problem.head_dim)
        choice = arrangement = None
        if outcome != HOST:
            if outcome == SPARSE:
                arrangement = self._arrangement(grid, q)
                problem = describe(arrangement, q, k, v, key_bias=key_bias)
            choice, refusal = self._choice(problem, quantize, layer)
            if choice is None:
                reason = refusal if outcome == SPARSE else reason
                outcome = HOST

        kept, pairs = None, 1
        start = clock(q.device)
        if choice is None:
            out = dense()
        else:
            if arrangement is not None:
                result, kept, pairs = self._sparse(call, layer, grid, arrangement, q, k, v, choice, key_bias, scale)
            else:
                result = kernel.attention(q, k, v, key_bias=key_bias, choice=choice, scale=scale)
            with self._keep():
                call.checks.append((layer, choice.taken().precision, result.detach().sum(dtype=torch.float32)))
            out = to_host(result)
        name = None if choice is None else choice.taken().name
        self.report.records.append(CallRecord(call.step, layer, shape, outcome, start, clock(q.device), kept, pairs, in_window, reason, name))
        return out

    def _decide(self, call: ModelCall, layer: int | None, tokens: int, grid: TokenGrid | None, refusal: str | None) -> tuple[str, str | None, bool]:
        """(outcome, why it is not sparse, whether it could have been: long enough, and in a step and block that may be)."""
        settings = self.settings
        if call.force_dense:
            return HOST, "repeated after non-finite output", False
        alternative = QUANTIZED if refusal is None else HOST
        if tokens < settings.min_tokens:
            return alternative, refusal or f"{tokens} tokens, fewer than min_tokens {settings.min_tokens}", False
        if tokens < 2 * self._block(tokens):
            return alternative, refusal or f"only {tokens} tokens", False
        if self.density >= 1.0:
            return alternative, refusal or "density 1", False
        lowest, highest = self._sigma_window
        if not lowest <= call.sigma <= highest or call.step < self._dense_steps:
            return HOST, "outside the sparse steps", False
        if layer in settings.dense_blocks:
            return HOST, "dense block", False
        if refusal is None and grid is None and self.recipe.needs_grid:
            refusal = f"unknown model family: {self.recipe.name} needs the token grid, sparge does not"
        return (SPARSE, None, True) if refusal is None else (HOST, refusal, True)

    def _block(self, tokens: int) -> int:
        return self.settings.block or auto_block(tokens)

    def _choice(self, problem: dispatch.Problem, quantize: bool, layer: int | None) -> tuple[dispatch.Choice | None, str]:
        """(what computes the call, "") or (None, reason). Dense calls gain nothing from us at native precision: the host keeps them."""
        wanted = self.settings.precision if quantize else "native"
        key = (problem, wanted, dispatch.forced.get())
        found = self._choices.get(key)
        if found is None:
            found = self._choices[key] = self._choose(problem, wanted)
        if found.implementation is None:
            return None, _first_reason(found)
        precision = found.implementation.precision
        if problem.blocks is None and precision == "native":
            return None, "native precision"
        if (layer, precision) in self._disabled:
            return None, f"{precision} disabled at this layer after non-finite output"
        return found, ""

    def _choose(self, problem: dispatch.Problem, wanted: str) -> dispatch.Choice:
        choice = kernel.explain(problem, wanted)
        if choice.implementation is None and wanted not in ("auto", "native"):
            self.report.notes[f"{wanted} is not available here, native precision used: {_first_reason(choice)}"] += 1
            self.report.refusals.update(choice.refusals)
            choice = kernel.explain(problem, "native")
        self.report.refusals.update(choice.refusals)
        return choice

    def _sparse(
        self,
        call: ModelCall,
        layer: int | None,
        grid: TokenGrid | None,
        arrangement: Arrangement,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: dispatch.Choice,
        key_bias: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, int]:
        """(output, number of kept block pairs, of all): with the mask of an earlier step where one is kept."""
        key = (layer, call.place, grid, q.shape)
        mask = self._masks[key][1] if key in self._masks else None
        out, used = sparse_attention(
            self.recipe,
            arrangement,
            q,
            k,
            v,
            density=self.density,
            choice=choice,
            scale=scale,
            mask=mask,
            key_bias=key_bias,
            settings=self.settings.method_settings,
        )
        with self._keep():
            if self.settings.mask_refresh > 1 and mask is None:
                self._masks[key] = (call.turn, replace(used, indices=used.indices.clone(), counts=used.counts.clone()))
            pairs = q.shape[0] * q.shape[1] * used.counts.shape[2] * num_blocks(k.shape[2], used.block_n)
            return out, used.counts.expand(*q.shape[:2], -1).sum(), pairs

    def _arrangement(self, grid: TokenGrid | None, q: Tensor) -> Arrangement:
        block = self._block(q.shape[2])
        key = (grid, q.shape[2], q.device, block)
        arrangement = self._arrangements.get(key)
        if arrangement is None:
            with self._keep():
                arrangement = self._arrangements[key] = prepare(self.recipe, grid, q.device, block=block, seq_len=q.shape[2])
        return arrangement


def _first_reason(choice: dispatch.Choice) -> str:
    return next((f"{name}: {reason}" for name, reason in choice.refusals.items()), "no backend is registered")
