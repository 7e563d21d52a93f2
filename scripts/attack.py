"""python scripts/attack.py --write

The faults that people met with fine-tuning programs, tried on this one: every test of tests/faults/, and
every other test that is marked `@pytest.mark.fault("kind")`. Prints a table: kind, cases tried, cases that
hold, and what was tried. `--write` puts the table into results/reliability.md, and the list of all cases into
results/reliability/attack.md.

`--inputs FOLDER` tries a folder of inputs too, which others may have made: FOLDER/images, FOLDER/prompts and
FOLDER/makers (scripts that write more inputs to build/faults and print what alignlab makes of them;
scripts/faults/inputs.py has the rules). A line for each input says whether it holds. The exit code is 1 if
anything does not.
"""

import argparse
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from scripts.faults.inputs import inputs_tried

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "results" / "reliability.md"
CASES = ROOT / "results" / "reliability" / "attack.md"
HEADING = "## Faults that people met"


@dataclass
class Attack:
    """A test: what it tries, and what became of its cases."""

    kind: str
    tried: str
    """The first sentence of the test's docstring, or its name in words."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Cases by outcome: passed, failed or skipped."""

    @property
    def cases(self) -> int:
        """How many could be tried on this machine."""
        return self.outcomes["passed"] + self.outcomes["failed"]


class Reporter:
    """A plugin of pytest that keeps to the tests of faults, and remembers what became of them."""

    def __init__(self) -> None:
        self.attacks: dict[str, Attack] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = []
        for item in items:
            kind = kind_of(item)
            if kind is not None:
                kept.append(item)
                name = item.nodeid.partition("[")[0]
                self.attacks.setdefault(name, Attack(kind, sentence_of(item)))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # of setup and teardown only what went wrong
            attack = self.attacks[report.nodeid.partition("[")[0]]
            attack.outcomes[report.outcome] += 1


def kind_of(item: pytest.Item) -> str | None:
    """The kind of fault that a test tries: its mark's, or in tests/faults that of its file; None if it tries
    none."""
    mark = item.get_closest_marker("fault")
    if mark is not None:
        return str(mark.args[0])
    return (
        item.path.stem.removeprefix("test_").replace("_", " ") if item.path.parent.name == "faults" else None
    )


def sentence_of(item: pytest.Item) -> str:
    """The first sentence of what a test says of itself, on one line."""
    said = " ".join((getattr(getattr(item, "function", None), "__doc__", None) or "").split())
    name = item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
    return (said.partition(". ")[0].rstrip(".") or name).replace("|", "/") + "."


def attacked() -> list[Attack]:
    """Runs the tests of faults in this process."""
    reporter = Reporter()
    pytest.main([str(ROOT / "tests"), "-q", "-p", "no:cacheprovider", "-m", "not slow"], plugins=[reporter])
    return list(reporter.attacks.values())


def table(attacks: list[Attack]) -> list[str]:
    """A line for each kind, and one for all."""
    kinds: dict[str, list[Attack]] = defaultdict(list)
    for attack in attacks:
        kinds[attack.kind].append(attack)
    rows = ["| kind | tests | cases tried | cases that hold |", "|---|---|---|---|"]
    for kind, those in [*sorted(kinds.items()), ("**all**", attacks)]:
        cases, hold = sum(a.cases for a in those), sum(a.outcomes["passed"] for a in those)
        rows.append(f"| {kind} | {len(those)} | {cases} | {hold} |")
    return rows


def page(attacks: list[Attack]) -> list[str]:
    """The section of results/reliability.md."""
    skipped = sum(attack.outcomes["skipped"] for attack in attacks)
    return [
        HEADING,
        "",
        "    python scripts/attack.py --write",
        "",
        "Each test makes an input after a public report. It asks for the right value, or for one sentence "
        "with exit code 2,",
        "and that nothing is lost. [attack.md](reliability/attack.md) says what each test tried.",
        *([f"Not tried on the machine that made this table: {skipped} cases."] if skipped else []),
        "",
        *table(attacks),
        "",
    ]


def cases(attacks: list[Attack]) -> list[str]:
    """results/reliability/attack.md: a line for each test, by kind."""
    lines = [
        "# What was tried",
        "",
        "Written by `python scripts/attack.py --write`; a line for each test.",
        "",
    ]
    kind = ""
    for attack in sorted(attacks, key=lambda attack: attack.kind):
        if attack.kind != kind:
            kind = attack.kind
            lines += [f"\n## {kind.capitalize()}\n", "| tried | cases | hold |", "|---|---|---|"]
        lines.append(f"| {attack.tried} | {attack.cases} | {attack.outcomes['passed']} |")
    return [*lines, ""]


def put(section: list[str], text: str) -> str:
    """The page with this section in place of the one of the same heading, or at its end."""
    before, found, rest = text.partition(f"{section[0]}\n")
    after = rest[rest.index("\n## ") + 1 :] if found and "\n## " in rest else ""
    return "\n".join([before.rstrip("\n"), "", *section, *([after] if after else [])]).rstrip("\n") + "\n"


def main() -> int:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--write", action="store_true", help="put the table into results/")
    arguments.add_argument(
        "--inputs", type=Path, help="try a folder of inputs instead: images/, prompts/, makers/"
    )
    arguments.add_argument("--only", default="", help="of the inputs, those whose kind or name holds this")
    asked = arguments.parse_args()
    if asked.inputs is not None:
        tried = inputs_tried(asked.inputs, asked.only)
        wrong = [verdict for verdict in tried if not verdict.holds]
        print(f"{len(tried)} inputs, {len(wrong)} do not hold")
        return 1 if wrong or not tried else 0
    attacks = attacked()
    print("\n".join(table(attacks)))
    if asked.write:
        PAGE.write_text(put(page(attacks), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        CASES.write_text("\n".join(cases(attacks)).replace("\n\n\n", "\n\n"), encoding="utf-8")
    return 1 if not attacks or any(attack.outcomes["failed"] for attack in attacks) else 0


if __name__ == "__main__":
    sys.exit(main())
