"""Somebody else's folder is data: no command writes, empties, removes or copies through a link in it, and
none waits for a pipe."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image

from alignlab import evaluate, export, figure, make_pairs, report, sample, stages, train, train_reward
from alignlab.compare.finished import read_runs
from alignlab.files.safe_folder import RunError, refuse_led_away, refuse_links
from alignlab.paper.probes import probe
from alignlab.runs.folder import Run
from alignlab.runs.stored_config import LATER_KEYS, read_config
from alignlab.training.model_card import upload
from tests.running import command_line, configured, pairs, tiny
from tests.runs_on_disk import made_run

SMALL = ["steps=2", "eval_every=2", "evaluation.prompts=1", "evaluation.final_images=1"]


@pytest.fixture(scope="module")
def finished(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests must not change."""
    run = tmp_path_factory.mktemp("links") / "run"
    train.train(configured(*tiny(tiny_sd, "algo=ddpo", "algo.statistics.min_count=2", *SMALL)), run)
    return run


@pytest.fixture(scope="module")
def made(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of pairs, which tests must not change."""
    folder = tmp_path_factory.mktemp("links") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        assert command_line(patch, *pair_words(tiny_sd, folder), command=make_pairs) == 0
    return folder


def pair_words(model: str, folder: Path) -> list[str]:
    return [
        f"model.path_or_id={model}",
        "eval_sampler.steps=2",
        "reward=brightness",
        "prompts.prompts=[cat,dog]",
        "prompts.unseen=[]",
        "candidates=2",
        "batch=2",
        "device=cpu",
        f"output_dir={folder}",
    ]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A mock of a user's home: nothing in it may change, whatever a foreign folder points to."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True)
    (folder / ".ssh" / "id").write_text("a private key")
    (folder / ".bashrc").write_text("export A=1\n")
    (folder / "step_000001.png").write_text("a picture of the user's")
    (folder / "epoch_000001").mkdir()
    return folder


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A command that waits for a pipe fails instead of hanging."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever", pytrace=False))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder with what they hold."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def theirs_of(source: Path, tmp_path: Path, *without: str) -> Path:
    """A copy of a folder as it comes from somebody else."""
    folder = tmp_path / "theirs"
    shutil.copytree(source, folder)
    for name in without:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return folder


def plant(folder: Path, name: str, target: Path) -> None:
    """Puts a link in the place of whatever had that name."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: ModuleType, *words: str
) -> str:
    """What a command says that must end with one sentence and exit code 2."""
    capsys.readouterr()
    assert command_line(monkeypatch, *words, command=command) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return sentence


LINKED = [
    ("checkpoints", ""),
    ("samples", ""),
    ("collected", ""),
    ("tensorboard", ""),
    ("model", ""),
    (".model", ""),
    (".lock", ".bashrc"),
    ("metrics.jsonl", ".bashrc"),
    ("summary.json", "not_there"),
    (".new_config.yaml", ".bashrc"),
    (".new_metrics.jsonl", ".bashrc"),
    ("checkpoints/.step_000001", ""),
    ("checkpoints/.step_000001/state.pt", ".bashrc"),
    ("checkpoints/step_000001", ""),
    ("checkpoints/.new_best_000001.safetensors", ".bashrc"),
    ("samples/.new_step_000000.png", ".bashrc"),
    ("samples/step_000000.png", ".bashrc"),
    ("collected/epoch_000001", "epoch_000001"),
    ("model/README.md", ".bashrc"),
]


@pytest.mark.parametrize(("name", "target"), LINKED)
def test_a_run_writes_through_no_link(
    name: str, target: str, finished: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """resume= of a folder of somebody else: one sentence, exit code 2, and the home is as it was."""
    before = contents(home)
    theirs = theirs_of(finished, tmp_path, "checkpoints", "summary.json")
    plant(theirs, name, home / target)
    said = refused(monkeypatch, capsys, train, f"resume={theirs}")
    assert f"{theirs / name} is a link" in said and "put what it leads to in its place, or remove it" in said
    assert contents(home) == before


@pytest.mark.parametrize(
    "name", [".lock", "tensorboard", "samples", "checkpoints", ".new_config.yaml", "multirun.yaml"]
)
def test_a_folder_without_a_run_is_no_way_either(
    name: str, home: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """What a killed run may have left passes for the beginning of one; a link of that name does not."""
    before = contents(home)
    (home / "empty").mkdir()
    plant(tmp_path / "theirs", name, home / ("empty" if name in ("samples", "checkpoints") else ".bashrc"))
    words = [*tiny(tiny_sd), f"output_dir={tmp_path / 'theirs'}"]
    assert "is a link" in refused(
        monkeypatch, capsys, train, *(["-m"] if name == "multirun.yaml" else []), *words
    )
    (home / "empty").rmdir()
    assert contents(home) == before


def test_the_users_own_link_is_followed(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """A run folder that is itself reached over a link goes on where the link leads."""
    run = theirs_of(finished, tmp_path, "summary.json")
    (tmp_path / "link").symlink_to(run)
    assert command_line(monkeypatch, f"resume={tmp_path / 'link'}") == 0
    assert (run / "summary.json").is_file() and (tmp_path / "link").is_symlink()


def test_hidden_files_of_others_stay(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Only what a run writes aside is removed from its checkpoints, and the lock is not emptied: it may have
    another name."""
    run = theirs_of(finished, tmp_path, "summary.json")
    (run / "checkpoints" / ".mine").write_text("mine")
    (run / "checkpoints" / ".step_000009").mkdir()
    (tmp_path / "twin").write_text("mine")
    for name in (".lock", ".new_summary.json"):
        os.link(tmp_path / "twin", run / name)
    assert command_line(monkeypatch, f"resume={run}") == 0
    assert (run / "checkpoints" / ".mine").read_text() == (tmp_path / "twin").read_text() == "mine"
    assert not (run / "checkpoints" / ".step_000009").exists()


def test_a_line_is_appended_to_no_other_name(tmp_path: Path) -> None:
    """metrics.jsonl of a copy by hard links (cp -l): the copy's lines are its own."""
    c = {
        **LATER_KEYS,
        **{key: {} for key in ("model", "algo", "reward", "prompts", "policy", "eval_rewards")},
    }
    run = Run(tmp_path / "run", c)
    run.begin()
    run.log({"step": 0})
    os.link(tmp_path / "run" / "metrics.jsonl", tmp_path / "twin")
    run = Run(tmp_path / "run", c)
    run.begin()
    run.log({"step": 1})
    assert len(run.metrics()) == 2 and (tmp_path / "twin").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize(
    "name", [".lock", "metrics.jsonl", "samples/step_000000.png", "tensorboard", "checkpoints/.step_000001"]
)
def test_no_command_waits_for_a_pipe(name: str, finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    theirs = theirs_of(finished, tmp_path, "summary.json")
    path = theirs / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.mkfifo(path)
    said = refused(monkeypatch, capsys, train, f"resume={theirs}")
    assert f"{path} is" in said and "a pipe, a socket or a device" in said


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "evaluation/images.csv",
        "samples/step_000000.png",
        "model/x.safetensors",
        "probes/lion/answer.json",
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_nothing_is_read_from_a_pipe_or_a_device(name: str, linked: bool, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to("/dev/zero") if linked else os.mkfifo(run / name)
    with pytest.raises(RunError, match=f"{name} is a pipe, a socket or a device"):
        read_config(run)
    with pytest.raises(ValueError, match=r"cannot be read|is not read"):
        read_runs([str(run)])


# -- the other commands


def test_a_data_set_is_filled_through_no_link(
    made: Path, home: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """make_pairs output_dir=: neither its lock, nor its images, nor its tables."""
    before = contents(home)
    for name, target in (
        (".lock", ".bashrc"),
        ("images", ""),
        ("candidates.jsonl", ".bashrc"),
        ("pairs.jsonl", ".bashrc"),
        (".new_pairs.jsonl", ".bashrc"),
        ("labels.jsonl", "not_there"),
        ("images/.new_00000_00.png", ".bashrc"),
    ):
        theirs = theirs_of(made, tmp_path, "candidates.jsonl")
        plant(theirs, name, home / target)
        said = refused(monkeypatch, capsys, make_pairs, *pair_words(tiny_sd, theirs))
        assert f"{theirs / name} is a link" in said
        shutil.rmtree(theirs)
    for name in (".lock", "images"):  # without a make_pairs.yaml
        plant(tmp_path / "theirs", name, home / ("not_there" if name == "images" else ".bashrc"))
        assert "is a link" in refused(
            monkeypatch, capsys, make_pairs, *pair_words(tiny_sd, tmp_path / "theirs")
        )
        shutil.rmtree(tmp_path / "theirs")
    assert contents(home) == before


@pytest.mark.parametrize("how", ["picture", "folder", "file", "aside", "in place"])
def test_only_pictures_are_copied(
    how: str, made: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """again=: no link's target comes into the new data set, and no file that is no picture."""
    before, theirs, new = contents(home), theirs_of(made, tmp_path), tmp_path / "new"
    words = [f"again={theirs}", f"output_dir={new}"]
    if how == "picture":
        plant(theirs, "images/00000_00.png", home / ".ssh" / "id")
    if how == "folder":
        (home / "pictures").mkdir()
        for path in (theirs / "images").iterdir():
            shutil.copy(path, home / "pictures")
        before = contents(home)
        plant(theirs, "images", home / "pictures")
    if how == "file":
        (theirs / "images" / "00000_00.png").write_text("a private key")
    if how == "aside":
        (tmp_path / ".new_new").symlink_to(home)
    if how == "in place":
        plant(theirs, ".new_pairs.jsonl", home / ".bashrc")
        words = [f"again={theirs}"]
    said = refused(monkeypatch, capsys, make_pairs, *words)
    assert ("00000_00.png is no picture" if how == "file" else "is a link") in said
    assert contents(home) == before and not new.exists()


@pytest.mark.parametrize(
    "name", ["evaluation", "evaluation/images.csv", "evaluation/.images.csv", "evaluation/evaluation.json"]
)
def test_an_evaluation_stays_in_its_folder(
    name: str, finished: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    before, theirs = contents(home), theirs_of(finished, tmp_path)
    plant(theirs, name, home / ("" if name == "evaluation" else ".bashrc"))
    assert "is a link" in refused(monkeypatch, capsys, evaluate, f"run={theirs}", "device=cpu")
    assert contents(home) == before


def test_a_picture_is_drawn_over_nothing(
    finished: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """sample: where it lies in the run, by default or as it was typed. A link of the user's elsewhere is
    followed."""
    before, theirs = contents(home), theirs_of(finished, tmp_path)
    plant(theirs, "sample.png", home / ".bashrc")
    plant(theirs, "more", home)
    words = [f"run={theirs}", "n=1", "prompt=cat", "device=cpu"]
    for typed in ([], [f"output={theirs}/more/new.png"], [f"output={theirs}/sample.png"]):
        assert "is a link" in refused(monkeypatch, capsys, sample, *words, *typed)
    assert contents(home) == before
    (tmp_path / "mine.png").symlink_to(tmp_path / "there.png")
    assert command_line(monkeypatch, *words, f"output={tmp_path}/mine.png", command=sample) == 0
    assert (tmp_path / "there.png").is_file()


def test_no_file_of_another_place_is_exported(
    finished: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A copy of RUN/model, to a folder or to the hub, holds what lies there; and an output in the run goes
    through no link."""
    before, theirs = contents(home), theirs_of(finished, tmp_path)
    plant(theirs, "out.safetensors", home / "not_there")
    plant(theirs, "more", home)
    for name in ("out.safetensors", "more/out.safetensors"):
        assert "is a link" in refused(monkeypatch, capsys, export, f"run={theirs}", f"output={theirs}/{name}")
    plant(theirs, "model/notes.txt", home / ".ssh" / "id")
    assert "is a link" in refused(
        monkeypatch, capsys, export, f"run={theirs}", "to=diffusers", f"output={tmp_path}/copy"
    )
    with pytest.raises(RunError, match=r"notes\.txt is a link"):
        upload(theirs / "model", "somebody/something")
    assert contents(home) == before and not (tmp_path / "copy").exists()


def test_a_report_stays_in_its_folder(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    before, theirs = contents(home), made_run(tmp_path / "theirs")
    for folder, name in (
        (theirs / "report", ""),
        (tmp_path / "page", "variants.csv"),
        (tmp_path / "page", ".new_report.html"),
    ):
        plant(folder.parent, f"{folder.name}/{name}".rstrip("/"), home / ".bashrc" if name else home)
        assert "is a link" in refused(monkeypatch, capsys, report, f"runs={theirs}", f"output_dir={folder}")
        shutil.rmtree(folder) if name else folder.unlink()
    assert contents(home) == before


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "head.safetensors", ".new_reward.json", "config.yaml", ".lock"]
)
def test_a_reward_stays_in_its_folder(name: str, home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    before, theirs = contents(home), tmp_path / "theirs"
    plant(theirs, name, home / ".bashrc")
    said = refused(
        monkeypatch, capsys, train_reward, f"data={pairs(tmp_path / 'data')}", f"output_dir={theirs}"
    )
    assert "is a link" in said and contents(home) == before


def test_stages_stay_in_their_folder(home: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """No stage's folder is a link, and no stage is called like a folder elsewhere."""
    before = contents(home)
    for name in ("stages.yaml", "pairs", ".lock"):
        plant(tmp_path / "theirs", name, home / (".bashrc" if "." in name else ""))
        monkeypatch.setattr(stages, "run", lambda words, *flags, quiet=False: 0)
        assert "is a link" in refused(
            monkeypatch, capsys, stages, "recipe=rlhf", f"output_dir={tmp_path / 'theirs'}"
        )
        (tmp_path / "theirs" / name).unlink()
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    stage = {"command": "train", "words": ["steps=1"]}
    (tmp_path / "conf" / "recipe" / "evil.yaml").write_text(
        yaml.safe_dump({"../../home": stage, str(home): stage})
    )
    assert (
        command_line(monkeypatch, "--config-dir", str(tmp_path / "conf"), "recipe=evil", command=stages) == 2
    )
    assert capsys.readouterr().err.count("is no name of a stage") == 2
    assert contents(home) == before


def test_figures_and_probes_stay_in_their_folders(
    finished: Path, home: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    before, theirs = contents(home), theirs_of(finished, tmp_path)
    plant(theirs, "probes/lion", home)
    with pytest.raises(RunError, match="lion is a link"):
        probe(theirs, "lion")
    for name, target in (
        ("paper/fronts/figure.png", ".bashrc"),
        ("paper/fronts", ""),
        ("paper", ""),
        ("runs", ""),
    ):
        plant(tmp_path / "results", name, home / target)
        said = refused(
            monkeypatch, capsys, figure, "name=fronts", f"home={tmp_path / 'results'}", "draw_only=true"
        )
        assert "is a link" in said
        shutil.rmtree(tmp_path / "results")
    assert contents(home) == before


def test_a_sweep_stays_in_its_folder(home: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A job's folder that is a link leads nowhere; the other jobs go on."""
    before, sweep = contents(home), tmp_path / "theirs"
    words = [
        "-m",
        *tiny(tiny_sd, "algo=ddpo", "algo.statistics.min_count=2", *SMALL),
        "seed=0,1",
        f"output_dir={sweep}",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(
            train,
            "train",
            lambda c, folder: pytest.fail("it trains") if folder.is_symlink() else {"final": {"reward": 0}},
        )
        patch.setattr(train, "tell", lambda summary, folder: None)
        assert command_line(patch, *words) == 0
        jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
        assert len(jobs) == 2
        shutil.rmtree(jobs[0])
        jobs[0].symlink_to(home)
        capsys.readouterr()
        assert command_line(patch, *words) == 2
    assert f"{jobs[0].name} is a link" in capsys.readouterr().err and contents(home) == before


# -- the rule itself


def test_every_part_of_a_way_counts(home: Path, tmp_path: Path) -> None:
    """A link above, a link below, one that leads nowhere, one behind `..`: all are refused; the folder itself
    may be one."""
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    for name in ("a", "a/b", "a/b/not_there", "*"):
        refuse_links(tmp_path / "link", name)
    for link, names in {
        "a/b/c": ["a", "a/b", "a/b/c", "a/b/c/d", "*"],
        "a/x": ["a", "a/x/../b", "a/x*"],
        ".new_x": [".new_*"],
    }.items():
        (folder / link).symlink_to(home if link != "a/b/c" else home / "not_there")
        for name in names:
            with pytest.raises(RunError, match=f"{link} is a link"):
                refuse_links(folder, name)
        (folder / link).unlink()
    (folder / "a" / "x").symlink_to(home)
    refuse_links(folder, "a", inside=False)
    refuse_led_away(folder / "a" / "x" / "picture.png")  # no folder of ours: the user's own word
    (folder / "make_pairs.yaml").touch()
    with pytest.raises(RunError, match="x is a link"):
        refuse_led_away(folder / "a" / "x" / "picture.png")


def test_candidates_are_bounded_as_captioned_pictures_are(
    made: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """13000 x 13000 pixels in kilobytes: refused by its header, where it is scored and where it is copied."""
    theirs = theirs_of(made, tmp_path, "candidates.jsonl")
    Image.new("1", (13000, 13000)).save(theirs / "images" / "00001_01.png")
    decoded: list[object] = []
    monkeypatch.setattr(
        Image.Image, "convert", lambda *given: decoded.append(given) or pytest.fail("it is unpacked")
    )
    for path in (theirs / "images").iterdir():
        if path.name != "00001_01.png":
            shutil.copy(theirs / "images" / "00001_01.png", path)
    said = refused(monkeypatch, capsys, make_pairs, *pair_words(tiny_sd, theirs))
    assert (
        "00000_00.png is no picture of this model (13000 x 13000 pixels" in said
        and "remove it, and type the command again" in said
    )
    shutil.copy(made / "candidates.jsonl", theirs)
    said = refused(monkeypatch, capsys, make_pairs, f"again={theirs}", f"output_dir={tmp_path / 'new'}")
    assert "00000_00.png is no picture (13000 x 13000 pixels are more than" in said and not decoded


def test_candidates_of_another_size_are_named(
    made: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A picture that the model did not draw, among others that it drew."""
    theirs = theirs_of(made, tmp_path, "candidates.jsonl")
    Image.new("RGB", (20, 16)).save(theirs / "images" / "00000_01.png")
    said = refused(monkeypatch, capsys, make_pairs, *pair_words(tiny_sd, theirs))
    assert "00000_01.png is no picture of this model (20 x 16 pixels, not 16 x 16)" in said
    assert (
        not [json.loads(line) for line in (theirs / "candidates.jsonl").open()]
        if (theirs / "candidates.jsonl").exists()
        else True
    )
