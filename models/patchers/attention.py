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
from ...kernels.block_mask import num_blocks
from ...kernels.sparsity import Arrangement, TokenGrid, affordable, describe, prepare, sampled_error, sparse_attention
from ..families import TokenSpans
from .report import HOST, QUANTIZED, SPARSE, AttentionReport, CallRecord, ModelCallRecord, clock
from .search import LOOK, Key, Masks, Search, guard_rows
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

OUTSIDE = "outside the sparse steps"


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
    guards: list[tuple[CallRecord, Key, Tensor]] = field(default_factory=list)  # measured errors


class AttentionPatch:
    """The state of one patched model. It dies with the model; `start` forgets everything of an earlier run."""

    def __init__(self, settings: AttentionSettings, keep: Callable[[], AbstractContextManager[Any]] = nullcontext):
        """keep: entered around the creation of tensors that outlive an attention call (ComfyUI's compiler must know them)."""
        settings.validate()
        self.settings = settings
        self.recipe = settings.recipe
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
        self.masks = Masks(settings.mask_bytes)
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
                    floor = "" if settings.error is not None else ", density at least 0.5"
                    self.report.notes[f"{whole} steps: one dense step{floor}"] += 1
            self._sigma_window = (percent_to_sigma(settings.end_percent), percent_to_sigma(start) if start > 0.0 else math.inf)
        self.report.density, self.report.error, self.report.mask_bytes = self.density, settings.error, self.masks.peak
        self._search: Search | None = None
        if self.recipe.quick is not None:
            self._search = Search(settings, self.masks, self.density, sigmas, self._sigma_window, self._dense_steps)

    @property
    def knows_its_schedule(self) -> bool:
        """Whether the settings that depend on the noise schedule can be followed: `start` was given it, or no setting asks for it."""
        settings = self.settings
        asks = settings.start_percent > 0.0 or settings.end_percent < 1.0 or settings.gentle_few_steps
        return self._scheduled or not asks

    def release(self) -> None:
        """Drop the tensors; the report stays."""
        self._arrangements.clear()
        self.masks.clear()

    def begin(self, call: ModelCall) -> None:
        """Announce a model call. Steps are counted by distinct sigma, so that any sampler and any split of CFG counts alike."""
        if self._search is not None and not affordable(call.device):
            self._search = None
            self.report.notes["on this device nothing can be looked at exactly (that takes Triton on a GPU): blocks are chosen by their means"] += 1
        if call.sigma not in self._sigmas:
            self._sigmas.append(call.sigma)
        if call.sigma != self._sigma:
            if self._sigma is not None and call.sigma > self._sigma:
                self.masks.clear()  # noise was added again: what was chosen for less of it is stale
            self._sigma = call.sigma
            self._turn += 1
            self._places.clear()
            if self.recipe.quick is None:
                self.masks.keep_since(self._turn - self.settings.mask_refresh + 1)
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
        repeat = replace(call, layer=0, force_dense=True, checks=[], guards=[])
        self._open(repeat)
        return repeat

    def finish(self, call: ModelCall) -> bool:
        """Close a model call. True when its output is not finite because of this patch: the host must do the call again, dense.

        The one device read of a model call. Layers that produced the value are disabled at that precision for the run.
        """
        if call.checks:
            # A sum is finite exactly where all its terms are, at a tenth of the cost of looking at each.
            numbers = torch.stack([*(total for _, _, total in call.checks), *(measured for _, _, measured in call.guards)]).tolist()
            bad = [(layer, precision) for (layer, precision, _), total in zip(call.checks, numbers, strict=False) if not math.isfinite(total)]
            if bad:
                self._disabled.update(bad)
                layer, precision = bad[0]
                self.report.repeated += 1
                self.report.notes[f"non-finite output at layer {layer} ({precision}): the model call was done again dense"] += 1
                return True
            for (record, key, _), measured in zip(call.guards, numbers[len(call.checks) :], strict=True):
                record.error = measured if math.isfinite(measured) else None  # of an output of zeros there is no relative error
                if self._search is not None:
                    self._search.observe(key, measured)
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

        grid, layer = _place(call, problem)
        if layer is None:
            unsupported = "another length than the video's"
        key = (layer, call.place, grid, q.shape)
        outcome, reason, in_window = self._decide(call, key, problem.q_len, grid, unsupported)
        shape = (q.shape[0], problem.num_heads, problem.num_kv_heads, problem.q_len, problem.head_dim)
        arrangement = self._arrangement(grid, q) if outcome in (SPARSE, LOOK) else None
        choice = None
        if outcome != HOST:
            if arrangement is not None:
                problem = describe(arrangement, q, k, v, key_bias=key_bias)
            choice, refusal = self._choice(problem, quantize, layer)
            if choice is None:
                reason = refusal if in_window else reason
                outcome = HOST

        start = clock(q.device)
        record = CallRecord(call.step, layer, shape, HOST if outcome == LOOK else outcome, start, start, in_window=in_window, reason=reason)
        if outcome in (HOST, LOOK) or choice is None:
            out = dense()
        else:
            if arrangement is not None:
                result = self._sparse(call, record, key, arrangement, q, k, v, choice, key_bias, scale)
            else:
                result = kernel.attention(q, k, v, key_bias=key_bias, choice=choice, scale=scale)
            with self._keep():
                call.checks.append((layer, choice.taken().precision, result.detach().sum(dtype=torch.float32)))
            out = to_host(result)
            record.backend = choice.taken().name
        record.end = clock(q.device)
        if outcome == LOOK:
            self._look(record, key, call.turn, arrangement, q, k, v, key_bias, scale)
        self.report.records.append(record)
        return out

    def _decide(self, call: ModelCall, key: Key, tokens: int, grid: TokenGrid | None, refusal: str | None) -> tuple[str, str | None, bool]:
        """(outcome, why it is not sparse, whether it could have been: long enough, and in a step and block that may be)."""
        settings, layer = self.settings, key[0]
        if call.force_dense:
            return HOST, "repeated after non-finite output", False
        if dense := self._dense_anyway(tokens):
            return QUANTIZED if refusal is None else HOST, refusal or dense, False
        if refusal is None and grid is None and self.recipe.needs_grid:
            refusal = f"unknown model family: {self.recipe.name} needs the token grid, sparge does not"
        lowest, highest = self._sigma_window
        search = self._search if refusal is None and layer not in settings.dense_blocks else None
        if not lowest <= call.sigma <= highest or call.step < self._dense_steps:
            return LOOK if search is not None and search.ahead(call.sigma, call.step) else HOST, OUTSIDE, False
        if layer in settings.dense_blocks:
            return HOST, "dense block", False
        if refusal is not None:
            return HOST, refusal, True
        return (SPARSE, None, True) if search is None else (*search.decide(key, call.sigma, call.turn), True)

    def _dense_anyway(self, tokens: int) -> str | None:
        """Why no call of this length is sparse."""
        settings = self.settings
        if tokens < settings.min_tokens:
            return f"{tokens} tokens, fewer than min_tokens {settings.min_tokens}"
        if tokens < 2 * self._block(tokens):
            return f"only {tokens} tokens"
        return "density 1" if self.density >= 1.0 and settings.error is None else None

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

    def _look(self, record: CallRecord, key: Key, *call: Any) -> None:
        """call: the arguments of `Search.look` behind the key."""
        with self._keep():
            finite = _look_beside_graph(self._search, key, *call)
        if not finite:
            self.report.notes[f"non-finite scores at layer {record.layer}: they are looked at again at the next step"] += 1
        record.search = record.end, clock(call[2].device)

    def _sparse(
        self,
        call: ModelCall,
        record: CallRecord,
        key: Key,
        arrangement: Arrangement,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        choice: dispatch.Choice,
        key_bias: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """The output: with the mask of an earlier step where one was found. What was kept goes into the record."""
        found, recipe = self.masks.get(key), self.recipe
        if found is None and recipe.quick is not None:
            recipe = replace(recipe, estimate=recipe.quick)
            if self._search is not None:
                self.report.notes["too few sparse steps to look exactly: blocks are chosen by their means"] += 1
        mask = None if found is None else found.mask(q.device)
        settings = self.settings
        out, used = sparse_attention(
            recipe,
            arrangement,
            q,
            k,
            v,
            density=self.density,
            choice=choice,
            scale=scale,
            mask=mask,
            key_bias=key_bias,
            settings=settings.method_settings,
        )
        if found is None and settings.mask_refresh > 1 and self._search is None:
            with self._keep():
                found = self.masks.put(key, used, arrangement, call.turn)
        record.pairs = q.shape[0] * q.shape[1] * used.counts.shape[2] * num_blocks(arrangement.positions, used.block_n)
        with self._keep():
            if found is not None:
                record.kept, record.load = found.kept, found.work
            else:
                record.kept = used.counts.expand(*q.shape[:2], -1).sum()
                record.load = None if arrangement.tail is None else arrangement.work(used)
            if found is not None and found.predicted is not None and self._search is not None:
                record.predicted = self._search.expected(key)
                rows = guard_rows(q.shape[2], call.turn, q.device)
                call.guards.append((record, key, sampled_error(out, q, k, v, rows, key_bias, scale)))
        return out

    def _arrangement(self, grid: TokenGrid | None, q: Tensor) -> Arrangement:
        block = self._block(q.shape[2])
        key = (grid, q.shape[2], q.device, block)
        arrangement = self._arrangements.get(key)
        if arrangement is None:
            with self._keep():
                arrangement = self._arrangements[key] = prepare(self.recipe, grid, q.device, block=block, seq_len=q.shape[2])
        return arrangement


def _place(call: ModelCall, problem: dispatch.Problem) -> tuple[TokenGrid | None, int | None]:
    """(grid of a self-attention call, number of its layer): None where its family is unknown, and where its length is not the video's."""
    grid = None if call.spans is None else call.spans.grid(problem.q_len, problem.k_len)
    if call.spans is not None and grid is None:
        return None, None
    call.layer += 1
    return grid, call.layer - 1


_look_beside_graph = torch.compiler.disable(Search.look)


def _first_reason(choice: dispatch.Choice) -> str:
    return next((f"{name}: {reason}" for name, reason in choice.refusals.items()), "no backend is registered")
