"""Read a workflow from a JSON file: what ComfyUI exports for its API, and what people make of that by hand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..models.errors import FileError

Workflow = dict[str, dict[str, Any]]
EXPORT = "in ComfyUI use File > Export (API)"
COMMENT = ("_", "#", "//")  # how keys begin that hold no node


def read_workflow(file: Path) -> Workflow:
    """`{node id: {"class_type": ..., "inputs": {...}}}` of a file.

    A byte order mark, comments (keys that begin with _, # or //, and texts) and the `{"prompt": ...}` of a request are taken off; a node
    without inputs gets an empty dict. Raises FileError for everything else that no server would take.
    """
    graph = _parse(file)
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        graph = graph["prompt"]
    if not isinstance(graph, dict):
        found = "a list" if isinstance(graph, list) else "no nodes"
        raise FileError(f"{file} holds {found}, and no workflow in API format; {EXPORT}")
    if isinstance(graph.get("nodes"), list):
        raise FileError(f"{file} is a workflow as the editor saves it, which no server runs; {EXPORT}")
    workflow = {name: node for name, node in graph.items() if not (name.startswith(COMMENT) or isinstance(node, str))}
    if not workflow:
        raise FileError(f"{file} holds no nodes; {EXPORT}")
    for name, node in workflow.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str) or not isinstance(node.setdefault("inputs", {}), dict):
            raise FileError(f"{file} is no workflow in API format: {name!r} is no node with class_type and inputs; {EXPORT}")
    return workflow


def broken_links(workflow: Workflow) -> list[str]:
    """A sentence for each input that comes from a node which is not in the workflow. ComfyUI minds those that an output node needs."""
    return [
        f"{node['class_type']} (node {name}) takes {key} from node {value[0]}, which is not in the file; {EXPORT}"
        for name, node in workflow.items()
        for key, value in node["inputs"].items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] not in workflow
    ]


def _once(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of whose nodes and inputs none has the name of another, which would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and not key.startswith(COMMENT):
            raise FileError(f"{file}: {key!r:.80} is there twice, and only one of the two would count; rename one, or {EXPORT}")
        found[key] = value
    return found


def _parse(file: Path) -> Any:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror}); give a workflow file: {EXPORT}") from error
    if not data.strip():
        raise FileError(f"{file} is empty; {EXPORT}")
    try:
        return json.loads(data, object_pairs_hook=partial(_once, file))  # bytes: it finds out whether they are UTF-8, UTF-16 or UTF-32
    except FileError:
        raise
    except json.JSONDecodeError as error:
        raise FileError(f"{file} is no JSON file, or cut off (line {error.lineno}, column {error.colno}); {EXPORT}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text; numbers and nesting without end
        raise FileError(f"{file} is no JSON file; {EXPORT}") from error
