"""The files of a model that is stored in parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import FileError, reading

MOST = 100_000  # parts that a file's name may speak of


def model_files(path: str | Path) -> list[Path]:
    """All files of a model, given its only one, one of its shards (name-00001-of-00002.safetensors), or its index (name.safetensors.index.json).

    Raises FileNotFoundError, or FileError that names the parts that are not beside it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model: {path} does not exist; give a safetensors file")
    shard = re.fullmatch(r"(.*-)(\d{1,9})-of-(\d{1,9})(\.safetensors)", path.name, re.ASCII)
    if path.name.endswith(".index.json"):
        with reading(path, "an index of safetensors files"):
            names = sorted({Path(name).name for name in json.loads(path.read_bytes())["weight_map"].values()})
    elif shard is not None:
        prefix, own, count, ending = shard.groups()
        if not 1 <= int(own) <= int(count) <= MOST:
            raise FileError(f"{path} is called part {int(own)} of {int(count)}; give it the name that it had")
        names = [f"{prefix}{number:0{len(own)}}-of-{count}{ending}" for number in range(1, int(count) + 1)]
    else:
        names = [path.name]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing or not names:
        found = f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} are missing" if missing else "it names no files"
        raise FileError(f"{path} is a part of a model: {found}; put all parts into one folder")
    return [path.with_name(name) for name in names]
