"""Old names of experiments: they are typed on, and stored sweeps that were made with them are found."""

import re
from pathlib import Path

import pytest

from alignlab import figure, stages
from alignlab.config.build import ConfigError
from alignlab.config.compose import CONF
from alignlab.config.job_names import folder_of, write_words
from alignlab.config.moved_experiments import MOVED, first_word, present_word
from alignlab.paper.registry import FIGURES
from tests.running import command_line

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted({experiment for one in FIGURES.values() for experiment in one.experiments})


def test_every_old_name_has_one_file() -> None:
    files = {
        p.relative_to(CONF / "experiment").with_suffix("").as_posix()
        for p in CONF.glob("experiment/**/*.yaml")
    }
    assert {*MOVED.values()} <= files and len({*MOVED.values()}) == len(MOVED)
    assert all(re.fullmatch(r"(figure|paper)/\w+", name) for name in files)
    assert all(MOVED[sweep] == f"figure/{sweep}" for sweep in SWEEPS)


@pytest.mark.parametrize("old", ["draft_k", "dpo_offline_preference", "recipe_ddpo_aesthetic"])
def test_an_old_name_composes_the_same(
    old: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, name = MOVED[old].partition("/")
    said = []
    for word in (f"experiment={folder}/{name}", f"experiment={old}", f"experiment/{folder}={name}"):
        assert command_line(monkeypatch, "--cfg", "job", word) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("kl_coeff: ") and said[0] == said[1] == said[2]


def test_words() -> None:
    """Several values and quotes; what only resembles an old name stays."""
    for typed, meant in {
        "experiment=draft_k": "experiment=figure/draft_k",
        "experiment=figure/draft_k": "experiment=figure/draft_k",
        "experiment=draft_k, recipe_draft,mine": "experiment=figure/draft_k, paper/draft,mine",
        "experiment=choice('draft_k','drtune')": "experiment=choice('figure/draft_k','figure/drtune')",
        "experiment=my-preference": "experiment=my-preference",
        "experiment=mine/preference": "experiment=mine/preference",
        "experiment/paper=draft,draftp": "experiment=paper/draft,paper/draftp",
        "reward=preference": "reward=preference",
        "experiment": "experiment",
    }.items():
        assert present_word(typed) == meant
    assert all(first_word(f"experiment={new}") == f"experiment={old}" for old, new in MOVED.items())
    assert first_word("reward=figure/draft_k") == "reward=figure/draft_k"


def test_help_lists_the_new_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(monkeypatch, "--help") == 0
    said = capsys.readouterr().out.replace("\n    ", " ")  # long lists go on in the next line
    for new in MOVED.values():
        folder, _, name = new.partition("/")
        assert re.search(rf"^experiment/{folder}: .*\b{name}\b", said, re.MULTILINE)
    assert "experiment=figure/NAME" in said and "experiment=paper/NAME" in said and "recipe_draft" not in said


def test_a_stored_job_is_the_same_job(tmp_path: Path) -> None:
    """Whether its words are its folder's name or stand in its folder, and by whichever name it is typed."""
    unnamed = ["output_dir"]
    old, new = (["algo.k=2", f"experiment={name}", "seed=0"] for name in ("draft_k", "figure/draft_k"))
    for typed in (old, new):
        assert folder_of(tmp_path / "none", typed, {"algo.k"}, unnamed) == "algo.k-2"
    earlier = tmp_path / "named" / "algo.k=2,experiment=draft_k,seed=0"
    earlier.mkdir(parents=True)
    assert folder_of(tmp_path / "named", new, {"algo.k", "seed"}, unnamed) == earlier.name
    grid = figure.grid("draft_k", quick=False)
    assert figure.job_of(earlier) in grid
    for stored, typed in ((old, new), (new, old)):
        sweep = tmp_path / f"written_{stored is old}"
        (sweep / "kept").mkdir(parents=True)
        write_words(sweep / "kept", stored)
        assert folder_of(sweep, typed, {"algo.k", "seed"}, unnamed) == "kept"
        assert figure.job_of(sweep / "kept") in grid


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_stored_sweeps_are_whole(sweep: str) -> None:
    """All jobs of every figure's sweep are found in results/runs, which began under the old names."""
    there = {figure.job_of(run) for run in figure.summarised(ROOT / "results" / "runs" / sweep)}
    assert {*figure.grid(sweep, quick=False)} <= there


def test_stages_of_earlier_versions_go_on(tmp_path: Path) -> None:
    """A stage's words are stored; a recipe's new name for the same experiment is no difference."""
    words = {
        name: {"tuned": ["train", f"experiment={name}", "algo=dpo"]}
        for name in ("preference", "figure/preference")
    }
    stages.remember(tmp_path, words["preference"])
    stages.remember(tmp_path, words["figure/preference"])
    assert "figure/preference" in (tmp_path / "stages.yaml").read_text()
    with pytest.raises(ConfigError, match="but tuned: "):
        stages.remember(tmp_path, {"tuned": ["train", "experiment=drtune", "algo=dpo"]})
