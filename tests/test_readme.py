"""The README's own files and commands work as they stand there: your reward, your algorithm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.running import lines, tiny

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block of code: its language and its text."""


def blocks() -> list[tuple[str, str]]:
    """The README's blocks in order."""
    return FENCED.findall((ROOT / "README.md").read_text())


def files() -> dict[str, str]:
    """The blocks whose first line names a file: `# my_objective.py`."""
    named = (re.match(r"# (\S+\.(?:py|yaml))\n", text) for _, text in blocks())
    return {match[1]: match.string for match in named if match}


def command(name: str) -> list[str]:
    """The words of the README's train command in which `name` stands."""
    (line,) = [
        line
        for _, text in blocks()
        for line in text.splitlines()
        if name in line and line.startswith("python -m")
    ]
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return words[3:]


def test_the_blocks_are_found() -> None:
    """A reward, an algorithm and its configuration."""
    assert [*files()] == ["my_rewards.py", "my_objective.py", "my_conf/algo/cautious.yaml"]


@pytest.mark.parametrize(
    ("name", "metric"), [("my_rewards", "reward/mine/mean"), ("my_objective", "draft/worst")]
)
def test_your_own_works_as_it_stands_there(name: str, metric: str, tiny_sd: str, tmp_path: Path) -> None:
    """The files and the command, in an empty folder, on a tiny model; the metric that is theirs is logged."""
    for path, text in files().items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    words = command(name)
    small = [
        word for word in tiny(tiny_sd, "steps=1") if not (word.startswith("reward=") and "my_rewards" in name)
    ]
    small = [word for word in small if not word.startswith("steps=4")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "OMP_NUM_THREADS": "1",
    }
    call = [sys.executable, "-m", "alignlab.train", *words, *small, "output_dir=run"]
    done = warm.run(call, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metric in lines(tmp_path / "run")[0]
