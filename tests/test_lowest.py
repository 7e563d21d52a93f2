"""The lowest versions that pyproject.toml allows are those of constraints-lowest.txt, with which `make
test-lowest` trains."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lowest() -> dict[str, str]:
    """The lower bound of every package that an installation brings, and of pytest, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(x for x in project["optional-dependencies"]["test"] if x.startswith("pytest>=")),
    ]
    bounds = {}
    for requirement in wanted:
        bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)(,<[\d.]+)?", requirement)
        assert bound, f"{requirement} says no lowest version"
        bounds[bound[1]] = bound[2]
    return bounds


def constrained() -> dict[str, str]:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def test_the_constraints_are_the_lower_bounds_of_pyproject() -> None:
    """By version alone: no address, no hash, no package more or less."""
    assert constrained() == lowest()


@pytest.mark.skipif(
    "ALIGNLAB_LOWEST" not in os.environ, reason="make test-lowest runs it in a venv of its own"
)
def test_these_versions_are_installed() -> None:
    """Of torch without its build (+cu124); 1.5 and 1.5.0 are the same version."""
    for name, bound in constrained().items():
        installed = version(name).partition("+")[0]
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", installed), f"{name} is {installed}, not {bound}"
