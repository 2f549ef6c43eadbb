"""Names of files as widgets hold them: of what is read from the input folder, and for what is written to the output folder."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

LONGEST = 200  # bytes of a part of a prefix: file systems take 255, and a number and a suffix are added
SHOWN = 60  # characters of a wrong name that a message repeats


def input_path(file: str) -> Path | None:
    """The path of an entry of the widget, such as "clip.mp4" or "video/clip.mp4 [output]"; None where it leaves its folder or is no name."""
    name, base = folder_paths.annotated_filepath(file)
    folder = Path(base or folder_paths.get_input_directory()).resolve()
    try:
        path = (folder / name.strip()).resolve()
        path.exists()
    except (OSError, ValueError):  # too long; a zero byte or half a character
        return None
    return path if path.is_relative_to(folder) else None


def existing(file: str, remedy: str, *, folders: bool = False) -> Path:
    """The path of an entry of the widget that is there, as a file or, with `folders`, a folder. Raises ValueError that ends with the remedy."""
    path = input_path(file)
    if path is None:
        raise ValueError(f"file is {file!r:.{SHOWN}}, which lies outside ComfyUI's folders; copy the video into the input folder")
    if not (path.is_file() or (folders and path.is_dir())):
        raise ValueError(f"file is {file!r:.{SHOWN}}, which is not in ComfyUI's input folder; {remedy}")
    return path


def numbered(filename_prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
    """The folder, name, number and subfolder of the next file of a prefix, as ComfyUI's Save Image has them.

    Of a prefix that ends with a slash, or has dots between slashes, ComfyUI does not find the numbers that are taken.
    """
    prefix = os.path.normpath(filename_prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), width, height)
    return Path(folder), name, counter, subfolder


def check_prefix(filename_prefix: str) -> None:
    """Raises ValueError where no file of such a name can be written below the output folder."""
    try:
        longest = max(len(os.fsencode(part)) for part in filename_prefix.split("/"))
    except ValueError:  # half a character
        longest = LONGEST + 1
    if longest > LONGEST or len(filename_prefix) > 10 * LONGEST or any(ord(character) < 32 for character in filename_prefix):
        raise ValueError(f"filename_prefix is {filename_prefix!r:.{SHOWN}}; use printable characters, {LONGEST} bytes at most between two slashes")
    output = Path(folder_paths.get_output_directory()).resolve()
    if not (output / os.path.normpath(filename_prefix)).parent.resolve().is_relative_to(output):
        raise ValueError(f"filename_prefix is {filename_prefix!r:.{SHOWN}}, which leaves the output folder; use folders below it, such as video/new")
