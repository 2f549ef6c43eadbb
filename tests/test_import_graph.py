"""Who knows whom: no module needs itself by a detour, and each folder is entered as its door, `__init__.py`, says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

FLOORS = ("kernels", "models", "nodes", "cli")


class Import(NamedTuple):
    """`from base import name` as absolute paths; a plain `import` has no place here, as all imports inside are relative."""

    line: int
    base: tuple[str, ...]
    name: str


@cache
def modules(root: Path) -> dict[tuple[str, ...], Path]:
    """Dotted path in the package -> file; a folder's own path is its `__init__.py`."""
    found = {}
    for floor in FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[parts[:-1] if parts[-1] == "__init__" else parts] = file
    return found


def imports(path: tuple[str, ...], file: Path) -> Iterator[Import]:
    """Every relative import, also those for types only and those inside functions."""
    package = path if file.name == "__init__.py" else path[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            for alias in node.names:
                yield Import(node.lineno, base, alias.name)


def folder(root: Path, path: tuple[str, ...]) -> tuple[str, ...]:
    return path if modules(root)[path].name == "__init__.py" else path[:-1]


def graph(root: Path) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """What each module needs: a submodule that is taken from a door is needed itself."""
    known = modules(root)
    return {
        path: {
            target
            for entry in imports(path, file)
            if (target := (*entry.base, entry.name) if (*entry.base, entry.name) in known else entry.base) in known
        }
        for path, file in known.items()
    }


def circle(edges: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """One circle of a graph, or nothing."""
    done: set[tuple[str, ...]] = set()

    def walk(node: tuple[str, ...], way: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if found := walk(other, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := walk(node, []))), [])


def test_no_module_imports_itself_by_a_detour(root: Path) -> None:
    assert not circle(graph(root))


def test_no_folder_needs_itself_by_a_detour(root: Path) -> None:
    """Folders beside each other; one inside another belongs to it."""
    edges: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path, targets in graph(root).items():
        here = folder(root, path)
        for there in (folder(root, target) for target in targets):
            if here != there and here[: len(there)] != there and there[: len(here)] != here:
                edges.setdefault(here, set()).add(there)
    assert not circle(edges)


def entered(root: Path) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(where, folder, what of it) of each import from another folder. What: a name of the door, or a module in the folder."""
    known = modules(root)
    for path, file in known.items():
        for entry in imports(path, file):
            target = entry.base
            if target in known and known[target].name != "__init__.py":
                there, what = target[:-1], target[-1]
            elif (*target, entry.name) in known and known[(*target, entry.name)].name == "__init__.py":
                continue  # the door itself
            else:
                there, what = target, entry.name
            if path[: len(there)] != there:  # a module may use what is beside it, and above
                yield f"{file.relative_to(root)}:{entry.line}", there, what


def public(door: Path) -> set[str]:
    """The names of a folder's `__all__`."""
    for node in ast.parse(door.read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def test_folders_are_entered_by_their_doors(root: Path) -> None:
    """A door lists names, which it imports, or modules, which load when they are asked for: a tensor needs no PyAV."""
    known = modules(root)
    assert not [(where, there, what) for where, there, what in entered(root) if what not in public(known[there])]


@pytest.mark.parametrize(("edges", "found"), [({"a": {"b"}, "b": {"c"}, "c": set()}, False), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, True)])
def test_a_circle_is_seen(edges, found) -> None:
    assert bool(circle({(key,): {(value,) for value in values} for key, values in edges.items()})) == found


LARGE = {"models/default/networks.py": "networks"}


def test_no_file_is_larger_than_can_be_read_at_once(root: Path) -> None:
    lines = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in modules(root).values()}
    assert not {file: count for file, count in lines.items() if count > 400 and file not in LARGE}
