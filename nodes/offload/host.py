"""How a memory limit is put into a ComfyUI model and taken out again. Sister of `host`; the one room that knows ComfyUI's memory manager.

ComfyUI moves the weights, here as everywhere: nothing of it is replaced, and no part of a managed model is moved behind its back. There
are two back-ends, chosen at every sampling by what the model's patcher is:

- legacy (ModelPatcher): the sampling asks for as much more memory as the device has beyond the limit. The manager then leaves room as if
  the device ended there, and streams the weights that do not fit.
- dynamic (DynamicVRAM): the limit becomes the watermark of the model's virtual address range, above which weights are streamed.

Sizes are in bytes; 1 GB is 1024**3 of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.sampler_helpers import estimate_memory, get_additional_models

from ...models.offload.blocks import Block, find_blocks
from ...models.offload.devices import CudaDevice
from ...models.offload.memory import nbytes_of
from ...models.offload.report import GB, BlockSpan, ModuleSpan, OffloadReport, Split, StepSpan, size, summary
from ...models.patchers.report import clock
from ..comfy import Wrapper, attached, call_vbar, is_dynamic, last_result, model_prefetch, network_in, say, vbar_of

KEY = "tessera_memory"
USE_AT_MOST, LEAVE_FREE = "use at most", "leave free"
LIMITS = (USE_AT_MOST, LEAVE_FREE)
AUTO, RESIDENT, SUPERPIPELINE = "auto", "resident", "superpipeline"
POLICIES = (AUTO, RESIDENT, SUPERPIPELINE)
RECORDED_CALLS = 64  # model calls whose blocks are timed: enough for medians, and no growth with the number of steps
CURVE_STEPS = 2  # steps whose memory is read block by block, and whose streamed modules are timed
COMPILE_KEY = "torch.compile"  # ComfyUI's own key for compiled models


@dataclass(frozen=True)
class MemorySettings:
    """limit: one of LIMITS, in gb. k, k_prime: Superpipeline's window and exchange in blocks; 0 leaves them to the limit."""

    limit: str = USE_AT_MOST
    gb: float = 8.0
    policy: str = AUTO
    k: int = 0
    k_prime: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.gb * GB)

    @property
    def asked(self) -> str:
        return f"{self.limit} {self.gb:g} GB"


def check_settings(settings: MemorySettings) -> None:
    """Raise ValueError with the input, its value and what to use instead; needs no model."""
    if settings.limit not in LIMITS:
        raise ValueError(f"limit is {settings.limit!r}; use one of {', '.join(LIMITS)}")
    if settings.policy not in POLICIES:
        raise ValueError(f"policy is {settings.policy!r}; use one of {', '.join(POLICIES)}")
    if not math.isfinite(settings.gb) or settings.gb <= 0:
        raise ValueError(f"gb is {settings.gb:g}; use a number of gigabytes above 0, such as 8")
    if settings.policy != SUPERPIPELINE:
        return
    if settings.k < 0 or settings.k == 1:
        raise ValueError(f"k is {settings.k}; use at least 2 blocks, or 0 to let the limit decide")
    if settings.k_prime < 0 or settings.k_prime > (settings.k or settings.k_prime):
        raise ValueError(f"k_prime is {settings.k_prime}; use 0 to k, which is {settings.k}")


def patch_memory(model: Any, settings: MemorySettings, node_id: str | None) -> Any:
    """A clone of `model` whose samplings keep to the limit. `node_id` is the node that shows the result line.

    A limit of this pack that the model already carries is replaced. The given model is left as it was.
    """
    check_settings(settings)
    if not mm.is_device_cpu(model.load_device):
        total = mm.get_total_memory(model.load_device)
        if settings.gb > math.ceil(total / GB) or (settings.limit == LEAVE_FREE and settings.gb * GB >= total):
            use = "at most" if settings.limit == USE_AT_MOST else "less than"
            raise ValueError(f"gb is {settings.gb:g}, and {model.load_device} has {total / GB:.1f} GB; use {use} {total / GB:.1f}")
    host = _MemoryHost(settings, node_id)
    wrappers: dict[str, Wrapper] = {
        WrappersMP.PREPARE_SAMPLING: host.prepare_sampling,
        WrappersMP.PREDICT_NOISE: host.predict_noise,
        WrappersMP.APPLY_MODEL: host.apply_model,
    }
    return attached(model, KEY, host, wrappers, {CallbacksMP.ON_PRE_RUN: host.pre_run, CallbacksMP.ON_CLEANUP: host.cleanup})


def last_report(model: Any) -> dict[str, Any] | None:
    """What the last sampling run with this model's limit did; None when it carries none or has not run."""
    return last_result(model, KEY)


class _MemoryHost:
    """Connects one memory limit to ComfyUI's sampling life cycle."""

    def __init__(self, settings: MemorySettings, node_id: str | None):
        self.settings = settings
        self.node_id = node_id
        self.result: dict[str, Any] | None = None
        self.report: OffloadReport | None = None
        self.blocks: list[Block] = []  # these two are empty outside sampling
        self.handles: list[Any] = []  # of forward hooks
        self.ahead: _LookAhead | None = None
        self.shape: tuple[int, ...] = ()
        self.allocated = 0

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """PREPARE_SAMPLING wrapper: weights are placed inside `executor`."""
        self.result = self.report = None
        report = OffloadReport(self.settings.policy, self.settings.asked, weights=model.model_size())
        self.blocks = _blocks(model)
        report.blocks = [(block.name, block.nbytes) for block in self.blocks]
        report.no_effect = _no_effect(model, kwargs)
        self.shape = tuple(noise_shape)
        if report.no_effect is not None:
            prepared = executor(model, noise_shape, conds, *args, **kwargs)
        else:
            prepared = self._place(report, executor, model, noise_shape, conds, args, kwargs)
        self.report = report
        return prepared

    def _place(self, report, executor, model, noise_shape, conds, args, kwargs):
        """Have the manager place the weights by the limit."""
        report.backend = "dynamic" if is_dynamic(model) else "legacy"
        device = model.load_device
        usable = int(mm.get_free_memory(device)) + sum(_held(model))  # by this process
        most, least = estimate_memory(model, noise_shape, conds)  # ComfyUI's own: conditions batched, and one by one
        of_conds = get_additional_models(conds, model.model_dtype())[1]
        report.split = split = self._split(report, model, usable, most + of_conds, least + of_conds)
        report.budget = budget = self._budget(split)
        if report.backend == "dynamic":
            _evict_others(model, budget)
            return executor(model, noise_shape, conds, *args, **kwargs)
        if _held(model)[0] > budget:
            # Loaded anew it is placed as from the start; taken back in part, what is left would be streamed and kept on the device.
            mm.free_memory(1e30, device, keep_loaded=[entry for entry in mm.current_loaded_models if not _is_clone(entry, model)])
        # Of `usable`, the manager keeps for weights what the demand leaves. It adds its own estimate and its reserve to the demand.
        demand = usable - split.reserve - budget - (least + of_conds)
        real_model, conds, models = executor(model, noise_shape, {**conds, KEY: [{"control": _Demand(demand)}]}, *args, **kwargs)
        mine, others = _held(model)
        excess = mine - max(budget - others, 0)
        if excess > 0:  # the manager keeps a share of the device for weights whatever the demand, though not on NVIDIA
            model.partially_unload(model.offload_device, excess)
        if self.settings.policy == SUPERPIPELINE and self.settings.k_prime:
            report.notes.append("k_prime has no effect: without DynamicVRAM, ComfyUI looks ahead by layers, by itself")
        return real_model, {name: entries for name, entries in conds.items() if name != KEY}, models

    def pre_run(self, patcher: Any) -> None:
        """Weights are placed, sampling begins."""
        self._remove_hooks()
        report = self.report
        if report is None:  # sampled without prepare_sampling: nothing was asked of the manager, and nothing is reported
            return
        device = patcher.load_device
        if report.split is not None and report.budget is not None:
            report.other_weights = _held(patcher)[1]
            report.budget = max(min(report.budget, report.split.room - report.other_weights), 0)
        if report.backend == "dynamic":
            self._set_watermark(report, patcher)
        if device.type == "cuda":
            # The counter of the whole process: whoever else measures peaks starts anew here too.
            torch.cuda.reset_peak_memory_stats(device)
            self.allocated = torch.cuda.memory_allocated(device)
        report.resident = report.weights if report.backend == "none" else patcher.loaded_size()
        if COMPILE_KEY in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}) or any(hasattr(block.module, "_orig_mod") for block in self.blocks):
            report.notes.append("blocks are not timed in a compiled model")
        else:
            self._add_hooks(report, device)
            self._add_module_hooks(report, patcher)

    def predict_noise(self, executor, *args, **kwargs):
        """PREDICT_NOISE wrapper: one evaluation for all conditions, which is what a step costs."""
        report = self.report
        if report is None:
            return executor(*args, **kwargs)
        step = StepSpan(clock(args[0].device))
        report.steps.append(step)
        out = executor(*args, **kwargs)
        step.end = clock(args[0].device)
        return out

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper: counts model calls, each of which streams the weights once."""
        if self.report is not None:
            self.report.model_calls += 1
        if self.ahead is None:
            return executor(*args, **kwargs)
        self.ahead.begin(args[0].device)
        out = executor(*args, **kwargs)
        self.ahead.end()
        return out

    def cleanup(self, patcher: Any) -> None:
        """After every sampling run, also a failed or interrupted one."""
        self._remove_hooks()
        self.blocks = []
        report, self.report = self.report, None
        if report is None:
            return
        device = patcher.load_device
        if report.backend == "dynamic":
            report.resident = patcher.loaded_size()  # pages came as they were used
            call_vbar(vbar_of(patcher), "set_watermark_limit", 0)
        if device.type == "cuda":
            self._measure(report, patcher, device)
        if report.resident < report.weights and report.steps and report.steps[-1].end is not None:  # not where memory has just run out
            with suppress(RuntimeError):  # no room to measure in, on the device or in pinned memory: the run was good all the same
                report.bytes_per_second = _link(device)
        self.result = report.as_dict()
        if device.type == "cuda" and self.result["seconds_per_step"] is not None and not self.result["streamed_bytes"]:
            _measured(patcher)["seconds", self.shape] = self.result["seconds_per_step"]
        line = summary(self.result)
        logging.info("Tessera: %s", line)
        say(self.node_id, line)

    def _split(self, report: OffloadReport, model: Any, usable: int, most: float, least: float) -> Split:
        """The limit and what it has to hold. Raises ValueError with the smallest limit that works."""
        settings, reserve = self.settings, int(mm.extra_reserved_memory())
        sizes = tuple(nbytes for _, nbytes in report.blocks)
        limit = max(usable - settings.nbytes, 0) if settings.limit == LEAVE_FREE else settings.nbytes
        measured = _measured(model).get(("activations", self.shape))
        if measured is not None:
            split = Split(limit, measured, "measured", reserve, report.weights, sizes)
        else:
            split = Split(limit, int(most), "estimated", reserve, report.weights, sizes)
            # ComfyUI computes the conditions in one batch only where 1.5 times their estimate is free beside the weights.
            if most * 1.5 >= usable - min(split.room, split.weights):
                split = replace(split, activations=int(least))
        if limit < split.smallest:
            found = f"gb is {settings.gb:g}"
            advice = f"use at least {_up(split.smallest)}"
            if settings.limit == LEAVE_FREE:
                found += f" to leave free, which leaves {size(limit)} for ComfyUI"
                most_free = usable - split.smallest
                advice = f"leave at most {_down(most_free)}" if most_free > 0.01 * GB else "close other programs that use the device"
            if measured is None:
                advice += " (a run measures the activations; they may be less)"
            raise ValueError(f"Layer Offload: {found}, and this sampling needs {size(split.smallest)} ({split}); {advice}")
        if limit > usable:
            report.notes.append(f"other programs leave {size(usable)} of the device")
            split = replace(split, limit=usable)
        return split

    def _budget(self, split: Split) -> int:
        """Bytes for this model's weights and the buffers that they stream through."""
        settings = self.settings
        if settings.policy != SUPERPIPELINE or not settings.k:
            return split.room
        if not split.blocks:
            raise ValueError("Layer Offload: policy is superpipeline, and this model has no repeated blocks; use auto")
        block = max(split.blocks)
        window = split.outside + min(settings.k, len(split.blocks)) * block
        if window > split.room:
            most = (split.room - split.outside) // block
            raise ValueError(f"Layer Offload: k is {settings.k} blocks of {size(block)}, and the limit has room for {most}; use k {most} or 0")
        return window

    def _set_watermark(self, report: OffloadReport, patcher: Any) -> None:
        """Loading put the watermark back to "everything", so it is set after it, at every sampling."""
        vbar = vbar_of(patcher)
        streaming = 0
        if self.settings.policy == SUPERPIPELINE and self.settings.k_prime:
            streaming = self.settings.k_prime * max((nbytes for _, nbytes in report.blocks), default=0)
            self.ahead = _LookAhead.make(self.blocks, self.settings.k_prime)
            if self.ahead is None:
                report.notes.append("k_prime has no effect: this ComfyUI cannot look ahead")
                streaming = 0
        # Small weights lie outside the range, always on the device.
        ceiling = max((report.budget or 0) - streaming - int(patcher.model.model_loaded_weight_memory), 0)
        if not call_vbar(vbar, "set_watermark", ceiling):
            report.no_effect = "this version of comfy-aimdo takes no limit"
            return
        call_vbar(vbar, "set_watermark_limit", ceiling)  # other models do not push it below; ComfyUI takes that back after every node

    def _add_hooks(self, report: OffloadReport, device: torch.device) -> None:
        for index, block in enumerate(self.blocks):
            before, after = self._hooks(report, index, device)
            self.handles.append(block.module.register_forward_pre_hook(before))
            self.handles.append(block.module.register_forward_hook(after))

    def _hooks(self, report: OffloadReport, index: int, device: torch.device) -> tuple[Callable, Callable]:
        open_span: list[BlockSpan] = []
        cuda = device.type == "cuda"

        def before(module: Any, inputs: Any) -> None:
            if self.ahead is not None:
                self.ahead.reach(index)
            open_span.clear()
            if report.model_calls > RECORDED_CALLS or (cuda and torch.cuda.is_current_stream_capturing()):
                return
            step = max(len(report.steps) - 1, 0)
            memory = torch.cuda.memory_allocated(device) if cuda and step < CURVE_STEPS else None
            open_span.append(BlockSpan(step, index, clock(device), memory=memory))
            report.spans.append(open_span[0])

        def after(module: Any, inputs: Any, output: Any) -> None:
            if open_span:
                open_span.pop().end = clock(device)

        return before, after

    def _add_module_hooks(self, report: OffloadReport, patcher: Any) -> None:
        """Time what ComfyUI streams, module by module as it does."""
        device, dynamic = patcher.load_device, report.backend == "dynamic"
        report.streams = mm.NUM_STREAMS
        if mm.is_device_cpu(device):
            report.copies_unknown = "none: this model runs on the CPU, and there is no link to copy over"
        elif self.ahead is not None:
            report.copies_unknown = "not predicted: blocks are fetched ahead in groups"
        if report.no_effect is not None or report.copies_unknown is not None:
            return
        block_of = {id(part): index for index, block in enumerate(self.blocks) for part in block.module.modules()}
        for module in patcher.model.modules():
            if hasattr(module, "_v_signature") if dynamic else _is_streamed(module, device):
                before, after = self._module_hooks(report, block_of.get(id(module)), nbytes_of(module), device, dynamic)
                self.handles.append(module.register_forward_pre_hook(before))
                self.handles.append(module.register_forward_hook(after))

    def _module_hooks(self, report: OffloadReport, block: int | None, nbytes: int, device: torch.device, dynamic: bool) -> tuple[Callable, Callable]:
        open_span: list[ModuleSpan] = []

        def before(module: Any, inputs: Any) -> None:
            open_span.clear()
            if len(report.steps) > CURVE_STEPS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                return
            if hasattr(module, "_prefetch"):  # ComfyUI has fetched it with its whole block
                report.copies_unknown = "not predicted: ComfyUI fetches this model's blocks ahead"
                return
            open_span.append(ModuleSpan(max(len(report.steps) - 1, 0), block, nbytes, clock(device), None))

        def after(module: Any, inputs: Any, output: Any) -> None:
            if open_span and not (dynamic and module._v_signature is not None):  # with one it has a place on the device
                open_span[0].end = clock(device)
                report.modules.append(open_span.pop())

        return before, after

    def _measure(self, report: OffloadReport, patcher: Any, device: torch.device) -> None:
        """Peak of the run, and what it holds beside weights, kept for the next run of this shape."""
        peak = torch.cuda.max_memory_allocated(device)
        if any(step.end is not None for step in report.steps):
            _measured(patcher)["activations", self.shape] = max(peak - self.allocated, 0)
        pages = vbar_of(patcher) if report.backend == "dynamic" else None
        report.peak = peak + (pages.loaded_size() if pages is not None else 0)  # torch does not count the pages of the range
        report.resident_step_seconds = _measured(patcher).get(("seconds", self.shape))

    def _remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.ahead = None


class _Demand:
    """Stands among the conditions as a control net without weights that needs `nbytes`: ComfyUI adds them to what the sampling demands."""

    def __init__(self, nbytes: float):
        self.nbytes = nbytes

    def get_models(self) -> list[Any]:
        return []

    def inference_memory_requirements(self, dtype: Any) -> float:
        return self.nbytes


class _LookAhead:
    """Core's prefetch queue for a model whose forward does not use it: groups of blocks are fetched when the first of them is reached.

    Experimental, and off unless k_prime is set: nobody has measured it.
    """

    def __init__(self, blocks: list[Block], group: int):
        self.group = group
        self.modules = [block.module for block in blocks]
        self.queue: Any = None
        self.device: Any = None
        self.reached = 0  # blocks
        self.queues = 0

    @classmethod
    def make(cls, blocks: list[Block], group: int) -> _LookAhead | None:
        return None if model_prefetch is None or not blocks else cls(blocks, group)

    def begin(self, device: torch.device) -> None:
        """A model call starts."""
        groups = [self.modules[start : start + self.group] for start in range(0, len(self.modules), self.group)]
        self.queue = model_prefetch.make_prefetch_queue(groups, device, {"prefetch_dynamic_vbars": True})
        self.device, self.reached, self.queues = device, 0, len(model_prefetch.PREFETCH_QUEUES)

    def reach(self, index: int) -> None:
        """A block is about to run."""
        if self.queue is None:
            return
        core_does_it = len(model_prefetch.PREFETCH_QUEUES) > self.queues
        if index != self.reached or core_does_it:  # another order than that of registration, or a family that core prefetches
            self.stop()
            return
        if index % self.group == 0:
            model_prefetch.prefetch_queue_pop(self.queue, self.device, self.modules[index])
        self.reached += 1

    def end(self) -> None:
        """The model call is over: let go of the last group."""
        if self.queue is None:
            return
        if self.reached == len(self.modules):
            model_prefetch.prefetch_queue_pop(self.queue, self.device, None)
            self.queue = None
        else:
            self.stop()

    def stop(self) -> None:
        """Give the queue up; what it holds is released by core's own clean-up after the node."""
        self.queue = None


def _no_effect(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why ComfyUI would not place weights by a limit; None where it does."""
    if mm.is_device_cpu(model.load_device):
        return "this model runs on the CPU, where everything lives in RAM"
    if model.get_additional_models_with_key("multigpu"):
        return "this model runs on several GPUs"
    if kwargs.get("force_full_load") or kwargs.get("force_offload"):
        return "this sampling says itself how its weights are loaded"
    if not is_dynamic(model) and (not mm.lowvram_available or mm.vram_state not in (mm.VRAMState.NORMAL_VRAM, mm.VRAMState.LOW_VRAM)):
        return f"ComfyUI runs in its {mm.vram_state.name} mode, which does not load a model by what fits"
    return None


def _blocks(patcher: Any) -> list[Block]:
    """The repeated blocks of the diffusion model; empty where it has none."""
    try:
        return find_blocks(network_in(patcher.model))
    except ValueError:
        return []


def _is_clone(entry: Any, model: Any) -> bool:
    """Whether the manager's entry holds the weights of this model."""
    return entry.model is not None and entry.model.is_clone(model)


def _held(model: Any) -> tuple[int, int]:
    """Bytes of weights that the manager holds on the model's device: of this model, under whichever clone, and of all others."""
    mine = others = 0
    for entry in mm.current_loaded_models:
        if entry.model is not None and entry.device == model.load_device:
            if _is_clone(entry, model):
                mine += int(entry.model.loaded_size())
            else:
                others += int(entry.model.loaded_size())
    return mine, others


def _evict_others(model: Any, budget: int) -> None:
    """Dynamic models are not unloaded for one another: ask the manager to, as far as the limit of the whole process demands it."""
    others = _held(model)[1]
    excess = min(others + min(model.model_size(), budget) - budget, others)
    if excess > 0:
        mine = [entry for entry in mm.current_loaded_models if _is_clone(entry, model)]
        mm.free_memory(mm.get_free_memory(model.load_device) + excess, model.load_device, keep_loaded=mine)


def _is_streamed(module: Any, device: torch.device) -> bool:
    """Whether ComfyUI's ModelPatcher has left this layer's weights off the device, to be copied at every use."""
    weight = next(module.parameters(recurse=False), None)
    return (
        hasattr(module, "comfy_cast_weights")
        and not getattr(module, "comfy_patched_weights", False)
        and weight is not None
        and weight.device != device
    )


@cache
def _link(device: torch.device) -> float | None:
    """Bytes per second from host memory, pinned where ComfyUI pins, to the device: measured once. None where there is no way to."""
    return CudaDevice(device).bandwidth(pinned=mm.MAX_PINNED_MEMORY > 0) if device.type == "cuda" else None


def _measured(patcher: Any) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Measurements that every clone of a network shares, and that go when it goes."""
    return patcher.model.__dict__.setdefault(KEY, {})


def _up(nbytes: float) -> str:
    """GB with two decimals that are enough."""
    return f"{math.ceil(nbytes / GB * 100) / 100:g}"


def _down(nbytes: float) -> str:
    """GB with two decimals that are not too much."""
    return f"{math.floor(nbytes / GB * 100) / 100:g}"
