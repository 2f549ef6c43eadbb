"""What a workflow saved goes below a folder of the user's: subfolders are kept, and nothing that is there is written over.

Files lie in a hidden folder beside their last place until they are whole, so that each one appears at once, under a free name.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

NUMBERED = re.compile(r"(?P<prefix>.*)_(?P<number>\d{5,})_(?P<rest>.*)", re.DOTALL)  # as ComfyUI numbers what it saves
UNFINISHED = re.compile(r"\..*(\.part|\.[0-9a-f]{8}(\.\w+)?)", re.DOTALL)  # as this pack's writers call what they have not finished


def entries(outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(node id, `{"filename", "subfolder", "type"}`) of every file that the nodes reported, previews too. outputs: of a PromptResult."""
    for node, report in outputs.items():
        seen = []
        for values in report.values():
            for entry in values if isinstance(values, list | tuple) else ():
                if isinstance(entry, dict) and isinstance(entry.get("filename"), str) and entry["filename"]:
                    where = (entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))
                    if where not in seen:  # a node may show what it saved
                        seen.append(where)
                        yield node, {**entry, "subfolder": where[1], "type": where[2]}


def relative_path(entry: Mapping[str, Any]) -> PurePosixPath:
    """Where an entry's file lies in the output folder. Raises ValueError for a place outside."""
    path: PurePosixPath = PurePosixPath(str(entry["subfolder"]).replace("\\", "/")) / entry["filename"].replace("\\", "/")
    if path.is_absolute() or ".." in path.parts or not path.parts or ":" in path.parts[0] or "\0" in str(path):
        raise ValueError(f"the server names a file outside its output folder, {str(path)!r}; it is not saved")
    return path


def open_staging(output: Path) -> Path:
    """A new hidden folder in `output`, which is made if need be. Raises OSError that says what to do."""
    make_folder(output)
    try:
        return Path(tempfile.mkdtemp(prefix=".tessera-", dir=output))
    except OSError as error:
        raise OSError(f"{output} cannot be written to ({error.strerror}); name another folder with --output") from error


def make_folder(output: Path) -> None:
    """The folder that `--output` names, if it is not there. Raises OSError that says what to do."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"{output} is a file, or in the path of one; name another folder with --output") from error
    except OSError as error:
        raise OSError(f"{output} cannot be made ({error.strerror}); name another folder with --output") from error


def unreported(staged: Path, reported: Collection[PurePosixPath]) -> list[Path]:
    """Relative paths of the files of `staged` that are neither in `reported` nor in a folder that is.

    Without those that a writer of this pack has not finished. Other hidden ones count: a user may have named them so.
    """
    known = {Path(path) for path in reported}
    files = [file.relative_to(staged) for file in staged.rglob("*") if file.is_symlink() or not file.is_dir()]
    whole = [file for file in files if not any(map(UNFINISHED.fullmatch, file.parts))]
    return sorted(file for file in whole if known.isdisjoint([file, *file.parents]))


def place(staged: Path, output: Path, reported: Collection[PurePosixPath], *, overwrite: bool = False, ended: bool = True) -> list[Path]:
    """Move the files of `staged` to the same places below `output`, and remove `staged`; returns where they are now.

    Numbers in names go on from the highest that is there, as ComfyUI's would; another name that is taken gets a number. overwrite: names
    stay, and what has them is replaced. reported: relative paths that the nodes named; those of folders are moved as one. ended: else the
    other files may be unfinished, and get a name that says so. Raises OSError where that fails, and leaves the rest in `staged`.
    """
    loose = unreported(staged, reported)
    numbers: dict[tuple[Path, str], int] = {}
    placed = []
    try:
        for item in sorted({*loose, *(Path(path) for path in reported if (staged / path).exists())}):
            (output / item.parent).mkdir(parents=True, exist_ok=True)
            name = item.name if ended or item not in loose else f"{item.stem}.part{item.suffix}"
            placed.append(_move(staged / item, output / item.parent, name, numbers, overwrite))
    except OSError as error:
        raise OSError(f"{item} cannot be moved to {output} ({error.strerror}); it is in {staged}, with all that is not moved yet") from error
    shutil.rmtree(staged)
    return placed


def _move(source: Path, folder: Path, name: str, numbers: dict[tuple[Path, str], int], overwrite: bool) -> Path:
    """Move a file or folder. numbers: how far the numbers of (folder, prefix) are shifted."""
    if overwrite:
        target = folder / name
        if target.is_dir():
            target.rename(source.with_name(f".{name}.old"))  # goes with the staging folder
        os.replace(source, target)
        return target
    match = NUMBERED.fullmatch(name)
    prefix, number, rest = (match["prefix"], int(match["number"]), match["rest"]) if match else (Path(name).stem, 0, Path(name).suffix)
    key = (folder, os.path.normcase(prefix))
    if key not in numbers:
        there = [found for file in os.listdir(folder) if (found := NUMBERED.fullmatch(file)) and os.path.normcase(found["prefix"]) == key[1]]
        numbers[key] = max((int(found["number"]) for found in there), default=0)
    target = folder / (name if match is None else f"{prefix}_{number + numbers[key]:05}_{rest}")
    while not _claim(source, target):
        numbers[key] += 1
        target = folder / f"{prefix}_{number + numbers[key]:05}_{rest}"
    return target


def _claim(source: Path, target: Path) -> bool:
    """Move to a name that is free, also where another process wants it; False where it is not."""
    try:
        if source.is_dir():
            target.mkdir()
        else:
            target.touch(exist_ok=False)
    except FileExistsError:
        return False
    if source.is_dir() and os.name == "nt":  # which puts no folder in the place of an empty one
        target.rmdir()
    os.replace(source, target)
    return True
