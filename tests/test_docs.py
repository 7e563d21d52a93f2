"""The algorithm pages quote code that exists, and name every key, default and metric."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "algorithms"
PAGES = {
    "rwr": ("rwr",),
    "ddpo": ("ddpo",),
    "dpo": ("dpo",),
    "dpo_online": ("dpo_online",),
    "kto": ("kto",),
    "sft": ("sft",),
    "draft": ("draft", "draftp"),
}
"""A page, and the files of conf/algo that it explains."""

pages = pytest.mark.parametrize("name", PAGES)


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def section(name: str, title: str) -> str:
    """The text under the heading that begins so."""
    return next(part for part in re.split(r"^## ", page(name), flags=re.MULTILINE) if part.startswith(title))


def flat(text: str) -> str:
    return re.sub(r"\s+", "", text)


def function(file: str, name: str) -> ast.AST:
    """A function, or a method as Class.method."""
    found: ast.AST = ast.parse((ROOT / file).read_text())
    for part in name.split("."):
        found = next(node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == part)
    return found


def rows(text: str) -> list[str]:
    """The lines of a text's tables, but for their headings and rules."""
    heads = re.findall(r"^(\|.*)\n\|[-|]+\|$", text, re.MULTILINE)
    return [
        line
        for line in text.splitlines()
        if line.startswith("|") and line not in heads and not re.fullmatch(r"[-|]+", line)
    ]


def leaves(node: dict[str, Any], prefix: str = "algo.") -> dict[str, Any]:
    """The keys and values of a configuration node and of those inside it, but for _target_."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            found[prefix + key] = value
    return found


@pages
def test_quoted_code_exists(name):
    """Every row | equation | `code` | file: function | stands in that function of that file, whitespace
    aside."""
    quotes = [row for row in rows(section(name, "Equation and code")) if ".py" in row]
    assert len(quotes) >= 5
    for row in quotes:
        match = re.fullmatch(r"\|.* \| `(.+)` \| (alignlab/\S+\.py): (\S+) \|", row)
        assert match, row
        code, file, where = match.groups()
        text = ast.get_source_segment((ROOT / file).read_text(), function(file, where))
        assert text and flat(code) in flat(text), row


@pages
def test_every_key_is_explained_with_its_default(name):
    """The rows | `algo.key` | meaning | unit | default | range | are the keys of the algorithm's file,
    defaults included."""
    node = leaves(yaml.safe_load((ROOT / "conf" / "algo" / f"{PAGES[name][0]}.yaml").read_text())["algo"])
    cells = [re.split(r" ?(?<!\\)\| ?", row)[1:-1] for row in rows(section(name, "Keys"))]
    explained = {key.strip("`"): default for key, _, _, default, _ in cells}
    assert {key: yaml.safe_load(default.strip("`")) for key, default in explained.items()} == node


@pages
def test_every_algorithm_file_is_on_its_page(name):
    """A file of conf/algo that only changes another's values stands on that one's page, kl_coeff included."""
    for config in PAGES[name]:
        settings = yaml.safe_load((ROOT / "conf" / "algo" / f"{config}.yaml").read_text())
        assert f"algo={config}" in page(name)
        assert f"{settings['kl_coeff']:g} for {config}" in page(name) or len(PAGES[name]) == 1


def test_every_algorithm_file_has_a_page():
    """No file of conf/algo is forgotten."""
    assert {path.stem for path in (ROOT / "conf" / "algo").glob("*.yaml")} == {
        c for configs in PAGES.values() for c in configs
    }


@pages
def test_every_metric_is_explained(name):
    """Every metric that the objective's file writes is in its table of metrics."""
    code = (ROOT / "alignlab" / "objectives" / f"{name}.py").read_text()
    metrics = set(re.findall(r'"((?:ddpo|dpo|kto|rwr|sft|draft|kl)/[a-z_]+)"', code)) | set(
        re.findall(r'f"(ddpo/clip_fraction_|sft/error_)\{', code)
    )
    assert metrics
    for metric in metrics:
        assert any(f"`{metric}" in row for row in rows(section(name, "Logged"))), metric


def test_every_common_metric_is_explained():
    """So is every key of an epoch's line and of an evaluation, in ddpo.md."""
    metrics = set()
    places = {
        "train.py": ("train_epoch",),
        "training/guards.py": ("Guard.numbers",),
        "training/evaluation.py": ("Measured.numbers", "distance_to_base"),
    }
    for file, names in places.items():
        for name in names:
            nodes = ast.walk(function(f"alignlab/{file}", name))
            keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
            metrics |= {
                ("eval/" if file == "training/evaluation.py" else "") + key.value
                for key in keys
                if isinstance(key, ast.Constant)
            }
    assert metrics >= {"loss", "kl", "grad_norm", "eval/lpips", "eval/kl_trajectory"}
    table = rows(section("ddpo", "Logged"))
    for metric in metrics - {"reward"}:  # the sum, whose mean and std are logged
        assert any(f"`{metric}`" in row for row in table), metric


@pages
def test_deviations_are_numbered(name):
    """1, 2, 3 ... so that a deviation can be cited."""
    numbers = re.findall(r"^(\d+)\. ", section(name, "What differs"), re.MULTILINE)
    assert numbers and numbers == [str(i + 1) for i in range(len(numbers))]


@pages
def test_named_tests_exist(name):
    """The proofs that a page names are tests that exist."""
    file = None
    for match in re.finditer(r"`(tests/\S+?\.py)?(?:::(\w+))?`", section(name, "Proven by")):
        file = match[1] or file
        assert file and (ROOT / file).is_file(), match[0]
        assert not match[2] or f"def {match[2]}(" in (ROOT / file).read_text(), (file, match[2])


@pages
def test_links_lead_somewhere(name):
    """[text](page.md#heading): the page and its heading exist."""
    for target, anchor in re.findall(r"\]\(([^)#\s]+\.md)(?:#([^)]+))?\)", page(name)):
        headings = re.findall(r"^#+ (.+)$", (DOCS / target).read_text(), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]
