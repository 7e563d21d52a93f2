"""Your own rewards, by the real commands: a class, a function, both with others, and a group-wise one."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from alignlab.runs.stored_config import read_config
from tests.running import command_line, configured, lines, tiny

MODULE = """
import torch

class Mine:
    differentiable, unit = True, "points"

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, images, prompts):
        return self.scale * images[:, 0].mean((1, 2))

def score(images, prompts):
    return [1000 * float(image.detach().std()) + len(prompt) for image, prompt in zip(images, prompts)]

def late(images, prompts):
    if torch.is_grad_enabled():
        raise RuntimeError("out of ink")
    return images.mean((1, 2, 3))
"""
SCORE = [
    "+reward.score.function=own_rewards.score",
    "+reward.score.differentiable=false",
    "+reward.score.unit=contrast",
]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return tmp_path


def test_a_class_trains(desk: Path, tiny_sd: str, monkeypatch, capsys) -> None:
    """DRaFT follows the gradient of a class that says no more than it must; weight is 1; its unit is in the
    summary and on the screen."""
    words = [w for w in tiny(tiny_sd, "reward=none", "steps=1") if w not in ("reward=brightness", "steps=4")]
    own = ["+reward.mine._target_=own_rewards.Mine", "+reward.mine.scale=3", "allow_targets=[own_rewards]"]
    assert command_line(monkeypatch, *words, *own, "output_dir=run") == 0
    summary = json.loads((desk / "run" / "summary.json").read_text())
    assert summary["units"] == {"mine": "points"} and summary["reward_unit"] == "points"
    assert summary["final"]["mine"] == summary["final"]["reward"] and lines(desk / "run")[0]["grad_norm"] > 0
    assert yaml.safe_load((desk / "run" / "config.yaml").read_text())["reward"]["mine"]["weight"] == 1.0
    assert any(
        line.split()[:1] == ["mine"] and line.endswith("points")
        for line in capsys.readouterr().out.splitlines()
    )


def test_several_by_gdpo_each_logged_by_itself(desk: Path, tiny_sd: str, monkeypatch) -> None:
    """DDPO on a function's kilo-units and a pixel mean, a group-wise reward held out: each has its own
    numbers and unit in every line and in the summary, the reward is their sum, and the checkpoint holds the
    statistics of each."""
    words = [
        *tiny(tiny_sd),
        "algo=ddpo",
        "prompts.per_prompt=2",
        "algo.updates_per_epoch=2",
        "algo.statistics.min_count=2",
    ]
    words = [w for w in words if w not in ("steps=4", "prompts.per_prompt=1")] + [
        "steps=1",
        *SCORE,
        "allow_targets=[own_rewards]",
    ]
    words += ["eval_rewards=clip_diversity", "combine=gdpo", "output_dir=run"]
    assert command_line(monkeypatch, *words) == 0
    summary = json.loads((desk / "run" / "summary.json").read_text())
    assert summary["units"] == {
        "brightness": "mean pixel value",
        "score": "contrast",
        "clip_diversity": "1 - cosine",
    }
    assert summary["reward_unit"] == "1 x brightness (mean pixel value) + 1 x score (contrast)"
    (line,) = lines(desk / "run")
    assert line["reward/mean"] == pytest.approx(
        line["reward/brightness/mean"] + line["reward/score/mean"], rel=1e-5
    )
    assert line["eval/reward"] == pytest.approx(line["eval/brightness"] + line["eval/score"], rel=1e-5)
    assert (
        0 <= line["eval/clip_diversity"] < 2
        and line["reward/score/mean"] > 20 * line["reward/brightness/mean"]
    )
    assert line["ddpo/advantage_std"] == pytest.approx(1, rel=1e-3)
    state = torch.load(desk / "run" / "checkpoints" / "step_000001" / "state.pt", weights_only=True)
    assert state["lab"]["objective"]["statistics"].keys() == {"brightness", "score"}
    assert read_config(desk / "run")["algo"]["statistics"]["combine"] == "gdpo"


def test_a_function_that_fails_ends_the_run_with_a_sentence(
    desk: Path, tiny_sd: str, monkeypatch, capsys
) -> None:
    """Its name, what it raised, and its line; code 2."""
    own = [
        f"+reward.late.{k}={v}"
        for k, v in {"function": "own_rewards.late", "differentiable": "true", "unit": "u"}.items()
    ]
    assert (
        command_line(monkeypatch, *tiny(tiny_sd), *own, "allow_targets=[own_rewards]", "output_dir=run") == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said == "error: epoch 1: reward late (own_rewards.late) raised RuntimeError: out of ink "
        "(own_rewards.py, line 18)"
    )


def test_a_groupwise_reward_trains(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """DRaFT on the diversity within each prompt: the micro-batch changes no reward."""
    words = [*tiny(tiny_sd), "prompts.per_prompt=2", "reward=clip_diversity", "steps=1"]
    words = [w for w in words if w not in ("steps=4", "prompts.per_prompt=1", "reward=brightness")]
    for size in (2, 4):
        assert (
            command_line(monkeypatch, *words, f"micro_batch={size}", f"output_dir={tmp_path / str(size)}")
            == 0
        )
    two, four = (lines(tmp_path / name)[0] for name in ("2", "4"))
    assert two["grad_norm"] > 0
    for key in (
        "reward/clip_diversity/mean",
        "reward/clip_diversity/std",
        "eval/clip_diversity",
        "grad_norm",
    ):
        assert two[key] == pytest.approx(four[key], rel=1e-3), key


def test_a_quick_try_of_it() -> None:
    """quick=true leaves the two images of a prompt that it needs."""
    c = configured("algo=ddpo", "quick=true", "eval_rewards=clip_diversity")
    assert (
        c.evaluation.final_images == 2 and configured("algo=ddpo", "quick=true").evaluation.final_images == 1
    )
