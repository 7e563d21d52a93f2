"""The algorithm pages quote code that exists, and name every key and metric."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"rwr": ("rwr",), "ddpo": ("ddpo",), "draft": ("draft", "draftp")}


def page(name: str) -> str:
    return (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()


def flat(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", PAGES)
def test_quoted_code_exists(name):
    """Every row | equation | `code` | file | of a page stands in that file, whitespace aside."""
    rows = re.findall(r"^\|[^\n]*\| `(.+)` \| (alignlab/\S+\.py) \|$", page(name), re.MULTILINE)
    assert len(rows) >= 5
    for code, file in rows:
        assert flat(code).rstrip(",") in flat((ROOT / file).read_text()), (file, code)


@pytest.mark.parametrize("name", PAGES)
def test_every_key_is_explained(name):
    """Every key of the algorithm's configuration has its row."""
    for config in PAGES[name]:
        node = yaml.safe_load((ROOT / "conf" / "algo" / f"{config}.yaml").read_text()).get("algo", {})
        for key in node:
            assert key == "_target_" or f"`algo.{key}`" in page(name), key


@pytest.mark.parametrize("name", PAGES)
def test_every_metric_is_explained(name):
    """Every metric that the objective's file writes is on its page."""
    code = (ROOT / "alignlab" / "objectives" / f"{name}.py").read_text()
    metrics = set(re.findall(r'"((?:ddpo|rwr|draft|kl)/[a-z_]+)"', code)) | set(re.findall(r'f"(ddpo/clip_fraction_)\{', code))
    assert metrics
    for metric in metrics:
        assert f"`{metric}" in page(name), metric


@pytest.mark.parametrize("name", PAGES)
def test_named_tests_exist(name):
    """The proofs that a page names are tests that exist."""
    file = None
    for match in re.finditer(r"`(tests/\S+?\.py)?(?:::(\w+))?`", page(name)):
        file = match[1] or file
        if file and match[2]:
            assert f"def {match[2]}(" in (ROOT / file).read_text(), (file, match[2])
