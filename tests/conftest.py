"""Shared fixtures. The package under test is always this checkout, whatever else is installed."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _load_package() -> None:
    """Import the repository's root as `tessera` without putting the root, or its parent, on sys.path."""
    spec = importlib.util.spec_from_file_location("tessera", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tessera"] = module
    spec.loader.exec_module(module)


_load_package()
# `python -m pytest` puts the working directory there, where our `nodes` would hide ComfyUI's.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

from tessera.cli.comfy_server import HOW_TO_GET, ComfyInstall, ComfyServer, find_comfy  # noqa: E402
from tessera.kernels import block_mask  # noqa: E402

block_mask.CHECK_ON_DEVICE = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: run `make gpu` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in any order."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin return NaN: whoever reads memory that it did not write is found out."""

    def poison(function):
        def filled(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository, which is the package."""
    return ROOT


@pytest.fixture(scope="session")
def package_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which `tessera` is this checkout."""
    folder = tmp_path_factory.mktemp("pkg")
    (folder / "tessera").symlink_to(ROOT, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def run_python(package_path: Path):
    """Run Python code in a fresh process in which `tessera` can be imported; returns its standard output."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(package_path)}, cwd=package_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with random weights under the default weights' names."""
    from tiny_models import write_models  # needs safetensors, which a bare GPU machine may lack

    return write_models(tmp_path_factory.mktemp("models"))


def _installed(old: bool) -> ComfyInstall:
    if not old:
        found = find_comfy()
        if found is None:
            pytest.skip(f"needs ComfyUI: {HOW_TO_GET}")
        return found
    path = Path(os.environ.get("COMFYUI_PATH_OLD", Path.home() / "comfy018"))
    if not (path / "main.py").is_file():
        pytest.skip("needs ComfyUI 0.18.1: `git clone --branch v0.18.1 https://github.com/comfyanonymous/ComfyUI` and set COMFYUI_PATH_OLD to it")
    # An old tree seldom has an environment of its own: the newer one's does, if neither is named.
    newer = find_comfy()
    python = os.environ.get("COMFYUI_PYTHON_OLD") or (newer.python if newer is not None else None)
    found = find_comfy(path, python)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def comfy(tiny_models: Path) -> Iterator[ComfyServer]:
    """A running ComfyUI server, the newest supported version, with this pack and the tiny models."""
    with ComfyServer(_installed(old=False), models=tiny_models) as server:
        yield server


@pytest.fixture(scope="session")
def comfy_old(tiny_models: Path) -> Iterator[ComfyServer]:
    """A running ComfyUI server of the oldest supported version."""
    with ComfyServer(_installed(old=True), models=tiny_models) as server:
        yield server


@pytest.fixture(params=["comfy", "comfy_old"])
def any_comfy(request: pytest.FixtureRequest) -> ComfyServer:
    """Either version of ComfyUI."""
    return request.getfixturevalue(request.param)
