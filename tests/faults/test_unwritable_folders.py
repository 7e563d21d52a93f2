"""Folders and files that may not be written: every command says so before it loads a model or draws an
image."""

import errno
import shutil
from pathlib import Path

import pytest
from PIL import Image

from alignlab import evaluate, export, figure, make_pairs, report, sample, train_reward
from alignlab.runs import folder as runs
from alignlab.train import train
from tests.running import command_line, configured, tiny
from tests.runs_on_disk import made_run


@pytest.fixture(scope="module")
def finished(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests must not change."""
    folder = tmp_path_factory.mktemp("unwritable") / "run"
    train(configured(*tiny(tiny_sd, "steps=1")), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model has looked too late."""
    for module in (evaluate, sample, make_pairs):
        monkeypatch.setattr(module, "policy_of", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(export, "build", lambda node: pytest.fail("a model was loaded"))
    monkeypatch.setattr(train_reward, "Fit", lambda *_, **__: pytest.fail("a reward was trained"))
    monkeypatch.setattr(figure, "run_sweeps", lambda *_: pytest.fail("a sweep was run"))


def ratings(folder: Path) -> Path:
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (48, 48), (30 * k, 90, 40)).save(folder / f"{k}.png")
    (folder / "r.csv").write_text("image,rating\n" + "".join(f"{k}.png,{k}\n" for k in range(4)))
    return folder


COMMANDS = {
    "evaluate": (evaluate, ["run={run}", "name=a", "features=null", "cache={home}/cache"], "run"),
    "evaluate's cache": (evaluate, ["run={run}", "features=null", "cache={home}/taken/cache"], "taken"),
    "export": (export, ["run={run}", "to=kohya", "output={home}/taken/x.safetensors"], "taken"),
    "export of a pipeline": (export, ["run={run}", "to=pipeline", "output={home}/taken/x"], "taken"),
    "sample": (sample, ["run={run}", "output={home}/taken/x.png"], "taken"),
    "make_pairs": (make_pairs, ["run={run}", "candidates=2", "output_dir={home}/taken/x"], "taken"),
    "report": (report, ["runs={home}/made", "output_dir={home}/taken/x"], "taken"),
    "figure": (figure, ["name=draftp_fig3", "home={home}/taken"], "taken"),
    "train_reward": (
        train_reward,
        ["kind=aesthetic", "data={home}/data", "output_dir={home}/taken/x", "device=cpu"],
        "taken",
    ),
}
"""A command, its words, and the folder that it may not write."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_written(
    name: str, run: Path, no_model: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The system says that permission is denied: one sentence names the folder, nothing was computed, and no
    folder was made."""
    command, words, which = COMMANDS[name]
    ratings(tmp_path / "data")
    made_run(tmp_path / "made")
    taken = tmp_path / which
    taken.mkdir(exist_ok=True)
    real = Path.touch

    def touch(self: Path, *more: object, **options: object) -> None:
        if self.parent == taken:  # root may write anywhere, so the system's refusal is put here
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runs.Path, "touch", touch)
    before = sorted(tmp_path.rglob("*"))
    typed = [word.format(home=tmp_path, run=run) for word in words]
    assert command_line(monkeypatch, *typed, command=command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said and all(
        line.startswith(f"error: {taken} cannot be written (Permission denied); mend that, or choose")
        for line in said
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_place_of_a_folder(
    name: str, run: Path, no_model: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A file stands where the command would make a folder: one sentence names it, and it is as it was."""
    command, words, _ = COMMANDS[name]
    ratings(tmp_path / "data")
    made_run(tmp_path / "made")
    (tmp_path / "taken").write_text("mine")
    (run / "a").write_text("mine")
    typed = [word.format(home=tmp_path, run=run) for word in words]
    assert command_line(monkeypatch, *typed, command=command) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    place = run / "a" if name == "evaluate" else tmp_path / "taken"
    assert (
        said and all(f"{place} " in line or f"{place}/" in line for line in said) and "Errno" not in said[0]
    )
    assert (tmp_path / "taken").read_text() == (run / "a").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "words", "place"),
    [
        (evaluate, ["run={run}", "features=null", "cache={home}/cache"], "run/evaluation/images.csv"),
        (evaluate, ["run={run}", "features=null", "cache={home}/cache"], "run/evaluation/evaluation.json"),
        (sample, ["run={run}"], "run/sample.png"),
        (report, ["runs={home}/made", "output_dir={home}/out"], "out/report.html"),
        (make_pairs, ["run={run}", "candidates=2", "output_dir={home}/out"], "out/pairs.jsonl"),
        (figure, ["name=draftp_fig3", "home={home}"], "paper/draftp_fig3/table.csv"),
    ],
)
def test_a_folder_in_place_of_a_file(
    command, words, place: str, run: Path, no_model: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A folder has the name of a file that the command would write at its end: one sentence names it, before
    anything is computed."""
    made_run(tmp_path / "made")
    (tmp_path / place).mkdir(parents=True)
    typed = [word.format(home=tmp_path, run=run) for word in words]
    assert command_line(monkeypatch, *typed, command=command) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / place} is a folder, and a file of that name is to be written; move it" in said


def test_resume_of_a_run_whose_model_folder_is_a_file(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """RUN/model is written after the last epoch: what stands in its way is named before a model is loaded."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    (run / "model").write_text("mine")
    monkeypatch.setattr(
        "alignlab.models.sd.StableDiffusion.__init__", lambda *_, **__: pytest.fail("a model was loaded")
    )
    assert command_line(monkeypatch, f"resume={run}") == 2
    assert (
        f"error: {run / 'model'} is a file, and a run needs a folder of that name; move it"
        in capsys.readouterr().err
    )
