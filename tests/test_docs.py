"""The algorithm pages show code as it is, and name functions that exist and every key, default and metric."""

import ast
import re
import shutil
import subprocess
import sys
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


def snippets(*words: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "snippets.py")]
    return subprocess.run([*script, *words], capture_output=True, text=True, check=False)


def test_shown_code_is_the_code(tmp_path):
    """Writing the snippets again changes no page; a page behind the code is named and written anew."""
    fresh = snippets("--check")
    assert (fresh.returncode, fresh.stdout) == (0, ""), fresh.stdout + fresh.stderr
    for name in PAGES:
        assert "\n<!-- snippet: alignlab/" in page(name)
    page_of_old = Path(shutil.copy(DOCS / "sft.md", tmp_path))
    page_of_old.write_text(page("sft").replace("(e,) = errors(policy, batch)", "e = 0"))
    behind = snippets("--check", str(page_of_old))
    assert behind.returncode == 1 and "is behind the code" in behind.stdout
    assert snippets(str(page_of_old)).returncode == 0 and page_of_old.read_text() == page("sft")


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("alignlab/objectives/sft.py SFT.lose", "alignlab/objectives/sft.py has no SFT.lose"),
        ("alignlab/objectives/sft.py SFT", "SFT of alignlab/objectives/sft.py is no function"),
        ("alignlab/objectives/sft.py SFT.loss until nowhere", "no line of SFT.loss begins with nowhere"),
    ],
)
def test_a_snippet_of_nothing_is_a_sentence(mark, said, tmp_path):
    (tmp_path / "page.md").write_text(f"<!-- snippet: {mark} -->\n")
    gone = snippets(str(tmp_path / "page.md"))
    assert gone.returncode == 1 and gone.stderr == f"{tmp_path / 'page.md'}: {said}\n"


@pages
def test_named_functions_exist(name):
    """Every row | equation | [function](file) | names a function of that file."""
    named = rows(section(name, "Equation and code").partition("<!-- snippet")[0])
    assert len(named) >= 5
    for row in named:
        match = re.fullmatch(r"\|.* \| \[(\S+)\]\(\.\./\.\./(alignlab/\S+\.py)\) \|", row)
        assert match, row
        assert isinstance(function(match[2], match[1]), ast.FunctionDef), row


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
