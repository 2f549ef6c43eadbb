"""Run one API-format workflow on a headless ComfyUI with this pack in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .comfy_server import HOW_TO_GET, ComfyServer, find_comfy


def run_workflow(file: Path, output: Path, settings: list[str]) -> None:
    """Queue `file`, save what it makes into `output`, print what its nodes report.

    settings: "node.input=value" texts that change the workflow, values in JSON or plain text.
    """
    comfy = find_comfy()
    if comfy is None:
        raise FileNotFoundError(f"no ComfyUI was found; {HOW_TO_GET}")
    workflow = json.loads(file.read_text())
    for setting in settings:
        change(workflow, setting)
    output.mkdir(parents=True, exist_ok=True)
    with ComfyServer(comfy, models=comfy.path / "models") as server:
        print(f"ComfyUI {server.version} at {comfy.path}")
        result = server.run(workflow)
        print(f"{file.name}: done in {result.seconds:.2f} s")
        for node, outputs in result.outputs.items():
            for text in outputs.get("text", ()):
                print(f"{workflow[node]['class_type']} (node {node}): {text}")
            for entries in outputs.values():
                for entry in entries:
                    if isinstance(entry, dict) and entry.get("type") == "output":
                        target = output / entry["filename"]
                        target.write_bytes(server.fetch(entry))
                        print(target)


def change(workflow: dict[str, Any], setting: str) -> None:
    """Apply "node.input=value". Raises ValueError naming a setting that does not fit."""
    address, _, text = setting.partition("=")
    node, _, name = address.partition(".")
    if node not in workflow or name not in workflow[node]["inputs"]:
        raise ValueError(f"--set {setting}: the workflow has no input {address!r}; write node.input=value, for example 8.seed=2")
    try:
        workflow[node]["inputs"][name] = json.loads(text)
    except json.JSONDecodeError:
        workflow[node]["inputs"][name] = text
