"""What --help says agrees with what the commands take."""

import re
from dataclasses import fields
from importlib import import_module

import pytest

from alignlab.config import help, outline
from alignlab.config.compose import CONF
from tests.running import configured

WITH_KEYS = [name for name, command in outline.commands().items() if command.schema]


@pytest.mark.parametrize("name", WITH_KEYS)
def test_every_key_is_there_with_a_meaning(name: str) -> None:
    """Each field of the command's dataclass stands in its help, and each key has a sentence on it."""
    its = outline.command_of(outline.names()[name])
    module = import_module(f"alignlab.{its.file}")
    schema = getattr(module, its.schema)
    whole = outline.outline(its)
    assert {key.name for key in whole.keys} == {f.name for f in fields(schema)}
    silent = [key.name for key in whole.all_keys() if not key.meaning.strip()]
    assert not silent, f"no meaning: {silent}"
    shown = help.text(name)
    for key in whole.all_keys():
        assert re.search(rf"^  {re.escape(key.name)}=", shown, re.MULTILINE) or re.search(
            rf"^{re.escape(key.name)}\b", shown, re.MULTILINE
        ), key.name


@pytest.mark.parametrize("name", WITH_KEYS)
def test_lines_fit_80_columns(name: str) -> None:
    """All but commands, which are to be pasted."""
    wide = [line for line in help.text(name).splitlines() if len(line) > 80 and "python -m" not in line]
    assert not wide, wide


def test_numbers_have_units() -> None:
    """What train says of a number includes what it counts."""
    whole = outline.outline(outline.command_of("train"), ["algo=ddpo"])
    bare = [
        key.name for key in whole.all_keys() if key.kind.split(" ")[0] in ("int", "float") and not key.unit
    ]
    assert not bare, bare


@pytest.mark.parametrize(
    "words", [[], ["algo=ddpo"], ["algo=draftp", "reward=[clip,brightness]"], ["model=sd15"]]
)
def test_the_defaults_are_those_of_the_run(words: list[str]) -> None:
    """The outline, read as text, has the values that Hydra composes; references are left as they stand."""
    composed = configured(*words, "seed=0")
    whole = outline.outline(outline.command_of("train"), words)
    compared = 0
    for key in whole.all_keys():
        found = composed
        for part in key.name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        if "${" not in str(key.default):
            compared += 1
            written = (
                float(key.default) if isinstance(found, float) else key.default
            )  # 2e-3 is a text in YAML
            assert written == found, key.name
    assert compared > 60


def test_groups_list_their_files() -> None:
    """Every file of conf/algo is an option."""
    listed = next(line for line in help.text("train").splitlines() if line.startswith("algo: "))
    assert listed.removeprefix("algo: ").split(", ") == sorted(
        path.stem for path in (CONF / "algo").glob("*.yaml")
    )
