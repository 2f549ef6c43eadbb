"""The list of packages, which pyproject.toml cannot express: the repository's root is the package `tessera` itself."""

from setuptools import find_packages, setup

FLOORS = ("kernels", "models", "nodes", "cli")

setup(
    package_dir={"tessera": "."},
    packages=[
        "tessera",
        *(f"tessera.{name}" for name in find_packages(".", include=[pattern for floor in FLOORS for pattern in (floor, f"{floor}.*")])),
    ],
)
