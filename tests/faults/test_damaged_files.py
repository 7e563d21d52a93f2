"""Files of a finished run that were damaged: whoever reads them says which, and the command that makes it
whole again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignlab import evaluate, report
from alignlab.compare.finished import CompareError, read_runs
from alignlab.config.schema import TrainConfig
from alignlab.report import report as make_report
from alignlab.train import train
from tests.running import command_line, configured, tiny
from tests.runs_on_disk import made_run

PROTOCOL = "images=2 diversity_prompts=2 diversity_images=3 features=null eval_rewards=colour".split()


def flip(path: Path) -> None:
    """The last digit of a file is another one: neither its size nor its form tell."""
    text = path.read_bytes()
    k = max(k for k, letter in enumerate(text) if chr(letter).isdigit())
    path.write_bytes(text[:k] + (b"1" if text[k : k + 1] != b"1" else b"2") + text[k + 1 :])


HARMS: dict[str, Callable[[Path], object]] = {
    "a null": lambda path: path.write_text("null\n"),
    "a list": lambda path: path.write_text("[]\n"),
    "nothing left": lambda path: path.write_text(""),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 40),
    "a digit": flip,
    "lost": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def evaluated(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished and evaluated run, and of a cache of the base model, which tests must not
    change."""
    home = tmp_path_factory.mktemp("damaged")
    train(
        configured(*tiny(tiny_sd, "steps=2", "eval_every=1", "lr=0.05", "eval_rewards=[colour]")),
        home / "run",
    )
    with pytest.MonkeyPatch.context() as patch:
        assert command_line(patch, f"run={home}/run", f"cache={home}/cache", *PROTOCOL, command=evaluate) == 0
    return home


def copied(evaluated: Path, tmp_path: Path) -> Path:
    shutil.copytree(evaluated, tmp_path / "home")
    return tmp_path / "home"


TABLES = ("images.csv", "base.csv", "images_diversity.json", "base_diversity.json")


@pytest.mark.parametrize(
    ("table", "harm"),
    [
        *((table, harm) for table in TABLES for harm in HARMS),
        *(
            ("evaluation.json", harm) for harm in HARMS if harm not in ("lost", "a folder")
        ),  # a run that was never evaluated
    ],
)
def test_a_damaged_evaluation(table: str, harm: str, evaluated: Path, tmp_path: Path) -> None:
    """A table, or the numbers, of an evaluation: the sentence names the file and says to evaluate again; a
    whole one is drawn."""
    run = copied(evaluated, tmp_path) / "run"
    assert make_report(read_runs([str(run)]), tmp_path / "whole", "Whole").is_file()
    HARMS[harm](run / "evaluation" / table)
    with pytest.raises(CompareError) as error:
        make_report(read_runs([str(run)]), tmp_path / "damaged", "Damaged")
    assert str(run / "evaluation" / table) in str(error.value) and "Errno" not in str(error.value)
    assert str(error.value).endswith(f"evaluate the run again: python -m alignlab.evaluate run={run}")
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("change", ["a column", "a line", "a line twice", "a word for a number", "no number"])
def test_a_table_without_a_digest(change: str, tmp_path: Path) -> None:
    """Evaluations of earlier versions have no digests: a table of another form is told by its form."""
    path = made_run(tmp_path / "run") / "evaluation" / "images.csv"
    lines = path.read_text().splitlines()
    changed = {
        "a column": [line.rpartition(",")[0] for line in lines],
        "a line": [*lines[:3], *lines[4:]],
        "a line twice": [*lines[:3], *lines[2:]],
        "a word for a number": [*lines[:3], lines[3].rpartition(",")[0] + ",much", *lines[4:]],
        "no number": [*lines[:3], lines[3].rpartition(",")[0] + ",nan", *lines[4:]],
    }[change]
    path.write_text("\n".join(changed) + "\n")
    with pytest.raises(
        CompareError, match=r"images\.csv .*evaluate the run again: python -m alignlab\.evaluate run="
    ):
        make_report(read_runs([str(tmp_path / "run")]), tmp_path / "out", "Damaged")


@pytest.mark.parametrize("harm", [*(harm for harm in HARMS if harm != "a folder"), "a blank line"])
def test_damaged_metrics_of_a_finished_run(
    harm: str, evaluated: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A report names metrics.jsonl; the command that its sentence prints puts the file back; then the report
    is drawn."""
    run = copied(evaluated, tmp_path) / "run"
    path = run / "metrics.jsonl"
    whole = path.read_text()
    if harm == "a blank line":
        path.write_text(whole.replace("\n", "\n\n", 1))
    else:
        HARMS[harm](path)
    words = [f"runs={run}", f"output_dir={tmp_path / 'out'}"]
    if harm != "a blank line":
        assert command_line(monkeypatch, *words, command=report) == 2
        said = capsys.readouterr().err
        assert str(path) in said and f"resume={run}" in said and "remove" not in said and "delete" not in said
        assert command_line(monkeypatch, f"resume={run}") == 0
        assert path.read_text() == whole
    assert command_line(monkeypatch, *words, command=report) == 0


@pytest.mark.parametrize("harm", ["half of it", "a digit", "no text", "a null"])
@pytest.mark.parametrize("file", ["images.csv", "images_diversity.json", "images.safetensors"])
def test_a_damaged_cache_of_the_base_model(
    file: str, harm: str, evaluated: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """evaluate tells that the kept measurements were damaged, measures the base model again, and its result
    is the same."""
    home = copied(evaluated, tmp_path)
    (kept,) = (home / "cache").iterdir()
    numbers = json.loads((home / "run" / "evaluation" / "evaluation.json").read_text())["rewards"]
    HARMS[harm](kept / file)
    assert (
        command_line(monkeypatch, f"run={home}/run", f"cache={home}/cache", *PROTOCOL, command=evaluate) == 0
    )
    assert "was damaged" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((home / "run" / "evaluation" / "evaluation.json").read_text())["rewards"] == numbers


def test_an_interrupted_run_with_damaged_metrics_ends_as_an_undisturbed_one(
    tiny_sd: str, tmp_path: Path, monkeypatch
) -> None:
    """By the real command: a run that was stopped, whose metrics.jsonl lost a line and got another digit,
    ends with the metrics and the weights of one that nobody disturbed."""
    words = tiny(tiny_sd, "steps=3", "eval_every=1")
    train(configured(*words), tmp_path / "whole")
    train_half(configured(*words), tmp_path / "half", monkeypatch)
    path = tmp_path / "half" / "metrics.jsonl"
    first, *more = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.replace("0", "9", 3), *more[1:]]))
    train(configured(*words), tmp_path / "half")
    timing = {"seconds", "images_per_second", "peak_memory_mb"}

    def measured(folder: Path) -> list[dict]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in timing} for line in lines]

    assert measured(tmp_path / "half") == measured(tmp_path / "whole")


def train_half(c: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three epochs."""
    from alignlab import train as command

    real = command.train_epoch

    def until(lab, c, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return real(lab, c, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(command, "train_epoch", until)
        with pytest.raises(KeyboardInterrupt):
            command.train(c, folder)
