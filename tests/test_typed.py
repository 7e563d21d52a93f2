"""What README and docs say to type is accepted: every command composes, and every train command passes all of
its checks."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from tests.running import command_line, configured, pairs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^\s*(?:accelerate launch .*?-m |python -m )alignlab\.(\w+)(.*)$")
OPTIONS_OF_HYDRA = ("--help", "--cfg", "--config-dir")


def typed() -> list[tuple[str, str, list[str]]]:
    """Page, command and words of every line that begins as a command does; a comment at its end is left
    out."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            match = COMMAND.match(line)
            if match and "…" not in line:
                found.append((str(page.relative_to(ROOT)), match[1], shlex.split(match[2], comments=True)))
    return found


def test_there_are_commands_to_try() -> None:
    """The lines are found, those of the README first."""
    assert len(typed()) > 80 and typed()[0][0] == "README.md"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_sd: str) -> dict[str, str]:
    """What stands for the names that a reader puts in: a table of pairs, a finished run, a model."""
    home = tmp_path_factory.mktemp("typed")
    table = pairs(home / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        words = (
            "quick=true samples_per_step=4 steps=1 sampler.steps=3 eval_sampler.steps=2 "
            f"output_dir={home / 'run'}"
        )
        assert command_line(patch, *words.split()) == 0
    prompts = home / "mine.txt"
    prompts.write_text("a lion\na cat\n")
    run = str(home / "run")
    return {
        "algo.data=FOLDER": f"algo.data={table}",
        "algo.data=PAIRS": f"algo.data={table}",
        "algo.data=pairs": f"algo.data={table}",
        "init_from=RUN": f"init_from={run}",
        "init_from=runs/DIR": f"init_from={run}",
        "init_from=runs/rwr": f"init_from={run}",
        "resume=runs/DIR": f"resume={run}",
        "model.path_or_id=/my/stable-diffusion": f"model.path_or_id={tiny_sd}",
        **{f"prompts.file={name}.txt": f"prompts.file={prompts}" for name in ("mine", "my_prompts")},
    }


def shrunk(words: list[str], places: dict[str, str]) -> list[str]:
    """The words with the reader's names filled in, and of a sweep the first job."""
    filled = [
        places.get(word, word) for word in words if word not in ("-m", "--multirun") and "${" not in word
    ]
    jobs = []
    for word in filled:
        key, equals, value = word.partition("=")
        swept = equals and "," in value and value[0] not in "['\"{" and not value.startswith("/")
        if not key.startswith("hydra/"):
            jobs.append(f"{key}={value.split(',')[0]}" if swept else word)
    return jobs


LEFT_OUT = (
    *("my_module", "my_rewards", "my_sampler", "my_conf", "/my/model.safetensors", "device=cuda", "resume="),
    *("tracker=wandb", "tracker=trackio"),
)
"""Of commands with these words the composition is tried alone: they need a file, a machine or a library of
the reader's."""


def test_every_command_can_be_typed(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A train command is checked as it is before a model is loaded; of the others the configuration is
    composed."""
    wrong = []
    for page, command, words in typed():
        if any(word in OPTIONS_OF_HYDRA for word in words):
            continue  # an option of Hydra's, which shows and does nothing
        asked, line = shrunk(words, places), f"{page}: {command} {shlex.join(words)}"
        if command == "train" and not any(part in word for part in LEFT_OUT for word in asked):
            try:
                configured(*asked)
            except Exception as error:  # whatever it is, the next line is tried too
                wrong.append(f"{line}\n    {error}")
            continue
        module = import_module("alignlab.rewards.__main__" if command == "rewards" else f"alignlab.{command}")
        with pytest.MonkeyPatch.context() as patch:
            code = command_line(patch, "--cfg", "job", *asked, command=module)
        said = capsys.readouterr().err
        if code:
            wrong.append(f"{line}\n    {said}")
    assert not wrong, "\n".join(wrong)
