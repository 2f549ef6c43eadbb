"""Run one API-format workflow on a headless ComfyUI with this pack in it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any

from .comfy_client import PromptEmptyError, PromptRefusedError, PromptResult, ServerError
from .comfy_server import HOW_TO_GET, ComfyServer, find_comfy
from .saved_files import entries, open_staging, place, relative_path, unreported
from .workflow_files import Workflow, broken_links, read_workflow

PATIENCE = 30.0  # seconds for a workflow to end that was told to


def run_workflow(file: Path, output: Path, settings: list[str], overwrite: bool = False) -> None:
    """Queue `file`, save what it makes below `output`, print what its nodes report.

    settings: "node.input=value" texts that change the workflow, see `change`. overwrite: as for `saved_files.place`.
    Raises FileError, ValueError, OSError and ServerError, each with one sentence. However it ends, what was finished by then is saved.
    """
    workflow = read_workflow(file)
    for setting in settings:
        change(workflow, setting)
    comfy = find_comfy()
    if comfy is None:
        raise FileNotFoundError(f"no ComfyUI was found; {HOW_TO_GET}")
    staged = open_staging(output)
    outputs: dict[str, dict[str, Any]] = {}
    accepted = False
    result: PromptResult | None = None
    failure: BaseException | None = None
    try:
        models = comfy.path / "models"
        with ComfyServer(comfy, models=models if models.is_dir() else None, arguments=["--output-directory", str(staged.absolute())]) as server:
            print(f"ComfyUI {server.version} at {comfy.path}", flush=True)
            prompt_id = _queue(server, workflow, file)
            accepted = True
            try:
                result = server.wait(prompt_id, inf)
                outputs = result.outputs
            except BaseException:
                outputs = server.settle(prompt_id, PATIENCE)
                raise
    except BaseException as error:
        if not accepted:  # before it could be called off, ComfyUI may have run the part of a workflow that it did not mind
            shutil.rmtree(staged)
            raise
        failure = error
    # The server is gone, so nobody writes there any more.
    reported, lost = _reported(outputs, staged)
    silent_files = unreported(staged, reported)
    saved = place(staged, output, reported, overwrite=overwrite, ended=failure is None)
    if result is not None:
        print(f"{file.name}: done in {result.seconds:.2f} s")
    _print_reports(workflow, outputs)
    for path in saved:
        print(path, flush=True)
    if failure is not None:
        if silent_files:
            print(f"the run did not end well: {len(silent_files)} of these files, with .part in their names, may be unfinished", flush=True)
        raise failure
    assert result is not None
    _check(workflow, result, lost, len(silent_files))


def _queue(server: ComfyServer, workflow: Workflow, file: Path) -> str:
    try:
        return server.queue(workflow)
    except PromptRefusedError as error:
        hints = broken_links(workflow)
        if error.kind == "missing_node_type":
            hints.append("`run` starts ComfyUI with its own nodes and Tessera's, and no others; take the rest out of the workflow")
        raise ServerError("\n  ".join([f"{file}: {error}", *hints])) from error


def _reported(outputs: dict[str, dict[str, Any]], staged: Path) -> tuple[list[PurePosixPath], list[str]]:
    """Relative paths of the files and folders that nodes named, and those that they named and did not write there."""
    found, lost = [], []
    for _, entry in entries(outputs):
        if entry["type"] == "output":
            try:
                path = relative_path(entry)
            except ValueError:
                lost.append(entry["filename"])
                continue
            if (staged / path).exists():
                found.append(path)
            else:
                lost.append(str(path))
    return found, lost


def _print_reports(workflow: Workflow, outputs: dict[str, dict[str, Any]]) -> None:
    for node, report in outputs.items():
        for text in report.get("text", ()):
            print(f"{_name(workflow, node)}: {text}")
    found = list(entries(outputs))
    savers = {node for node, entry in found if entry["type"] == "output"}
    for node, count in Counter(node for node, entry in found if entry["type"] == "temp" and node not in savers).items():
        print(f"{_name(workflow, node)}: {count} preview{'s'[: count != 1]}, not kept; a node that saves would keep what it shows")


def _check(workflow: Workflow, result: PromptResult, lost: list[str], silent_files: int) -> None:
    """Raise ServerError unless all output nodes of a run that ended made something.

    lost: reported and not there. silent_files: that no node reported, at least one for each node that saves without a word.
    """
    if lost:
        raise ServerError(f"{', '.join(lost)}: reported as saved and not in the output folder; look how the node names its files")
    if len(result.silent) > silent_files:
        raise PromptEmptyError(workflow, result)


def _name(workflow: Workflow, node: str) -> str:
    """A node in words, also one that another put in while it ran: 3.0.1 by node 3."""
    entry = workflow.get(node) or workflow.get(node.partition(".")[0], {"class_type": "a node"})
    return f"{entry['class_type']} (node {node})"


def change(workflow: Workflow, setting: str) -> None:
    """Apply "node.input=value". The value is JSON or plain text; where the input is a text now it stays one, as written or in JSON's quotes,
    unless the value is a link to a node of the workflow: ["5", 0].

    Raises ValueError naming a setting that does not fit.
    """
    address, equals, text = setting.partition("=")
    node, _, name = address.partition(".")
    if not equals or node not in workflow or name not in workflow[node]["inputs"]:
        found = f"the workflow has no input {address!r}" if equals else "it has no value"
        raise ValueError(f"--set {setting}: {found}; write node.input=value, for example 8.seed=2")
    try:
        value = json.loads(text, parse_constant=str)  # NaN is no JSON
    except (ValueError, RecursionError):
        value = text
    inputs = workflow[node]["inputs"]
    link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in workflow and isinstance(value[1], int)
    stays_text = isinstance(inputs[name], str) and not isinstance(value, str) and not link
    inputs[name] = text if stays_text else value  # 1.10 in a name is no number
