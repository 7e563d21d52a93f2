"""The run directory's contract: what a run leaves behind, what it refuses, and that nothing half written counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from alignlab.runs import LATER_KEYS, NOT_SCIENCE, Run, RunError, first_difference, run_folders
from alignlab.train import train
from tests.running import command_line, configured, lines, tiny

STORED = Path(__file__).resolve().parents[1] / "results" / "runs"
ALWAYS = {
    "step", "samples_seen", "reward/mean", "reward/std", "loss", "kl", "grad_norm", "updates", "seconds", "images_per_second", "peak_memory_mb",
}  # fmt: skip
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
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000004"]  # the last two
    assert (folder / "model" / "pytorch_lora_weights.safetensors").is_file()
    assert list((folder / "tensorboard").glob("events.*")) or list((folder / "tensorboard").rglob("events.*"))
    sizes = {Image.open(p).size for p in (folder / "samples").iterdir()}
    assert len(sizes) == 1  # the same grid: rows of one prompt


def test_metrics(run) -> None:
    """One JSON object an epoch with the contract's keys; eval/* at evaluation steps only; an algorithm's own under its name.
    Before them, the base model's evaluation."""
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
        assert (EVALUATION | {"kl_eps_guided", "kl_trajectory"} <= evaluated) if line["step"] % 2 == 0 else not evaluated
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
    c = yaml.safe_load((folder / "config.yaml").read_text())
    assert "${" not in (folder / "config.yaml").read_text()
    train(c, tmp_path / "again")
    assert lines(tmp_path / "again") == lines(folder)


def test_a_finished_run_is_left_alone(run, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """The same command on a finished run, or resume= of it, loads no model, changes no file and shows the result."""
    _, folder = run
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr("alignlab.models.sd.StableDiffusion.__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command_line(monkeypatch, f"resume={folder}") == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("sweep", sorted(p.name for p in STORED.iterdir()))
def test_a_committed_run_is_still_what_its_command_asks_for(sweep: str) -> None:
    """Keys that came after a finished run have the value that it had without them: typed again, its experiment skips it."""
    for folder in sorted((STORED / sweep).glob("*/")):
        overrides = [word for word in folder.name.split(",") if word != "quick=True"]
        assert Run(folder, configured(*overrides), ignore=NOT_SCIENCE).summary is not None


def test_another_configuration_is_refused(run, monkeypatch, capsys) -> None:
    """The first key that differs is named with both values; device, tracker and the like may differ."""
    _, folder = run
    c = yaml.safe_load((folder / "config.yaml").read_text())
    with pytest.raises(RunError, match=r"holds a run with seed=0, but seed=3 was asked for; choose another output_dir"):
        train(c | {"lr": 0.5, "seed": 3}, folder)
    with pytest.raises(RunError, match=r"with policy.lora.rank=2, but policy.lora.rank=3 was asked for"):
        train(c | {"policy": c["policy"] | {"lora": c["policy"]["lora"] | {"rank": 3}}}, folder)
    assert train(c | {"device": "auto", "checkpoint_every": 7}, folder)["seed"] == 0
    assert command_line(monkeypatch, f"resume={folder}", "steps=9") == 2
    assert f"error: {folder} holds a run with" in capsys.readouterr().err


def test_foreign_files_are_left_alone(tmp_path, tiny_sd, monkeypatch, capsys) -> None:
    """A folder that holds something else is refused, untouched; so is a file."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark night.")
    for target, said in {"thesis": "is not empty and holds no run", "thesis/chapter1.tex": "cannot be written"}.items():
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
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("call", ["save_file", "torch.save", "seal", "sync", "Path.rename"])
def test_a_checkpoint_is_whole_or_not_there(call: str, tmp_path, monkeypatch) -> None:
    """Whatever fails while one is written, the one before counts, and the next one is written."""
    run = Run(tmp_path / "run", {})
    run.begin()
    checkpoint(run, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"no space left on device.*; make room and resume="):
        patch.setattr(f"alignlab.runs.{call}", fail)
        checkpoint(run, 2)
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 1
    checkpoint(run, 2)
    _, state = run.load_checkpoint() or ({}, {})
    assert state["mark"] == 2


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
        "import sys, time\nfrom pathlib import Path\nfrom alignlab.runs import Run\n"
        f"run = Run(Path({str(tmp_path / 'run')!r}), {dict(LATER_KEYS)!r})\nrun.begin()\nprint('in', flush=True)\ntime.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with pytest.raises(RunError, match="is being trained by another process"):
            Run(tmp_path / "run", dict(LATER_KEYS)).begin()
    finally:
        first.kill()
        first.wait()
    Run(tmp_path / "run", dict(LATER_KEYS)).begin()
