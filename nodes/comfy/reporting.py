"""What a node shows of its work: a line of text, and a bar that stops where the user does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
from server import PromptServer


def say(node_id: Any, text: str) -> None:
    """Show text on the node, in the window that asked for the run; another has other nodes of that number. None is no node.

    Without a server, as in scripts, or for a run that no window asked for, nobody reads it.
    """
    server = getattr(PromptServer, "instance", None)
    if node_id is not None and server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def said(cls: Any, text: str) -> dict[str, tuple[str]]:
    """Show text on the running node `cls`; returns the part of its `ui` that carries it to the history, and back to the node (web/results.js)."""
    say(cls.hidden.unique_id, text)
    return {"text": (text,)}


def saved_file(target: Path, subfolder: str) -> dict[str, Any]:
    """The entry of a file in the output folder for `tessera_files`; that of a folder has the names of its files, as /view gives out no folders."""
    entry: dict[str, Any] = {"filename": target.name, "subfolder": subfolder, "type": "output"}
    if target.is_dir():
        entry["files"] = sorted(file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file())
    return entry


def progress() -> Callable[[int, int], None]:
    """A function of (done, total) that moves the running node's bar. It raises ComfyUI's exception where the user has stopped the run."""
    bar = comfy.utils.ProgressBar(1)

    def count(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return count
