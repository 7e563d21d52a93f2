"""python -m alignlab.stages: what each stage is told, and that a chain that was stopped goes on."""

import json
from pathlib import Path

import hydra
import pytest
import yaml

from alignlab import make_pairs, stages, train, train_reward
from alignlab.config import CONF
from tests.running import command_line, pairs, tiny

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


def test_later_stages_begin_from_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]) -> None:
    """All words are read before the first stage; then each in its folder, with the folders of those before, the seed and what was added."""
    words = ["recipe=rlhf", f"output_dir={tmp_path}", "seed=3", "+more.tuned='steps=7 lr=0.1'"]
    assert command_line(monkeypatch, *words, command=stages) == 0
    read, ran = typed[:3], typed[3:]
    assert [line[-2:] for line in read] == [["--cfg", "job"]] * 3 and [line[:-2] for line in read] == ran
    assert [line[0] for line in ran] == ["make_pairs", "train_reward", "train"]
    assert [line[-1] for line in ran] == [f"output_dir={tmp_path / name}" for name in ("pairs", "reward", "tuned")]
    assert f"data={tmp_path / 'pairs'}" in ran[1] and f"reward.preference.path={tmp_path / 'reward'}" in ran[2]
    assert all("seed=3" in line for line in ran) and ran[2][-4:-2] == ["steps=7", "lr=0.1"] and "steps=7" not in ran[1]


def test_what_is_there_already_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]) -> None:
    words = ["recipe=rlhf", f"output_dir={tmp_path / 'out'}", f"+given.pairs={tmp_path}"]
    assert command_line(monkeypatch, *words, command=stages) == 0
    assert [line[0] for line in typed[2:]] == ["train_reward", "train"] and f"data={tmp_path}" in typed[2]


def test_quick_words_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]) -> None:
    assert command_line(monkeypatch, "recipe=preference_dpo", "quick=true", f"output_dir={tmp_path}", command=stages) == 0
    its = yaml.safe_load((CONF / "recipe" / "preference_dpo.yaml").read_text())
    assert its["pairs"]["quick"] and all(word in typed[0] for word in its["pairs"]["quick"])


def test_a_stage_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own exit code (75 of a run that was asked to stop, say) and the words to go on; a mistake in the last one ends it before the first."""
    ran = []

    def second(words: list[str], *flags: str, quiet: bool = False) -> int:
        ran.append(words[0])
        return 75 if not flags and words[0] == "train_reward" else 0

    monkeypatch.setattr(stages, "run", second)
    assert command_line(monkeypatch, "recipe=rlhf", f"output_dir={tmp_path}", command=stages) == 75
    assert ran[3:] == ["make_pairs", "train_reward"]
    assert f"reward ended with code 75; the same command, with output_dir={tmp_path}" in capsys.readouterr().err
    ran.clear()
    monkeypatch.setattr(stages, "run", lambda words, *flags, quiet=False: ran.append(words[0]) or 2 * (words[0] == "train"))
    assert command_line(monkeypatch, "recipe=rlhf", f"output_dir={tmp_path}", command=stages) == 2
    assert ran == ["make_pairs", "train_reward", "train"]
    assert "recipe.tuned: what is wrong with its words stands above; nothing was begun" in capsys.readouterr().err


MISTAKES = {
    "no such recipe": ("recipe=rlfh", "recipe=rlfh is no option; did you mean recipe=rlhf?"),
    "given what is no stage": ("recipe=rlhf +given.pair=.", "given.pair is no stage of the recipe; did you mean given.pairs?"),
    "given what is not there": ("recipe=rlhf +given.pairs=/nowhere", "given.pairs=/nowhere does not exist; give a folder"),
    "quotes": ("recipe=rlhf +more.tuned='x\\'y'", "more.tuned=x'y cannot be split into words (No closing quotation); mend its quotes"),
    "another command": ("+recipe.look={command:report,words:[]}", "recipe.look is no stage; give it command (one of train, train_reward, make_pairs)"),
    "from a later stage": ("recipe.pairs.words=['reward={tuned}']", "recipe.pairs: a word names what is no earlier stage; known are none"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(words: str, said: str, tmp_path: Path, monkeypatch, capsys, typed: list[list[str]]) -> None:
    assert command_line(monkeypatch, *words.split(), f"output_dir={tmp_path}", command=stages) == 2
    assert said in capsys.readouterr().err and not typed


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[list[str]]) -> None:
    """Its stages' words name keys and groups that their commands have; the file's first line is its command."""
    assert command_line(monkeypatch, f"recipe={name}", "quick=true", f"output_dir={tmp_path}", command=stages) == 0
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
    """For real: pairs are given, a reward is fitted on them, a run follows it; typed again, nothing is done twice."""
    table = tmp_path / "pairs"
    pairs(table, 12)
    run = [word for word in tiny(tiny_sd) if not word.startswith("reward=")]
    recipe = {
        "pairs": {"command": "make_pairs", "words": []},
        "reward": {"command": "train_reward", "words": ["kind=preference", "data={pairs}", "epochs=1", "device=cpu"]},
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
    made = {path: path.stat().st_mtime_ns for path in (out / "reward" / "reward.json", out / "tuned" / "summary.json")}
    assert json.loads((out / "tuned" / "summary.json").read_text())["reward_unit"] == "log-odds"
    assert command_line(monkeypatch, *words, command=stages) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
