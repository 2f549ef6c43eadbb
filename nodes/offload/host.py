"""How a memory limit is put into a ComfyUI model and taken out again: its part of a sampling run.

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
from contextlib import suppress
from functools import cache
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.sampler_helpers import estimate_memory, get_additional_models

from ...models.offload import GB, Block, CudaDevice, OffloadReport, StepSpan, find_blocks, summary
from ...models.patchers.report import clock
from ..comfy import Wrapper, attached, call_vbar, is_dynamic, last_result, network_in, say, vbar_of
from .look_ahead import LookAhead
from .manager import Demand, evict_others, held, is_clone, no_effect
from .settings import LEAVE_FREE, SUPERPIPELINE, USE_AT_MOST, MemorySettings, budget_of, check_settings, split_limit
from .timing import time_blocks, time_modules

KEY = "tessera_memory"
COMPILE_KEY = "torch.compile"  # ComfyUI's own key for compiled models


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
        self.ahead: LookAhead | None = None
        self.shape: tuple[int, ...] = ()
        self.allocated = 0

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING wrapper: weights are placed inside `executor`."""
        self.result = self.report = None
        report = OffloadReport(self.settings.policy, self.settings.asked, weights=model.model_size())
        self.blocks = _blocks(model)
        report.blocks = [(block.name, block.nbytes) for block in self.blocks]
        report.no_effect = no_effect(model, kwargs)
        self.shape = tuple(noise_shape)
        if report.no_effect is not None:
            prepared = executor(model, noise_shape, conds, *args, **kwargs)
        else:
            prepared = self._place(report, executor, model, noise_shape, conds, args, kwargs)
        self.report = report
        return prepared

    def _place(self, report: OffloadReport, executor: Any, model: Any, noise_shape: Any, conds: Any, args: Any, kwargs: Any) -> Any:
        """Have the manager place the weights by the limit."""
        report.backend = "dynamic" if is_dynamic(model) else "legacy"
        device = model.load_device
        available = int(mm.get_free_memory(device)) + sum(held(model))  # to this process
        most, least = estimate_memory(model, noise_shape, conds)  # ComfyUI's own: conditions batched, and one by one
        of_conds = get_additional_models(conds, model.model_dtype())[1]
        reserve, measured = int(mm.extra_reserved_memory()), _measured(model).get(("activations", self.shape))
        report.split = split = split_limit(self.settings, report, available, reserve, measured, most + of_conds, least + of_conds)
        report.budget = budget = budget_of(self.settings, split)
        if report.backend == "dynamic":
            evict_others(model, budget)
            return executor(model, noise_shape, conds, *args, **kwargs)
        if held(model)[0] > budget:
            # Loaded anew it is placed as from the start; taken back in part, what is left would be streamed and kept on the device.
            mm.free_memory(1e30, device, keep_loaded=[entry for entry in mm.current_loaded_models if not is_clone(entry, model)])
        # Of `available`, the manager keeps for weights what the demand leaves. It adds its own estimate and its reserve to the demand.
        demand = available - reserve - budget - (least + of_conds)
        real_model, conds, models = executor(model, noise_shape, {**conds, KEY: [{"control": Demand(demand)}]}, *args, **kwargs)
        mine, others = held(model)
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
            report.other_weights = held(patcher)[1]
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
            self.handles.extend(time_blocks(report, self.blocks, device, self.ahead))
            self.handles.extend(time_modules(report, self.blocks, patcher, self.ahead))

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """PREDICT_NOISE wrapper: one evaluation for all conditions, which is what a step costs."""
        report = self.report
        if report is None:
            return executor(*args, **kwargs)
        step = StepSpan(clock(args[0].device))
        report.steps.append(step)
        out = executor(*args, **kwargs)
        step.end = clock(args[0].device)
        return out

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
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

    def _set_watermark(self, report: OffloadReport, patcher: Any) -> None:
        """Loading put the watermark back to "everything", so it is set after it, at every sampling."""
        vbar = vbar_of(patcher)
        streaming = 0
        if self.settings.policy == SUPERPIPELINE and self.settings.k_prime:
            streaming = self.settings.k_prime * max((nbytes for _, nbytes in report.blocks), default=0)
            self.ahead = LookAhead.make(self.blocks, self.settings.k_prime)
            if self.ahead is None:
                report.notes.append("k_prime has no effect: this ComfyUI cannot look ahead")
                streaming = 0
        # Small weights lie outside the range, always on the device.
        watermark = max((report.budget or 0) - streaming - int(patcher.model.model_loaded_weight_memory), 0)
        if not call_vbar(vbar, "set_watermark", watermark):
            report.no_effect = "this version of comfy-aimdo takes no limit"
            return
        call_vbar(vbar, "set_watermark_limit", watermark)  # other models do not push it below; ComfyUI takes that back after every node

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


def _blocks(patcher: Any) -> list[Block]:
    """The repeated blocks of the diffusion model; empty where it has none."""
    try:
        return find_blocks(network_in(patcher.model))
    except ValueError:
        return []


@cache
def _link(device: torch.device) -> float | None:
    """Bytes per second from host memory, pinned where ComfyUI pins, to the device: measured once. None where there is no way to."""
    return CudaDevice(device).bandwidth(pinned=mm.MAX_PINNED_MEMORY > 0) if device.type == "cuda" else None


def _measured(patcher: Any) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Measurements that every clone of a network shares, and that go when it goes."""
    known: dict[tuple[str, tuple[int, ...]], Any] = patcher.model.__dict__.setdefault(KEY, {})
    return known
