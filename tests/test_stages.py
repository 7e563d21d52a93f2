"""python -m alignlab.stages: what each stage is told, and that a chain that was stopped goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml

from alignlab import make_pairs, stages, train, train_reward
from alignlab.config.compose import CONF
from tests.running import command_line, pairs, tiny

ROOT = Path(__file__).resolve().parents[1]
HAVE_SCHEMAS = (make_pairs, train, train_reward)
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run, in order, in place of running it."""
    seen: list[list[str]] = []

    def note(words: list[str], *flags: str, quiet: bool = False) -> int:
        seen.append([*words, *flags])
        return 0

    monkeypatch.setattr(stages, "run", note)
    return seen


def test_later_stages_begin_from_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]
) -> None:
    """All words are read before the first stage; then each in its folder, with the folders of those before,
    the seed and what was added."""
    words = ["recipe=rlhf", f"output_dir={tmp_path}", "seed=3", "+more.tuned='steps=7 lr=0.1'"]
    assert command_line(monkeypatch, *words, command=stages) == 0
    read, ran = typed[:3], typed[3:]
    assert [line[-2:] for line in read] == [["--cfg", "job"]] * 3 and [line[:-2] for line in read] == ran
    assert [line[0] for line in ran] == ["make_pairs", "train_reward", "train"]
    assert [line[-1] for line in ran] == [
        f"output_dir={tmp_path / name}" for name in ("pairs", "reward", "tuned")
    ]
    assert (
        f"data={tmp_path / 'pairs'}" in ran[1] and f"reward.preference.path={tmp_path / 'reward'}" in ran[2]
    )
    assert (
        all("seed=3" in line for line in ran)
        and ran[2][-4:-2] == ["steps=7", "lr=0.1"]
        and "steps=7" not in ran[1]
    )


def test_what_is_there_already_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]
) -> None:
    words = ["recipe=rlhf", f"output_dir={tmp_path / 'out'}", f"+given.pairs={tmp_path}"]
    assert command_line(monkeypatch, *words, command=stages) == 0
    assert [line[0] for line in typed[2:]] == ["train_reward", "train"] and f"data={tmp_path}" in typed[2]


def test_quick_words_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]
) -> None:
    assert (
        command_line(
            monkeypatch, "recipe=preference_dpo", "quick=true", f"output_dir={tmp_path}", command=stages
        )
        == 0
    )
    its = yaml.safe_load((CONF / "recipe" / "preference_dpo.yaml").read_text())
    assert its["pairs"]["quick"] and all(word in typed[0] for word in its["pairs"]["quick"])


def test_a_stage_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own exit code (75 of a run that was asked to stop, say) and the words to go on; a mistake in
    the last one ends it before the first."""
    ran = []

    def second(words: list[str], *flags: str, quiet: bool = False) -> int:
        ran.append(words[0])
        return 75 if not flags and words[0] == "train_reward" else 0

    monkeypatch.setattr(stages, "run", second)
    assert command_line(monkeypatch, "recipe=rlhf", f"output_dir={tmp_path}", command=stages) == 75
    assert ran[3:] == ["make_pairs", "train_reward"]
    assert (
        f"reward ended with code 75; the same command, with output_dir={tmp_path}" in capsys.readouterr().err
    )
    ran.clear()
    monkeypatch.setattr(
        stages, "run", lambda words, *flags, quiet=False: ran.append(words[0]) or 2 * (words[0] == "train")
    )
    assert command_line(monkeypatch, "recipe=rlhf", f"output_dir={tmp_path}", command=stages) == 2
    assert ran == ["make_pairs", "train_reward", "train"]
    assert (
        "recipe.tuned: what is wrong with its words stands above; nothing was begun"
        in capsys.readouterr().err
    )


def test_other_words_in_the_same_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: list[list[str]],
) -> None:
    """What is finished there would not be theirs. Braces that name no stage are Hydra's."""
    braces = "pairing.weights={true_preference:1}"
    words = ["recipe=rlhf", f"output_dir={tmp_path / 'braces'}", f"+more.pairs='{braces}'"]
    assert command_line(monkeypatch, *words, command=stages) == 0 and braces in typed[0]
    words[1:] = [f"output_dir={tmp_path / 'out'}"]
    assert command_line(monkeypatch, *words, "+more.pairs='pairing.margin=0.2'", command=stages) == 0
    assert command_line(monkeypatch, *words, "+more.pairs='pairing.margin=0.3'", command=stages) == 2
    assert "stages.yaml says pairs: " in capsys.readouterr().err


def test_a_file_cannot_open_the_door(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    typed: list[list[str]],
) -> None:
    """A recipe of --config-dir that sets `more` for itself is held to the same as its words; what is typed is
    the user's word."""
    (tmp_path / "recipe").mkdir()
    theirs = (
        "# @package _global_\nmore: {a: 'allow_targets=[os]'}\nrecipe: {a: {command: train, words: []}}\n"
    )
    (tmp_path / "recipe" / "theirs.yaml").write_text(theirs)
    words = [f"--config-dir={tmp_path}", "recipe=theirs", f"output_dir={tmp_path / 'out'}"]
    assert command_line(monkeypatch, *words, command=stages) == 2
    assert "recipe.a: allow_targets=[os] may not stand in a file" in capsys.readouterr().err and not typed
    assert command_line(monkeypatch, *words, "more.a='allow_targets=[os]'", command=stages) == 0
    assert "allow_targets=[os]" in typed[-1]


def test_signals_are_the_stages(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM leave the stage as much time as it wants; its code is the code of all."""
    (tmp_path / "alignlab").mkdir()
    (tmp_path / "alignlab" / "__init__.py").touch()
    (tmp_path / "alignlab" / "slow.py").write_text(SLOW)
    parent = (
        "import sys; sys.path.insert(0, ROOT); from alignlab import stages; sys.path.pop(0); "
        "sys.exit(stages.run(['slow']))"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        it = subprocess.Popen(
            [sys.executable, "-c", parent.replace("ROOT", repr(str(ROOT)))],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert it.stdout is not None and it.stdout.readline() == "begun\n"
        os.killpg(it.pid, number) if number == signal.SIGINT else it.send_signal(number)
        assert (it.stdout.read(), it.wait()) == ("saved\n", 75)


SLOW = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
time.sleep(60)
"""
"""A stage that needs a second to save."""


MISTAKES = {
    "no such recipe": ("recipe=rlfh", "recipe=rlfh is no option; did you mean recipe=rlhf?"),
    "given what is no stage": (
        "recipe=rlhf +given.pair=.",
        "given.pair is no stage of the recipe; did you mean given.pairs?",
    ),
    "given what is not there": (
        "recipe=rlhf +given.pairs=/nowhere",
        "given.pairs=/nowhere does not exist; give a folder",
    ),
    "quotes": (
        "recipe=rlhf +more.tuned='x\\'y'",
        "more.tuned=x'y cannot be split into words (No closing quotation); mend its quotes",
    ),
    "another command": (
        "+recipe.look={command:report,words:[]}",
        "recipe.look is no stage; give it command (one of train, train_reward, make_pairs)",
    ),
    "from a later stage": (
        "recipe.pairs.words=['reward={tuned}']",
        "recipe.pairs: {tuned} is no earlier stage; known are none",
    ),
    "words that are no text": ("recipe.pairs.words=[5]", "recipe.pairs is no stage; give it command"),
    "words of a file that need trust": (
        "+recipe.pairs.quick=['allow_targets=[os]']",
        "recipe.pairs: allow_targets=[os] may not stand in a file; if you trust it, type '+more.pairs=",
    ),
    "Hydra's own keys": (
        "+recipe.tuned.quick=['+hydra.callbacks.x=y']",
        "recipe.tuned: +hydra.callbacks.x=y may not stand in a file",
    ),
    "flags": (
        "+recipe.tuned.quick=['--config-dir=x']",
        "recipe.tuned: --config-dir=x may not stand in a file",
    ),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(words: str, said: str, tmp_path: Path, monkeypatch, capsys, typed: list[list[str]]) -> None:
    assert command_line(monkeypatch, *words.split(), f"output_dir={tmp_path}", command=stages) == 2
    assert said in capsys.readouterr().err and not typed


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]
) -> None:
    """Its stages' words name keys and groups that their commands have; the file's first line is its
    command."""
    assert (
        command_line(monkeypatch, f"recipe={name}", "quick=true", f"output_dir={tmp_path}", command=stages)
        == 0
    )
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for line in typed[len(typed) // 2 :]:
            hydra.compose(line[0], line[1:])
    assert (
        (CONF / "recipe" / f"{name}.yaml")
        .read_text()
        .startswith(f"# python -m alignlab.stages recipe={name} output_dir=FOLDER\n")
    )


@pytest.mark.slow
def test_from_choices_to_a_tuned_model(tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: pairs are given, a reward is fitted on them, a run follows it; typed again, nothing is done
    twice."""
    table = tmp_path / "pairs"
    pairs(table, 12)
    run = [word for word in tiny(tiny_sd) if not word.startswith("reward=")]
    recipe = {
        "pairs": {"command": "make_pairs", "words": []},
        "reward": {
            "command": "train_reward",
            "words": ["kind=preference", "data={pairs}", "epochs=1", "device=cpu"],
        },
        "tuned": {
            "command": "train",
            "words": [*run, "algo=draft", "reward=preference", "reward.preference.path={reward}"],
        },
    }
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    out = tmp_path / "out"
    words = [f"--config-dir={tmp_path / 'conf'}", "recipe=mine", f"+given.pairs={table}", f"output_dir={out}"]
    assert command_line(monkeypatch, *words, command=stages) == 0
    made = {
        path: path.stat().st_mtime_ns
        for path in (out / "reward" / "reward.json", out / "tuned" / "summary.json")
    }
    assert json.loads((out / "tuned" / "summary.json").read_text())["reward_unit"] == "log-odds"
    assert command_line(monkeypatch, *words, command=stages) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
