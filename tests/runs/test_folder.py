"""The run directory's contract: what a run leaves behind, what it refuses, and that nothing half written
counts."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from alignlab.config.schema import stored_record
from alignlab.files.checksums import seal
from alignlab.files.safe_folder import RunError
from alignlab.runs import provenance
from alignlab.runs.folder import Run
from alignlab.runs.layout import run_folders
from alignlab.runs.stored_config import LATER_KEYS, NOT_SCIENCE, first_difference
from alignlab.train import train
from tests.disks import fill, flip, tear, truncate
from tests.running import command_line, configured, lines, tiny

STORED = Path(__file__).resolve().parents[2] / "results" / "runs"
ALWAYS = {
    "step",
    "samples_seen",
    "reward/mean",
    "reward/std",
    "loss",
    "kl",
    "grad_norm",
    "updates",
    "seconds",
    "images_per_second",
    "peak_memory_mb",
}
OWN = {
    "draftp": {"draft/kept_steps", "kl/eps_guided", "kl/eps_conditional"},
    "ddpo": {
        "ddpo/clip_fraction",
        "ddpo/approx_kl",
        "ddpo/log_ratio_max",
        "ddpo/own_statistics",
        "ddpo/advantage_mean",
        "ddpo/advantage_std",
    },
    "rwr": {"rwr/effective_sample_size", "rwr/weight_max", "rwr/error"},
}
EVALUATION = {"reward", "reward_std", "brightness", "colour", "lpips"}


@pytest.fixture(scope="module", params=OWN)
def run(request, tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("runs") / request.param
    words = tiny(tiny_sd, f"algo={request.param}", "eval_rewards=colour", "algo.updates_per_epoch=2")
    train(configured(*(w for w in words if "updates" not in w or request.param != "draftp")), folder)
    return request.param, folder


def test_what_a_run_leaves_behind(run) -> None:
    """Every file of the contract, and nothing else."""
    _, folder = run
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "samples",
        "checkpoints",
        "model",
        "tensorboard",
    }
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step_{k:06d}.png" for k in (0, 2, 4)]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
    ]  # the last two
    assert (folder / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert list((folder / "tensorboard").glob("events.*")) or list((folder / "tensorboard").rglob("events.*"))
    sizes = {Image.open(p).size for p in (folder / "samples").iterdir()}
    assert len(sizes) == 1  # the same grid: rows of one prompt


def test_metrics(run) -> None:
    """One JSON object an epoch with the contract's keys; eval/* at evaluation steps only; an algorithm's own
    under its name. Before them, the base model's evaluation."""
    name, folder = run
    base = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    evaluations = [{k for k in line if k.startswith("eval/")} for line in (base, lines(folder)[1])]
    assert base["step"] == base["samples_seen"] == 0 and evaluations[0] == evaluations[1] == base.keys() - {
        "step",
        "samples_seen",
    }
    assert base["eval/kl_eps_guided"] == 0 < lines(folder)[1]["eval/kl_eps_guided"]
    found = lines(folder, leave_out=())
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert [line["samples_seen"] for line in found] == [4, 8, 12, 16]
    for line in found:
        assert ALWAYS | OWN[name] <= line.keys()
        evaluated = {k.removeprefix("eval/") for k in line if k.startswith("eval/")}
        assert (
            (EVALUATION | {"kl_eps_guided", "kl_trajectory"} <= evaluated)
            if line["step"] % 2 == 0
            else not evaluated
        )
        assert (line["kl"] is not None) == (name == "draftp")
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_summary(run) -> None:
    """Base and final numbers under the same names, and what made them."""
    _, folder = run
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "base",
        "final",
        "wall_seconds",
        "samples_seen",
        "images_per_second",
        "peak_memory_mb",
        "seed",
        "versions",
        "git",
        "machine",
    } <= summary.keys()
    assert summary["base"].keys() == summary["final"].keys() >= EVALUATION
    assert summary["seed"] == 0 and summary["samples_seen"] == 16 and summary["base"]["lpips"] > 0
    assert {"alignlab", "torch", "diffusers", "peft", "python"} <= summary["versions"].keys()


def test_config_repeats_the_run(run, tmp_path) -> None:
    """config.yaml alone, plain values and no interpolation, is the same run again."""
    _, folder = run
    c = stored_record(folder)
    assert "${" not in (folder / "config.yaml").read_text()
    train(c, tmp_path / "again")
    assert lines(tmp_path / "again") == lines(folder)


def test_a_finished_run_is_left_alone(run, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """The same command on a finished run, or resume= of it, loads no model, changes no file and shows the
    result."""
    _, folder = run
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        "alignlab.models.sd.StableDiffusion.__init__", lambda *_, **__: pytest.fail("a model was loaded")
    )
    assert command_line(monkeypatch, f"resume={folder}") == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("sweep", sorted(p.name for p in STORED.iterdir()))
def test_a_committed_run_is_still_what_its_command_asks_for(sweep: str) -> None:
    """Keys that came after a finished run have the value that it had without them: typed again, its
    experiment skips it."""
    composed = {}
    for folder in sorted((STORED / sweep).glob("*/")):
        words = [word for word in folder.name.split(",") if word != "quick=True"]
        (seed,) = (word for word in words if word.startswith("seed="))
        others = tuple(word for word in words if word != seed)
        if others not in composed:  # the seeds of a variant differ in nothing else
            composed[others] = asdict(configured(*others, "seed=0"))
        asked = composed[others] | {"seed": int(seed.partition("=")[2])}
        assert Run(folder, asked, ignore=NOT_SCIENCE).summary is not None


def test_another_configuration_is_refused(run, monkeypatch, capsys) -> None:
    """The first key that differs is named with both values; device, tracker and the like may differ."""
    _, folder = run
    c = stored_record(folder)
    with pytest.raises(
        RunError, match=r"holds a run with seed=0, but seed=3 was asked for; choose another output_dir"
    ):
        train(replace(c, lr=0.5, seed=3), folder)
    with pytest.raises(RunError, match=r"with policy.lora.rank=2, but policy.lora.rank=3 was asked for"):
        train(replace(c, policy=c.policy | {"lora": c.policy["lora"] | {"rank": 3}}), folder)
    assert train(replace(c, device="auto", checkpoint_every=7), folder)["seed"] == 0
    assert command_line(monkeypatch, f"resume={folder}", "steps=9") == 2
    assert f"error: {folder} holds a run with" in capsys.readouterr().err


def test_foreign_files_are_left_alone(tmp_path, tiny_sd, monkeypatch, capsys) -> None:
    """A folder that holds something else is refused, untouched; so is a file."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark night.")
    for target, said in {
        "thesis": "is not empty and holds no run",
        "thesis/chapter1.tex": "cannot be written",
    }.items():
        assert command_line(monkeypatch, *tiny(tiny_sd, f"output_dir={tmp_path / target}")) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["It was a dark night."]


def checkpoint(run: Run, step: int) -> None:
    run.save_checkpoint(step, {"w": torch.full((3,), float(step))}, {"mark": step})


def test_checkpoints(tmp_path) -> None:
    """The newest whole one counts, the last two are kept, and metrics.jsonl is cut back to it."""
    run = Run(tmp_path / "run", {"lr": 1.0})
    run.begin()
    assert run.load_checkpoint() is None
    for step in range(1, 5):
        run.log({"step": step, "loss": float("nan")})
        checkpoint(run, step)
    run.log({"step": 5})
    weights, state = run.load_checkpoint() or ({}, {})
    assert weights["w"].tolist() == [4.0] * 3 and state["mark"] == state["step"] == 4
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert run.metrics()[0]["loss"] is None  # JSON has no NaN
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
    ]


@pytest.mark.parametrize(
    "call",
    ["runs.folder.save_file", "runs.folder.torch.save", "files.checksums.sync", "runs.folder.Path.rename"],
)
def test_a_checkpoint_is_whole_or_not_there(call: str, tmp_path, monkeypatch) -> None:
    """Whatever fails while one is written, the one before counts, and the next one is written."""
    run = Run(tmp_path / "run", dict(LATER_KEYS))
    run.begin()
    checkpoint(run, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            RunError,
            match=r"no space left on device.*; mend that and go on with python -m alignlab.train resume=",
        ),
    ):
        patch.setattr(f"alignlab.{call}", fail)
        checkpoint(run, 2)
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 1
    checkpoint(run, 2)
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 2


def test_keep_bounds_the_disk(tmp_path) -> None:
    """keep=3 leaves three checkpoints and three of the best weights; a second save of the same epoch changes
    nothing."""
    run = Run(tmp_path / "run", {"keep": 3})
    run.begin()
    for step in range(6):
        checkpoint(run, step)
        run.save_best(step, {"w": torch.zeros(2)})
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [
        *(f"best_00000{k}.safetensors" for k in (3, 4, 5)),
        *(f"step_00000{k}" for k in (3, 4, 5)),
    ]
    before = (tmp_path / "run/checkpoints/step_000005/state.pt").stat().st_mtime_ns
    checkpoint(run, 5)
    assert (tmp_path / "run/checkpoints/step_000005/state.pt").stat().st_mtime_ns == before


def test_what_a_killed_run_was_writing_is_gone(tmp_path) -> None:
    """Half a checkpoint, model or picture takes no room once the run goes on."""
    run = tmp_path / "run"
    for name in (
        "checkpoints/.step_000003/state.pt",
        ".model/unet/x",
        "samples/.new_step_000003.png",
        "checkpoints/.new_best_000003.safetensors",
        ".new_summary.json",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    c = {
        **LATER_KEYS,
        **{key: {} for key in ("model", "algo", "reward", "prompts", "policy", "eval_rewards")},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(c))
    Run(run, c).begin()
    assert {p.name for p in run.rglob("*")} == {"checkpoints", "samples", "config.yaml", ".lock"}


def test_a_run_that_was_killed_before_its_configuration_starts_again(tmp_path) -> None:
    """What `begin` makes first is no foreign file; pictures without a config.yaml are."""
    run = tmp_path / "run"
    for name in ("samples", "checkpoints"):
        (run / name).mkdir(parents=True)
    for name in (".lock", ".new_config.yaml"):
        (run / name).write_text("ste")
    Run(run, dict(LATER_KEYS)).begin()
    assert {p.name for p in run.rglob("*")} == {"checkpoints", "samples", "config.yaml", ".lock"}
    (run / "config.yaml").unlink()
    (run / "samples" / "mine.png").touch()
    with pytest.raises(RunError, match="is not empty and holds no run"):
        Run(run, dict(LATER_KEYS))


def test_only_a_full_disk_wants_room(tmp_path) -> None:
    """Of another error the sentence names the reason alone."""
    run = Run(tmp_path, dict(LATER_KEYS))
    full, other = (
        SafetensorError(f"Error while serializing: I/O error: said (os error {n})")
        for n in (errno.ENOSPC, errno.EIO)
    )
    mends = {full: "make room", other: "mend that", OSError(errno.EROFS, "read-only"): "mend that"}
    for error, mend in mends.items():
        with (
            pytest.raises(RunError, match=f"{mend} and go on with python -m alignlab.train resume="),
            run.room_for("model"),
        ):
            raise error


@pytest.mark.parametrize("harm", [flip, truncate, tear, Path.unlink])
@pytest.mark.parametrize("file", ["policy.safetensors", "state.pt", "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over(harm, file: str, tmp_path, capsys) -> None:
    """It is named, the one before is used with the metrics of its epoch, and it makes room for the next
    one."""
    run = Run(tmp_path / "run", dict(LATER_KEYS))
    run.begin()
    for step in (1, 2):
        run.log({"step": step})
        checkpoint(run, step)
    newest = tmp_path / "run" / "checkpoints" / "step_000002"
    harm(newest / file)
    again = Run(tmp_path / "run", dict(LATER_KEYS))
    weights, state = again.load_checkpoint() or ({}, {})
    if (file, harm) == (
        "checksums.json",
        Path.unlink,
    ):  # as versions before left them: whole, without checksums
        assert state["mark"] == 2 and not capsys.readouterr().out
        return
    assert (
        weights["w"].tolist() == [1.0] * 3
        and state["mark"] == 1
        and [line["step"] for line in again.metrics()] == [1]
    )
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {newest} is damaged (") and said.count("\n") == 1
    again.log({"step": 2})
    checkpoint(again, 2)
    _, state = Run(tmp_path / "run", dict(LATER_KEYS)).load_checkpoint() or ({}, {})
    assert state["mark"] == 2 and len(list(newest.parent.iterdir())) == 2


@pytest.mark.parametrize("harm", [truncate, tear])
def test_an_old_damaged_checkpoint_is_passed_over(harm, tmp_path, capsys) -> None:
    """One without checksums is tried, and what cannot be read is damaged."""
    run = Run(tmp_path / "run", dict(LATER_KEYS))
    run.begin()
    for step in (1, 2):
        checkpoint(run, step)
        (tmp_path / "run" / "checkpoints" / f"step_00000{step}" / "checksums.json").unlink()
    harm(tmp_path / "run" / "checkpoints" / "step_000002" / "state.pt")
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 1 and "step_000002 is damaged" in capsys.readouterr().out
    harm(tmp_path / "run" / "checkpoints" / "step_000001" / "policy.safetensors")
    with pytest.raises(
        RunError,
        match=r"holds no intact checkpoint \(step_000001, step_000002\); start again in another output_dir",
    ):
        Run(tmp_path / "run", dict(LATER_KEYS)).load_checkpoint()


def half_trained(folder: Path, **config: Any) -> Run:
    """Two epochs with a checkpoint each, the second evaluated better than the first."""
    run = Run(folder, {**LATER_KEYS, **config})
    run.begin()
    for step in (1, 2):
        run.log({"step": step, "eval/reward": 0.25 * step})
        run.save_best(step, {"w": torch.full((2,), float(step))})
        checkpoint(run, step)
    return run


METRICS_DAMAGES: dict[str, Callable[[str], str | None]] = {
    "a null": lambda text: "null\n" + text.partition("\n")[2],
    "a list": lambda text: "[]\n" + text.partition("\n")[2],
    "a blank line": lambda text: text.replace("\n", "\n\n", 1),
    "a digit": lambda text: text.replace("0.25", "0.75"),
    "a torn end": lambda text: text[:-3],
    "a line lost": lambda text: text.partition("\n")[2],
    "no text": lambda text: "\x00" * len(text),
    "nothing left": lambda text: "",
    "the file lost": lambda text: None,
}


@pytest.mark.parametrize("harm", METRICS_DAMAGES)
def test_damaged_metrics_are_put_back(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever happens to metrics.jsonl, its lines are put back from the newest checkpoint, with a line that
    says so, and none is lost."""
    run = half_trained(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    damaged = METRICS_DAMAGES[harm](whole)
    path.unlink() if damaged is None else path.write_text(damaged)
    _, state = Run(tmp_path / "run", dict(LATER_KEYS)).load_checkpoint() or ({}, {})
    assert state["mark"] == 2 and path.read_text() == whole and run.metrics()[0]["eval/reward"] == 0.25
    kept = tmp_path / "run" / "checkpoints" / "step_000002" / "metrics.jsonl"
    told = f"warning: {path} was {'lost' if damaged is None else 'damaged'}; it is put back from {kept}\n"
    assert capsys.readouterr().out == ("" if harm == "a blank line" else told)


def test_what_follows_a_checkpoint_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that a killed run was writing is named by whoever reads it, and is gone when the run goes on."""
    run = half_trained(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    with pytest.raises(
        RunError,
        match=(
            r"line 3 of .*metrics.jsonl cannot be read; this mends it from a checkpoint: python -m "
            r"alignlab.train resume="
        ),
    ):
        run.metrics()
    assert run.load_checkpoint() is not None and path.read_text() == whole and not capsys.readouterr().out


def test_metrics_of_a_checkpoint_that_keeps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of an earlier version counts on lines that must be there: without them it is passed over, and
    nothing is deleted."""
    run = half_trained(tmp_path / "run")
    for step in (1, 2):
        kept = tmp_path / "run" / "checkpoints" / f"step_00000{step}"
        (kept / "metrics.jsonl").unlink()
        (kept / "checksums.json").unlink()
        seal(kept)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-3])
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 1 and [line["step"] for line in run.metrics()] == [1]
    assert (
        "step_000002 is damaged (metrics.jsonl lacks some of its 2 lines, or has bad ones)"
        in capsys.readouterr().out
    )
    for damaged in ("null\n", "[]\n", "{}\n"):
        path.write_text(damaged)
        with pytest.raises(RunError, match="holds no intact checkpoint") as error:
            Run(tmp_path / "run", dict(LATER_KEYS)).load_checkpoint()
        assert "delete" not in str(error.value) and "remove" not in str(error.value)


def test_a_damaged_copy_of_the_metrics_costs_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines that a checkpoint keeps are a copy: if only they are damaged, the checkpoint is still
    used."""
    run = half_trained(tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step_000002" / "metrics.jsonl")
    weights, _ = run.load_checkpoint() or ({}, {})
    assert weights["w"].tolist() == [2.0] * 3 and not capsys.readouterr().out


def test_metrics_lost_while_the_run_goes_on(tmp_path: Path) -> None:
    """The next checkpoint still keeps every line, from which a resumed run puts the file back."""
    run = half_trained(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run.log({"step": 3})
    checkpoint(run, 3)
    again = Run(tmp_path / "run", dict(LATER_KEYS))
    again.load_checkpoint()
    assert [line["step"] for line in again.metrics()] == [1, 2, 3]


def test_metrics_of_a_finished_run_are_put_back(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """resume= of a finished run mends a flipped digit, and says so; nothing else is touched."""
    folder = tmp_path / "run"
    shutil.copytree(run[1], folder)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole.replace('"samples_seen": 8', '"samples_seen": 9'))
    before = {name: content for name, content in tree(folder).items() if name != "metrics.jsonl"}
    assert command_line(monkeypatch, f"resume={folder}") == 0
    said = capsys.readouterr().out
    assert "metrics.jsonl was damaged; it is put back from" in said and "is finished; nothing to do" in said
    assert (folder / "metrics.jsonl").read_text() == whole
    assert {name: content for name, content in tree(folder).items() if name != "metrics.jsonl"} == before


def test_damaged_best_weights_are_named_when_the_run_goes_on(tmp_path: Path) -> None:
    """select= exports them at the end, so they are looked at before the next epoch; with select=last nobody
    needs them."""
    half_trained(tmp_path / "run", select="reward")
    flip(tmp_path / "run" / "checkpoints" / "best_000002.safetensors")
    with pytest.raises(RunError, match=r"best_000002\.safetensors is damaged or not there"):
        Run(tmp_path / "run", {**LATER_KEYS, "select": "reward"}).load_checkpoint()
    half_trained(tmp_path / "other")
    flip(tmp_path / "other" / "checkpoints" / "best_000002.safetensors")
    assert Run(tmp_path / "other", dict(LATER_KEYS)).load_checkpoint() is not None


STRAYS = (
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "._config.yaml",
    "notes.txt~",
    ".config.yaml.swp",
    ".nfs000001",
)


def test_stray_files_are_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies and notes beside the checkpoints and best weights count as nothing, and stay, whatever their
    names sort as."""
    half_trained(tmp_path / "run")
    home = tmp_path / "run" / "checkpoints"
    shutil.copytree(home / "step_000001", home / "step_000002.bak")
    shutil.copytree(home / "step_000001", home / "step_x")
    (home / "step_000009 (copy)").mkdir()
    (home / "step_notes.txt").write_text("mine")
    shutil.copy(home / "best_000001.safetensors", home / "best_x.safetensors")
    for name in STRAYS:
        (home / name).write_text("mine")
        (tmp_path / "run" / name).write_text("mine")
    ours = re.compile(r"(step_0+[12]/.*|.*/(step|best)_0+[12](/.*|.safetensors))|metrics.jsonl|config.yaml")
    foreign = {name: content for name, content in tree(tmp_path / "run").items() if not ours.fullmatch(name)}
    assert len(foreign) > 2 * len(STRAYS)
    run = Run(tmp_path / "run", dict(LATER_KEYS))
    run.begin()
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 2 and not capsys.readouterr().out
    for step in (3, 4, 1_000_000):
        run.log({"step": step})
        run.save_best(step, {"w": torch.zeros(2)})
        checkpoint(run, step)
    assert (Run(tmp_path / "run", dict(LATER_KEYS)).load_checkpoint() or ({}, {}))[1]["mark"] == 1_000_000
    kept = {path.name for path in home.iterdir() if re.search(r"_\d+(.safetensors)?$", path.name)}
    assert kept == {name for k in ("000004", "1000000") for name in (f"step_{k}", f"best_{k}.safetensors")}
    after = tree(tmp_path / "run")
    assert {name: after[name] for name in foreign} == foreign


def test_stray_files_leave_a_folder_empty(tmp_path: Path) -> None:
    """What a file manager or an editor leaves does not make an output_dir somebody else's, and is still there
    afterwards."""
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for name in STRAYS:
        (run / name).write_text("mine")
        (run / "samples" / name).write_text("mine")
    Run(run, dict(LATER_KEYS)).begin()
    assert all((folder / name).read_text() == "mine" for folder in (run, run / "samples") for name in STRAYS)


@pytest.mark.parametrize("name", ["model", "tensorboard", "collected", "samples", "checkpoints"])
def test_a_file_in_place_of_a_folder(name: str, tmp_path: Path) -> None:
    """What the run would make at its end is looked at before it begins."""
    half_trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RunError, match=rf"{name} is a file, and a run needs a folder of that name; move it"):
        Run(tmp_path / "run", dict(LATER_KEYS))


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_a_folder_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    """The same of the files."""
    half_trained(tmp_path / "run")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(RunError, match=rf"{name} is a folder, and a run needs a file of that name; move it"):
        Run(tmp_path / "run", dict(LATER_KEYS))


def as_nobody(function: Callable[[], None]) -> str:
    """What a function prints in a process that may write only where everybody may: root may write
    anywhere."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            function()
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        return said.read()


@pytest.mark.parametrize(
    "name", ["model", "tensorboard", "samples", "checkpoints", "checkpoints/step_000001", ""]
)
def test_what_may_not_be_written_is_named_before_the_run(name: str, tmp_path: Path) -> None:
    """One folder of a run belongs to somebody else: `begin` says which, and not the end of the run."""
    half_trained(tmp_path / "run")
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        path.chmod(0o777)
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o555) if path.owner() == "root" and path != Path("/") else None
    (tmp_path / "run" / name).mkdir(exist_ok=True)
    (tmp_path / "run" / name).chmod(0o555)
    said = as_nobody(lambda: Run(tmp_path / "run", dict(LATER_KEYS)).begin())
    (tmp_path / "run" / name).chmod(0o777)
    assert said.startswith(
        f"RunError: {tmp_path / 'run' / name} cannot be written (Permission denied); mend that, or choose"
    ), said


def test_files_have_the_umasks_permissions(run) -> None:
    """All files of a run, those that safetensors writes too, can be read by whom the umask lets read."""
    folder = run[1]
    usual = folder / "usual"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    assert {
        str(path.relative_to(folder)): oct(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    } == {str(path.relative_to(folder)): oct(mode) for path in folder.rglob("*") if path.is_file()}


def test_the_best_weights_are_checked(tmp_path) -> None:
    """They come back bit for bit, those of earlier versions too; damaged ones are not taken for good."""
    run = Run(tmp_path / "run", dict(LATER_KEYS))
    run.begin()
    run.save_best(1, {"w": torch.arange(200.0)})
    assert run.load_best(1)["w"].equal(torch.arange(200.0))
    flip(tmp_path / "run" / "checkpoints" / "best_000001.safetensors")
    for step in (1, 2):
        with pytest.raises(RunError, match=f"best_00000{step}.safetensors is damaged or not there"):
            run.load_best(step)
    save_file({"w": torch.ones(2)}, tmp_path / "run" / "checkpoints" / "best_000003.safetensors")
    assert run.load_best(3)["w"].equal(torch.ones(2))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_full_disk_takes_nothing_away(small_disk: Path) -> None:
    """Whatever is written next, one sentence names it and the disk's reason, and every file is as before."""
    run = Run(small_disk / "run", {})
    run.begin()
    run.log({"step": 1})
    checkpoint(run, 1)
    fill(small_disk)
    before, big = tree(small_disk / "run"), torch.rand(50_000)
    for what, write in {
        "checkpoints/step_000002": lambda: run.save_checkpoint(2, {"w": big}, {}),
        "checkpoints/step_000003": lambda: run.save_checkpoint(3, {}, {"optimizer": big}),
        "checkpoints/best_000002.safetensors": lambda: run.save_best(2, {"w": big}),
        "samples/step_000002.png": lambda: run.save_samples(2, torch.rand(4, 3, 64, 64), 2),
        "metrics.jsonl": lambda: run.log({"step": 2, "words": "long " * 4000}),
        "model": lambda: run.save_model(
            lambda folder: (folder.mkdir(), (folder / "w").write_bytes(big.numpy().tobytes()))
        ),
        "summary.json": lambda: run.finish({"words": "long " * 4000}),
    }.items():
        with pytest.raises(RunError) as error:
            write()
        assert str(error.value).startswith(
            f"{small_disk / 'run' / what} cannot be written (No space left on device"
        ), what
        assert str(error.value).endswith(
            f"make room and go on with python -m alignlab.train resume={small_disk / 'run'}"
        )
        assert tree(small_disk / "run") == before
    (small_disk / "filler").unlink()
    checkpoint(run, 2)
    assert (run.load_checkpoint() or ({}, {}))[1]["mark"] == 2


def test_first_difference() -> None:
    """Nested, in the order of the new one, with a missing key as None."""
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == ("b", 2, None)
    assert first_difference({"a": [1, 2]}, {"a": [1, 2]}) is None


def test_nothing_is_written_before_the_model_is_there(tiny_sd, tmp_path, monkeypatch) -> None:
    """A model that fails to load leaves no run folder."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("alignlab.models.sd.StableDiffusion.__init__", broken)
    with pytest.raises(RuntimeError):
        train(configured(*tiny(tiny_sd)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_folders(tmp_path) -> None:
    """A pattern, a plain name with brackets as sweeps make them, and nothing that is no run."""
    for name in ("a", "prompts=[cat,dog]", "no run"):
        (tmp_path / name).mkdir()
    for name in ("a", "prompts=[cat,dog]"):
        (tmp_path / name / "config.yaml").write_text("")
    assert [f.name for f in run_folders(f"{tmp_path}/*")] == ["a", "prompts=[cat,dog]"]
    assert [f.name for f in run_folders(f"{tmp_path}/prompts=[cat,dog]")] == ["prompts=[cat,dog]"]
    assert run_folders(f"{tmp_path}/no run") == run_folders(f"{tmp_path}/none") == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process that would train in the same folder is told so; once the first has ended, it may."""
    holder = (
        "import sys, time\nfrom pathlib import Path\nfrom alignlab.runs.folder import Run\n"
        f"run = Run(Path({str(tmp_path / 'run')!r}), {dict(LATER_KEYS)!r})\nrun.begin()\nprint('in', "
        "flush=True)\ntime.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with pytest.raises(RunError, match="is being trained by another process"):
            Run(tmp_path / "run", dict(LATER_KEYS)).begin()
    finally:
        first.kill()
        first.wait()
    Run(tmp_path / "run", dict(LATER_KEYS)).begin()


def test_what_made_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor by name and its cores; a commit that untracked files (runs are such) leave clean, and
    changed ones do not."""
    machine = provenance.provenance(torch.device("cpu"))["machine"]
    assert machine["processor"] == provenance.processor() != "" and machine["cores"] == os.cpu_count()
    if not shutil.which("git"):
        pytest.skip("no git")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "runs.py").write_text("1")
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "summary.json").write_text("{}")
    assert provenance.provenance(torch.device("cpu"))["git"]["clean"]
    (tmp_path / "runs.py").write_text("2")
    assert not provenance.provenance(torch.device("cpu"))["git"]["clean"]
