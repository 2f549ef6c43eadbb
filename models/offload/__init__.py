"""Layer offload: run, or train, a module whose weights do not fit on the device.

`offload` puts it around any module; `find_blocks` says what would be moved; `predict` answers without a device. `OffloadReport` is for hosts
that move weights themselves.
"""

from .blocks import Block, find_blocks
from .devices import CudaDevice
from .entry import offload
from .handle import Offload
from .memory import nbytes_of
from .offline import EFFICIENCY, GIGA, Card, card, read_blocks, tokens_of
from .picture import picture
from .planner import GB, choose, predict, smallest_budget
from .report import BlockSpan, ModuleSpan, OffloadReport, Split, StepSpan, size, summary
from .schedule import superpipeline
from .shards import model_files

__all__ = [
    "EFFICIENCY",
    "GB",
    "GIGA",
    "Block",
    "BlockSpan",
    "Card",
    "CudaDevice",
    "ModuleSpan",
    "Offload",
    "OffloadReport",
    "Split",
    "StepSpan",
    "card",
    "choose",
    "find_blocks",
    "model_files",
    "nbytes_of",
    "offload",
    "picture",
    "predict",
    "read_blocks",
    "size",
    "smallest_budget",
    "summary",
    "superpipeline",
    "tokens_of",
]
