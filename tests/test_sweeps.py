"""Sweeps on one machine and on a cluster's stand-in: every job a folder, what is finished is skipped, what
was killed goes on."""

import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from alignlab.config.job_names import WORDS, folder_of, full_name, short_name, write_words
from alignlab.config.jobs import device_of
from alignlab.config.schema import TrainConfig
from alignlab.train import train
from tests import warm
from tests.running import command_line, configured, lines, same_weights, tiny

ROOT = Path(__file__).resolve().parents[1]


def jobs(folder: Path) -> dict[int, Path]:
    """The run folders of a sweep by their seed."""
    found = [path.parent for path in folder.glob("*/config.yaml")]
    return {yaml.safe_load((run / "config.yaml").read_text())["seed"]: run for run in found}


DYING = """
import os, signal
from alignlab import train
real = train.train_epoch

def dying(lab, c, epoch):
    if epoch == 3 and any("seed-1" in name for name in os.listdir({there!r})):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(lab, c, epoch)

train.train_epoch = dying
train.main()
"""
"""The command, whose process is killed before the third epoch of the second job."""


def test_a_killed_sweep_goes_on(
    tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle of its second job, then typed again: the first job is skipped, the second goes on
    from its checkpoint and ends bit for bit like an undisturbed run."""
    words, there = tiny(tiny_sd, "algo=draft"), tmp_path / "sweep"
    typed = [*words, "-m", "seed=0,1", f"output_dir={there}"]
    code = DYING.format(there=str(there))
    killed = warm.run([sys.executable, "-c", code, *typed], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first, second = jobs(there)[0], jobs(there)[1]
    assert (first / "summary.json").exists() and not (second / "summary.json").exists()
    assert [path.name for path in sorted(second.glob("checkpoints/step_*"))][-1] == "step_000002"
    finished = (first / "summary.json").stat().st_mtime_ns
    assert command_line(monkeypatch, *typed) == 0
    assert capsys.readouterr().out.count("is finished; nothing to do") == 1
    assert (first / "summary.json").stat().st_mtime_ns == finished
    train(configured(*words, "seed=1"), tmp_path / "alone")
    assert lines(second) == lines(tmp_path / "alone") and same_weights(second, tmp_path / "alone")


@pytest.mark.parametrize("launcher", ["workers", pytest.param("submitit_local", marks=pytest.mark.slow)])
def test_launchers(launcher: str, tiny_sd: str, tmp_path, monkeypatch, capfd) -> None:
    """Two workers, and what Slurm would do: a job is the same run as alone; the mistake of another is a
    sentence and exit code 2; typed again, the finished one is skipped."""
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


SAFE = re.compile(r"[A-Za-z0-9._+-]+")


def test_folder_names() -> None:
    """Only keys with several values are named; names are short, safe for every shell and file system, and
    differ where the jobs do."""
    assert short_name({"kl_coeff": "0.25", "seed": "1"}) == "kl_coeff-0.25_seed-1"
    assert short_name({"reward": "clip_blue", "algo.k": "-1"}) == "reward-clip_blue_algo.k--1"
    strange = [
        "a b",
        "a/b",
        "a,b",
        "a=b",
        "[a,b]",
        "{a:1}",
        "'a b'",
        "猫",
        "犬",
        "$(x)",
        "a;b",
        "x" * 300,
        "x" * 301,
        "a-b",
    ]
    names = [short_name({"init_from": value, "seed": "0"}) for value in strange]
    assert all(SAFE.fullmatch(name) and len(name) <= 180 for name in names) and len({*names}) == len(strange)
    assert short_name({"a": "x", "b": "1_b-1"}) != short_name({"a": "x_b-1", "b": "1"})
    many = short_name({f"key_{k}": "x" * 30 for k in range(20)})
    assert len(many) <= 180 and many != short_name({f"key_{k}": "x" * 30 + "y" * (k > 18) for k in range(20)})


def test_folder_of_earlier_versions(tmp_path: Path) -> None:
    """A folder that has all the words as its name is used, long names included."""
    words = ["seed=1", "algo=draft", "model.path_or_id=/a/b", "output_dir=x"]
    assert folder_of(tmp_path, words, ["seed"], ["output_dir"]) == "seed-1"
    (tmp_path / "algo=draft,model.path_or_id=_a_b,seed=1").mkdir()
    assert folder_of(tmp_path, words, ["seed"], ["output_dir"]) == "algo=draft,model.path_or_id=_a_b,seed=1"
    long = [full_name([f"prompts.prompts={'x' * 300}", f"seed={k}"]) for k in (0, 1)]
    assert long[0] != long[1] and all(len(name) < 200 for name in long)
    assert folder_of(
        tmp_path, [f"prompts.template={'猫' * 170}"], ["prompts.template"], []
    )  # its old name is no name at all


def test_whose_folder_it_is(tmp_path: Path) -> None:
    """All words of a job stand in its folder: the same job finds it, whatever else the sweep varies; another
    one gets another."""

    def place(*words: str, several: Sequence[str] = ("kl_coeff",)) -> Path:
        return tmp_path / folder_of(tmp_path, words, several, ["output_dir"])

    first = place("algo=ddpo", "kl_coeff=0", "seed=0", "output_dir=x")
    first.mkdir()
    write_words(first, ["algo=ddpo", "kl_coeff=0", "seed=0", "output_dir=x"])
    assert first.name == "kl_coeff-0" and yaml.safe_load((first / WORDS).read_text())[2] == "seed=0"
    assert (
        place("algo=ddpo", "kl_coeff=0", "seed=0", "output_dir=elsewhere", several=("kl_coeff", "seed"))
        == first
    )
    assert (
        place("algo=ddpo", "kl_coeff=0", "seed=1", several=("kl_coeff", "seed")).name == "kl_coeff-0_seed-1"
    )
    other = place("algo=draft", "kl_coeff=0", "seed=0")
    assert other != first and other.name.startswith("kl_coeff-0-") and SAFE.fullmatch(other.name)
    (first / WORDS).unlink()
    (tmp_path / "theirs").write_text("kept")
    (first / WORDS).symlink_to(tmp_path / "theirs")
    write_words(first, ["a=1"])
    assert (tmp_path / "theirs").read_text() == "kept"


def test_a_sweep_names_its_folders(tiny_sd: str, tmp_path, monkeypatch, capsys) -> None:
    """The folders of a real sweep: short names, all words in a file; a sweep that began under the old names
    goes on in them, and one of other settings in the same output_dir does not take them; a job with a mistake
    leaves nothing."""
    trained: list[Path] = []

    def stand_in(c: TrainConfig, folder: Path) -> dict[str, Any]:
        trained.append(folder)
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(c)))
        return {"final": {"reward": 1.0}, "base": {"reward": 0.0}}

    monkeypatch.setattr("alignlab.train.train", stand_in)
    there, words = tmp_path / "my sweep, kl=1", tiny(tiny_sd, "algo=draft")

    def names(*typed: str) -> list[str]:
        trained.clear()
        command_line(monkeypatch, *words, "-m", *typed, f"output_dir={there}")
        return [folder.relative_to(there).as_posix() for folder in trained]

    assert names("algo.k=1,2", "seed=0") == ["algo.k-1", "algo.k-2"]
    kept = yaml.safe_load((there / "algo.k-1" / WORDS).read_text())
    assert {"algo.k=1", "seed=0", "algo=draft", "steps=4"} <= {*kept}
    assert names("algo.k=1,2", "seed=0,1") == ["algo.k-1", "algo.k-1_seed-1", "algo.k-2", "algo.k-2_seed-1"]
    (one, two) = names("algo.k=1,2", "seed=0", "lr=1e-4")
    assert one.startswith("algo.k-1-") and two.startswith("algo.k-2-")
    assert names("algo.k=9,1", "seed=5") == ["algo.k-1-" + names("algo.k=1,2", "seed=5")[0][9:]]
    assert not list(there.glob("algo.k-9*")) and "algo.k=9 exceeds" in capsys.readouterr().err
    overrides = OverridesParser.create().parse_overrides([*words, "algo.k=3", "seed=0"])
    before = get_overrides_dirname(overrides, ["output_dir", "device", "tracker"], ",", "=").replace("/", "_")
    (there / full_name([before])).mkdir()  # as earlier versions called it
    assert names("algo.k=3,2", "seed=0") == [full_name([before]), "algo.k-2"]


def test_an_experiments_axes_are_named(tmp_path, monkeypatch) -> None:
    """What a file sweeps over is named too, and what the command line fixes is not."""
    trained: list[str] = []
    monkeypatch.setattr(
        "alignlab.train.train",
        lambda c, folder: trained.append(folder.name) or {"final": {"reward": 1.0}, "base": {"reward": 0.0}},
    )
    assert (
        command_line(monkeypatch, "-m", "experiment=figure/ddpo_fig4", "seed=0", f"output_dir={tmp_path}/x")
        == 0
    )
    assert len(trained) > 1 and all(re.fullmatch(r"reward-\w+", name) for name in trained)


def test_each_job_takes_a_gpu(monkeypatch) -> None:
    """Job n of a sweep takes GPU n modulo their number; a single run takes the first; a named CPU stays a
    CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    for mode, expected in ((RunMode.MULTIRUN, ["cuda:0", "cuda:1", "cuda:0"]), (RunMode.RUN, ["cuda"] * 3)):
        for num, device in enumerate(expected):
            at = SimpleNamespace(mode=mode, job=SimpleNamespace(num=num))
            monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda at=at: at))
            assert str(device_of("auto")) == device and str(device_of("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("launcher", "package"), [("ray_cluster", "hydra-ray-launcher"), ("workers", "alignlab[sweeps]")]
)
def test_a_missing_launcher_is_a_sentence(launcher: str, package: str, monkeypatch, capsys) -> None:
    """It names what to install."""
    import hydra

    compose, missing = hydra.compose, {"ray_cluster": "ray", "workers": "joblib"}[launcher]

    def without(name: str, overrides: list[str]) -> object:
        if any("hydra/launcher" in word for word in overrides):
            raise hydra.errors.MissingConfigException(
                "In 'x': Could not load 'y'", f"hydra/launcher/{missing}", ["basic"]
            )
        return compose(name, overrides)

    monkeypatch.setattr(hydra, "compose", without)
    monkeypatch.setattr(hydra, "main", lambda **_: lambda task: lambda: without("train", ["hydra/launcher"]))
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
