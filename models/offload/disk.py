"""Weights that stay in a safetensors file and are read, through the page cache, each time a block is copied."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def open_weights(path: str | Path) -> Mapping[str, Tensor]:
    """name -> memory-mapped tensor. Raises FileNotFoundError or ValueError with one sentence when the file is missing or truncated."""
    from safetensors import safe_open  # here, because everything else runs where there is torch alone

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist; give the safetensors file that holds this module's weights")
    size = os.path.getsize(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start <= size:
            try:
                header = json.loads(file.read(start - 8))
            except ValueError as error:
                raise ValueError(f"weights: {path} is not a safetensors file; its header cannot be read") from error
    # Checked here because reading a memory map beyond the file's end kills the process.
    expected = (
        start if start > size else start + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    )
    if expected > size:
        raise ValueError(
            f"weights: {path} has {size} bytes and should have at least {expected}: it is truncated, or not a safetensors file; download it again"
        )
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
