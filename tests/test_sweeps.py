"""Sweeps on one machine and on a cluster's stand-in: every job a folder, what is finished is skipped, what was killed goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from alignlab import config
from alignlab.config import device_of
from alignlab.train import train
from tests.running import command_line, configured, lines, same_weights, tiny

ROOT = Path(__file__).resolve().parents[1]


def jobs(folder: Path) -> dict[int, Path]:
    """The run folders of a sweep by their seed."""
    found = [path.parent for path in folder.glob("*/config.yaml")]
    return {yaml.safe_load((run / "config.yaml").read_text())["seed"]: run for run in found}


def test_a_killed_sweep_goes_on(tiny_sd: str, tmp_path) -> None:
    """Killed in the middle of its second job, then typed again: the first job is skipped, the second goes on from its checkpoint and
    ends bit for bit like an undisturbed run."""
    words, there = tiny(tiny_sd, "steps=20", "eval_every=20", "algo=draft"), tmp_path / "sweep"
    command = [sys.executable, "-m", "alignlab.train", *words, "-m", "seed=0,1", f"output_dir={there}"]
    sweep = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while 1 not in jobs(there) or not any(jobs(there)[1].glob("checkpoints/step_00000[3-9]")):
        assert sweep.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.1)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    first, second = jobs(there)[0], jobs(there)[1]
    assert (first / "summary.json").exists() and not (second / "summary.json").exists()
    finished = (first / "summary.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.count("is finished; nothing to do") == 1
    assert (first / "summary.json").stat().st_mtime_ns == finished
    train(configured(*words, "seed=1"), tmp_path / "alone")
    assert lines(second) == lines(tmp_path / "alone") and same_weights(second, tmp_path / "alone")


@pytest.mark.parametrize("launcher", ["workers", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_launchers(launcher: str, tiny_sd: str, tmp_path, monkeypatch, capfd) -> None:
    """Two workers, and what Slurm would do: a job is the same run as alone; the mistake of another is a sentence and exit code 2;
    typed again, the finished one is skipped."""
    words, there = tiny(tiny_sd, "algo=draft"), tmp_path / "sweep"
    typed = [*words, "-m", "algo.k=1,9", f"hydra/launcher={launcher}", f"output_dir={there}"]
    assert command_line(monkeypatch, *typed) == 2
    (run,) = jobs(there).values()  # the other left no folder behind
    train(configured(*words), tmp_path / "alone")
    assert lines(run) == lines(tmp_path / "alone") and same_weights(run, tmp_path / "alone")
    made = (run / "summary.json").stat().st_mtime_ns
    assert command_line(monkeypatch, *typed) == 2
    assert (run / "summary.json").stat().st_mtime_ns == made
    if launcher == "workers":
        assert "algo.k=9 exceeds sampler.steps=3" in capfd.readouterr().err


def test_folder_names() -> None:
    """One folder deep whatever the overrides hold, short enough for any file system, and different for different jobs."""
    assert config.folder_name("algo=draft,model.path_or_id=/a/b,seed=1") == "algo=draft,model.path_or_id=_a_b,seed=1"
    long = [config.folder_name(f"prompts.prompts={'x' * 300},seed={k}") for k in (0, 1)]
    assert long[0] != long[1] and all(len(name) < 200 for name in long)


def test_each_job_takes_a_gpu(monkeypatch) -> None:
    """Job n of a sweep takes GPU n modulo their number; a single run takes the first; a named CPU stays a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    for mode, expected in ((RunMode.MULTIRUN, ["cuda:0", "cuda:1", "cuda:0"]), (RunMode.RUN, ["cuda"] * 3)):
        for num, device in enumerate(expected):
            at = SimpleNamespace(mode=mode, job=SimpleNamespace(num=num))
            monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda at=at: at))
            assert str(device_of("auto")) == device and str(device_of("cpu")) == "cpu"


@pytest.mark.parametrize(("launcher", "package"), [("ray_cluster", "hydra-ray-launcher"), ("workers", "alignlab[sweeps]")])
def test_a_missing_launcher_is_a_sentence(launcher: str, package: str, monkeypatch, capsys) -> None:
    """It names what to install."""
    import hydra

    compose, missing = hydra.compose, {"ray_cluster": "ray", "workers": "joblib"}[launcher]

    def without(name: str, overrides: list[str]) -> object:
        if any("hydra/launcher" in word for word in overrides):
            raise hydra.errors.MissingConfigException("In 'x': Could not load 'y'", f"hydra/launcher/{missing}", ["basic"])
        return compose(name, overrides)

    monkeypatch.setattr(config.hydra, "compose", without)
    monkeypatch.setattr(config.hydra, "main", lambda **_: lambda task: lambda: without("train", ["hydra/launcher"]))
    assert command_line(monkeypatch, "-m", f"hydra/launcher={launcher}", "seed=0,1") == 2
    assert f"pip install '{package}'" in capsys.readouterr().err


def test_the_search_of_the_documentation_runs(tiny_sd: str, tmp_path, monkeypatch, capsys) -> None:
    """docs/sweeps.md's loop, on a tiny model: every trial is a run; started again, the study goes on."""
    code = (ROOT / "docs" / "sweeps.md").read_text().partition("```python\n")[2].partition("```")[0]
    small = repr([word for word in tiny(tiny_sd, "steps=1", "eval_every=1") if not word.startswith("algo")])
    code = code.replace('SETTINGS = ["reward=emoji_preference", "steps=20"]', f"SETTINGS = {small}").replace(
        "n_trials=20", "n_trials=2"
    )
    monkeypatch.chdir(tmp_path)
    for total in (2, 4):
        exec(compile(code, "docs/sweeps.md", "exec"), {"__name__": "search"})
        assert len(list((tmp_path / "runs" / "search").glob("trial_*/summary.json"))) == total
    assert "kl_coeff" in capsys.readouterr().out
