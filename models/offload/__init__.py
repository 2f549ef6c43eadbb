"""Layer offload: run, or train, a module whose weights do not fit on the device.

`offload` puts it around any module; `find_blocks` says what would be moved; `planner.predict` answers without a device.
"""

from .blocks import Block, find_blocks
from .handle import Offload, offload

__all__ = ["Block", "Offload", "find_blocks", "offload"]
