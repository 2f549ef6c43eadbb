"""Blocks fetched ahead together, where ComfyUI runs with DynamicVRAM."""

from __future__ import annotations

from typing import Any

import torch

from ...models.offload import Block
from ..comfy import model_prefetch


class LookAhead:
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
    def make(cls, blocks: list[Block], group: int) -> LookAhead | None:
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
