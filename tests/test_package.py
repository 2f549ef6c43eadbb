"""One package however it is loaded, nothing heavy at import, and imports that only go down the floors."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

# ComfyUI's loader (nodes.py, load_custom_node) in miniature: the module's name is the folder's path.
AS_COMFYUI = """
import importlib.util, sys
def load(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""

FLOORS = {"kernels": 1, "models": 2, "nodes": 3, "cli": 3}
COMFY = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "execution", "server", "node_helpers"}


@pytest.fixture(params=["tessera", "ComfyUI-Something.v2 (1)"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Path:
    """The pack as it lies in custom_nodes/, under any folder name."""
    link = tmp_path / "custom_nodes" / request.param
    link.parent.mkdir()
    link.symlink_to(root, target_is_directory=True)
    return link


def test_comfyui_first(folder, run_python):
    run_python(
        "-c",
        f"""{AS_COMFYUI}
pack = load({str(folder)!r})
import tessera
assert tessera is pack
from tessera.kernels.block_mask import BlockMask
assert pack.BlockMask is BlockMask is tessera.BlockMask
assert [name for name in sys.modules if name.endswith("kernels.block_mask")] == ["tessera.kernels.block_mask"]
""",
    )


def test_import_first(folder, run_python):
    run_python(
        "-c",
        f"""{AS_COMFYUI}
import tessera
pack = load({str(folder)!r})
assert sys.modules["tessera"] is tessera is not pack
assert pack.BlockMask is tessera.BlockMask
assert pack.RECIPES is tessera.RECIPES
assert [name for name in sys.modules if name.endswith("kernels.block_mask")] == ["tessera.kernels.block_mask"]
""",
    )


@pytest.mark.parametrize("first", ["comfyui", "import"])
def test_custom_op_is_registered_once(first, folder, run_python):
    statements = [f"pack = load({str(folder)!r})", "import tessera"]
    run_python(
        "-c",
        f"""{AS_COMFYUI}
{chr(10).join(statements if first == "comfyui" else statements[::-1])}
import torch
q = torch.randn(1, 2, 64, 32)
assert torch.equal(pack.attention(q, q, q), tessera.attention(q, q, q))
torch.ops.tessera.attention
""",
    )


def test_entry_point_imports_the_one_package(folder, run_python):
    """With ComfyUI's modules stubbed, the entry point of a second copy hands out the first copy's nodes."""
    run_python(
        "-c",
        f"""{AS_COMFYUI}
import asyncio, types
import tessera
nodes = types.ModuleType("tessera.nodes")
async def comfy_entrypoint():
    return "the extension"
nodes.comfy_entrypoint = comfy_entrypoint
sys.modules["tessera.nodes"] = nodes
pack = load({str(folder)!r})
assert asyncio.run(pack.comfy_entrypoint()) == "the extension"
assert pack.WEB_DIRECTORY == "./web"
assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
""",
    )


def test_import_is_light_and_leaves_the_path_alone(run_python):
    run_python(
        "-c",
        """
import sys
before = set(sys.modules), list(sys.path)
import tessera
new = set(sys.modules) - before[0]
assert not {name for name in new if name.split(".")[0] in ("torch", "triton", "numpy", "diffusers", "av", "PIL")}, sorted(new)
assert sys.path == before[1]
assert "attention" in dir(tessera)
try:
    tessera.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
""",
    )


def test_every_public_name_resolves():
    import tessera

    for name in tessera._PUBLIC:
        assert getattr(tessera, name) is not None


def test_the_attention_example_of_the_readme_runs(root, capsys):
    import torch

    import tessera

    code = re.search(r"```python\n(out = tessera\.attention.*?)```", (root / "README.md").read_text(), re.DOTALL).group(1)
    q = torch.randn(1, 2, 300, 16)
    exec(code, {"tessera": tessera, "q": q, "k": q, "v": q, "mask": torch.ones(1, 2, 3, 3, dtype=torch.bool)})
    assert "torch/native usable None" in capsys.readouterr().out


def modules(root: Path):
    for floor in FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            yield file, file.relative_to(root).parts


def imported(tree: ast.AST, package: tuple[str, ...]):
    """(line, absolute dotted name) of every import; relative ones are resolved against `package`, which starts with "tessera"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def test_imports_only_go_down(root):
    wrong = []
    for file, parts in modules(root):
        floor = FLOORS[parts[0]]
        for line, name in imported(ast.parse(file.read_text()), ("tessera", *parts[:-1])):
            head, *rest = name.split(".")
            if head == "tessera" and rest and FLOORS.get(rest[0], 0) > floor:
                wrong.append(f"{file}:{line} imports {name}: up a floor")
            if head == "tessera" and rest[:1] == ["training"]:
                wrong.append(f"{file}:{line} imports {name}: training is not in the package")
            if head == "tessera" and parts[0] == "cli" and rest[:1] == ["nodes"]:
                wrong.append(f"{file}:{line} imports {name}: the command line speaks HTTP to ComfyUI")
            if head in COMFY and parts[0] != "nodes":
                wrong.append(f"{file}:{line} imports {name}: ComfyUI belongs to nodes/")
    assert not wrong, "\n".join(wrong)


def test_only_relative_imports_inside(root):
    wrong = [
        f"{file}:{line} {name}"
        for file, parts in modules(root)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line, name in [(node.lineno, getattr(node, "module", None) or node.names[0].name)]
        if name.split(".")[0] == "tessera" and not getattr(node, "level", 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_root_is_never_on_the_path(root):
    assert str(root) not in sys.path


def test_wheel_lists_every_package(root):
    from setuptools import find_packages

    expected = {".".join(file.parent.relative_to(root).parts) for file, _ in modules(root)}
    assert set(find_packages(str(root), include=[pattern for floor in FLOORS for pattern in (floor, f"{floor}.*")])) == expected


def test_one_version(root):
    import tessera

    assert f'version = "{tessera.__version__}"' in (root / "pyproject.toml").read_text()
    assert f"## {tessera.__version__}" in (root / "CHANGELOG.md").read_text()


def test_requirements_have_lower_bounds_only(root):
    lines = [line for line in (root / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w-]+(>=[\d.]+)?( ; .+)?", line), line
