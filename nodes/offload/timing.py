"""Forward hooks that time a run: its blocks, and the modules that ComfyUI streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as mm
import torch

from ...models.offload import Block, BlockSpan, ModuleSpan, OffloadReport, nbytes_of
from ...models.patchers.report import clock
from .look_ahead import LookAhead

RECORDED_CALLS = 64  # model calls whose blocks are timed: enough for medians, and no growth with the number of steps
CURVE_STEPS = 2  # steps whose memory is read block by block, and whose streamed modules are timed

Hook = Callable[..., None]


def time_blocks(report: OffloadReport, blocks: list[Block], device: torch.device, ahead: LookAhead | None) -> Iterator[Any]:
    """Handles of hooks that put the runs of blocks into the report, and tell `ahead` of them."""
    for index, block in enumerate(blocks):
        before, after = _hooks(report, index, device, ahead)
        yield block.module.register_forward_pre_hook(before)
        yield block.module.register_forward_hook(after)


def _hooks(report: OffloadReport, index: int, device: torch.device, ahead: LookAhead | None) -> tuple[Hook, Hook]:
    open_span: list[BlockSpan] = []
    cuda = device.type == "cuda"

    def before(module: Any, inputs: Any) -> None:
        if ahead is not None:
            ahead.reach(index)
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


def time_modules(report: OffloadReport, blocks: list[Block], patcher: Any, ahead: LookAhead | None) -> Iterator[Any]:
    """The same for what ComfyUI streams, module by module as it does."""
    device, dynamic = patcher.load_device, report.backend == "dynamic"
    report.streams = mm.NUM_STREAMS
    if mm.is_device_cpu(device):
        report.copies_unknown = "none: this model runs on the CPU, and there is no link to copy over"
    elif ahead is not None:
        report.copies_unknown = "not predicted: blocks are fetched ahead in groups"
    if report.no_effect is not None or report.copies_unknown is not None:
        return
    block_of = {id(part): index for index, block in enumerate(blocks) for part in block.module.modules()}
    for module in patcher.model.modules():
        if hasattr(module, "_v_signature") if dynamic else _is_streamed(module, device):
            before, after = _module_hooks(report, block_of.get(id(module)), nbytes_of(module), device, dynamic)
            yield module.register_forward_pre_hook(before)
            yield module.register_forward_hook(after)


def _module_hooks(report: OffloadReport, block: int | None, nbytes: int, device: torch.device, dynamic: bool) -> tuple[Hook, Hook]:
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


def _is_streamed(module: Any, device: torch.device) -> bool:
    """Whether ComfyUI's ModelPatcher has left this layer's weights off the device, to be copied at every use."""
    weight = next(module.parameters(recurse=False), None)
    return (
        hasattr(module, "comfy_cast_weights")
        and not getattr(module, "comfy_patched_weights", False)
        and weight is not None
        and weight.device != device
    )
