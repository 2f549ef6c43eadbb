"""What holds for every DiT family, wherever its tokens lie. `test_comfy_families.py` runs each one in ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest

from family_cases import CASES
from tessera.kernels import registry
from tessera.models.families import FAMILIES, Family, find, spans_of


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_found_by_the_module_of_a_class_or_of_its_base(family: Family) -> None:
    for module in family.modules:
        network = type("Network", (), {"__module__": f"{module}model"})
        assert find(network()) is family and find(type("Own", (network,), {})()) is family
        assert spans_of(network(), (1, 16, 100), {}) is None, "a latent without height and width has no grid"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_cases_in_comfyui(family: Family) -> None:
    assert family.name in {case.family for case in CASES.values()}


def test_a_family_is_a_file_and_a_row(root: Path) -> None:
    files = {file.stem for file in (root / "models" / "families").glob("*.py")} - {"__init__", "family"}
    assert {family.spans.__module__.rpartition(".")[2] for family in FAMILIES} == files


@pytest.mark.parametrize("page", ["README.md", "web/docs/TesseraAccelerate.md"])
def test_users_read_of_every_family(root: Path, page: str) -> None:
    text = (root / page).read_text()
    assert not [family.name for family in FAMILIES if family.name not in text]


def test_no_two_families_claim_a_network() -> None:
    modules = [module for family in FAMILIES for module in family.modules]
    assert not [(one, other) for one in modules for other in modules if one is not other and one.startswith(other)]


def test_a_family_of_a_name_that_is_taken_is_refused() -> None:
    twin = Family("Wan", ("somewhere.else.",), FAMILIES[0].spans)
    with pytest.raises(ValueError, match=r"two of DiT family 'Wan': Family\(.*comfy\.ldm\.wan\..* and Family\(.*somewhere\.else"):
        registry.by_name("DiT family", (*FAMILIES, twin))
