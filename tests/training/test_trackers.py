"""What TensorBoard, wandb and trackio get of a run, and what becomes of a run whose tracker fails."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from alignlab import train as train_module
from alignlab.config.job_names import WORDS
from alignlab.config.schema import Tracking, TrainConfig
from alignlab.files.safe_folder import RunError
from alignlab.runs.folder import Run
from alignlab.train import train
from alignlab.training.trackers import Trackers, shown_as, trackers_of
from tests.running import command_line, configured, lines, stopped_and_resumed, tiny


class Noted:
    """Stands in for wandb and for trackio: notes what it is told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.ended = 0

    def init(self, **how: Any) -> "Noted":
        self.begun.append(how)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended += 1

    @staticmethod
    def Image(path: str, caption: str) -> tuple[str, str]:
        return Path(path).name, caption


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    """In place of both libraries."""
    stand_in = Noted()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def board(run: Path) -> EventAccumulator:
    """What TensorBoard reads of a run."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    read.Reload()
    return read


def small(model: str, *more: str) -> TrainConfig:
    return configured(*tiny(model, "algo=draft", "steps=3", "eval_every=2", *more))


def test_tensorboard_has_numbers_pictures_and_settings(tiny_sd: str, tmp_path: Path) -> None:
    """Numbers of every epoch, samples of every evaluation, and the configuration for the table of runs. All
    files lie in one folder."""
    train(small(tiny_sd), tmp_path / "run")
    read = board(tmp_path / "run")
    assert [event.step for event in read.Scalars("reward/mean")] == [1, 2, 3]
    logged = [line["reward/mean"] for line in lines(tmp_path / "run")]
    assert [event.value for event in read.Scalars("reward/mean")] == pytest.approx(logged, rel=1e-6)
    assert [event.step for event in read.Images("samples")] == [0, 2, 3]
    assert (read.Images("samples")[0].width, read.Images("samples")[0].height) > (16, 16)
    about = plugin_data_pb2.HParamsPluginData.FromString(
        read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    settings = about.session_start_info.hparams
    assert (
        settings["algo.k"].number_value == 1
        and settings["prompts.prompts"].string_value == "['cat', 'dog', 'fish']"
    )
    assert all(path.is_file() for path in (tmp_path / "run" / "tensorboard").iterdir())


def test_a_resumed_run_has_each_epoch_once(
    tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TensorBoard, also what was logged after the checkpoint that the run goes on from."""
    c, run = small(tiny_sd, "checkpoint_every=0"), tmp_path / "run"
    stopped_and_resumed(c, run, monkeypatch, before=3)
    assert [event.step for event in board(run).Scalars("reward/mean")] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_what_a_tracker_gets(
    kind: str, noted: Noted, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Project, name, configuration, numbers and samples; a resumed run goes on in the same tracker run."""
    c = small(tiny_sd, "tracking.project=lions", "tracking.tags=[a,b]")
    stopped_and_resumed(replace(c, tracker=kind), tmp_path / "run", monkeypatch, before=3)
    first, again = noted.begun
    assert (first["project"], first["name"], first["group"]) == ("lions", "run", None)
    whole = first["config"]
    assert (whole["algo"]["k"] if kind == "wandb" else whole["algo.k"]) == 1
    if kind == "wandb":
        assert first["tags"] == ["a", "b"] and first["dir"] == str(tmp_path / "run")
        assert first["id"] == again["id"] == (tmp_path / "run" / "tracker_id").read_text().strip()
        assert first["resume"] == again["resume"] == "allow"
    else:
        assert (first["resume"], again["resume"], again["name"]) == ("never", "allow", "run")
    numbers = {step: values for step, values in noted.logged if "samples" not in values}
    assert [*numbers] == [0, 1, 2, 3] and numbers[3]["reward/mean"] == lines(tmp_path / "run")[2][
        "reward/mean"
    ]
    pictures = [values["samples"] for _, values in noted.logged if "samples" in values]
    assert pictures == [(f"step_{step:06d}.png", f"epoch {step}") for step in (0, 2, 3)]
    assert noted.ended == 2


def test_a_job_is_shown_with_its_sweep(tiny_sd: str, tmp_path: Path) -> None:
    """By the folders' names, unless others are typed."""
    job = tmp_path / "my sweep" / "seed-1"
    job.mkdir(parents=True)
    c = small(tiny_sd)
    assert shown_as(c, job) == ("seed-1", None)
    (job / WORDS).write_text("[]")
    assert shown_as(c, job) == ("my sweep/seed-1", "my sweep")
    assert shown_as(replace(c, tracking=Tracking(name="n", group="g")), job) == ("n", "g")


def test_a_tracker_that_does_not_start_is_told_before_the_run(
    noted: Noted, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the base model is measured, in a sentence that says how to go on."""

    def refuse(**how: Any) -> None:
        raise ValueError("api_key not configured\nmore")

    monkeypatch.setattr(noted, "init", refuse)
    monkeypatch.setattr(train_module, "measure_base", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(
        RunError, match=r"tracker=wandb does not start: api_key not configured; mend that, or"
    ):
        train(replace(small(tiny_sd), tracker="wandb"), tmp_path / "run")


def test_a_tracker_that_fails_is_left_out(
    noted: Noted, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The run goes on and says so once; the other tracker goes on too."""

    def broken(values: dict[str, Any], step: int) -> None:
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(noted, "log", broken)
    train(replace(small(tiny_sd), tracker="wandb"), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("warning: Wandb shows no more of this run (the network is gone)") == 1
    assert len(board(tmp_path / "run").Scalars("reward/mean")) == 3


def test_the_id_of_a_foreign_folder_is_not_trusted(tiny_sd: str, tmp_path: Path) -> None:
    """Anything but 16 hexadecimal digits is replaced."""
    run = Run(tmp_path / "run", {})
    run.begin()
    (tmp_path / "run" / "tracker_id").write_text("../../somebody")
    own = run.tracker_id()
    assert len(own) == 16 and int(own, 16) >= 0 and run.tracker_id() == own


def test_only_process_0_tracks(tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have no trackers, and need none."""
    monkeypatch.setattr("alignlab.training.trackers.rank", lambda: 1)
    assert trackers_of(small(tiny_sd), SimpleNamespace(folder=tmp_path), first=0) == []  # type: ignore[arg-type]
    Trackers([], tmp_path)({"step": 0, "eval/reward": 1.0})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tracking.project=a/b", "tracking.project=a/b must have 1 to 128 characters"),
        ("tracking.projct=a", "tracking.projct is not a known key; did you mean tracking.project?"),
        ("~tracking.tags", "tracking.tags must not be deleted"),
    ],
)
def test_mistakes(word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One sentence, before anything is loaded."""
    assert command_line(monkeypatch, word) == 2
    assert said in capsys.readouterr().err


def test_a_link_in_place_of_wandbs_folder_is_refused(noted: Noted, tiny_sd: str, tmp_path: Path) -> None:
    """The run folder may be somebody else's, and wandb would write where the link leads."""
    run, elsewhere = Run(tmp_path / "run", {}), tmp_path / "elsewhere"
    run.begin()
    elsewhere.mkdir()
    (run.folder / "wandb").symlink_to(elsewhere)
    with pytest.raises(RunError, match="wandb is a link"):
        trackers_of(replace(small(tiny_sd), tracker="wandb"), run, first=0)
    assert not noted.begun and not [*elsewhere.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_real_library(kind: str, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: two parts of one run, its numbers and its pictures, in the library's own files."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(kind)
    c, run = replace(small(tiny_sd), tracker=kind), tmp_path / "run"
    stopped_and_resumed(c, run, monkeypatch, before=3)
    if kind == "wandb":
        kept = [*(run / "wandb").glob("offline-run-*/run-*.wandb")]
        assert {path.stem for path in kept} == {f"run-{(run / 'tracker_id').read_text().strip()}"}
        pictures = {path.name for path in (run / "wandb").rglob("*.png") if path.is_file()}
    else:
        import trackio

        own = trackio.Api().runs("alignlab")
        assert [one.name for one in own] == ["run"]
        pictures = {path.name for path in (tmp_path / "trackio").rglob("*.png")}
    assert len(pictures) >= 3
