"""The learning rate over a run, and which weights a run keeps."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from alignlab.train import train
from alignlab.training.lr_schedule import lr_factor, set_lr
from tests.running import configured, lines, same_weights, tiny


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("cosine", 0, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("cosine", 1, [1, 1, 0.75, 0.25]),
    ],
)
def test_factors(schedule, warmup, factors) -> None:
    """By hand, for a run of four epochs."""
    assert [lr_factor(schedule, k, epochs=4, warmup=warmup) for k in (1, 2, 3, 4)] == pytest.approx(factors)


def test_every_group_keeps_its_own_lr() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.zeros(1)], "lr": 0.1}], lr=1.0
    )
    for factor in (0.5, 0.2):
        assert set_lr(optimizer, factor) == factor
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, factor / 10])


def test_the_run_follows_it_and_resumes(tiny_sd, tmp_path) -> None:
    """The logged lr is the schedule's, with a moving average and a selection beside it; stopped and resumed
    it ends bit-identical."""
    words = [
        "algo=draft",
        "lr_schedule=cosine",
        "lr_warmup=1",
        "ema=0.9",
        "select=reward",
        "lr=0.01",
        "eval_every=1",
    ]
    c = configured(*tiny(tiny_sd, *words))
    train(c, tmp_path / "whole")
    found = [line["lr"] for line in lines(tmp_path / "whole")]
    assert found == pytest.approx([0.01 * lr_factor("cosine", k, epochs=4, warmup=1) for k in (1, 2, 3, 4)])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_000004")
    train(c, tmp_path / "again")
    assert same_weights(tmp_path / "whole", tmp_path / "again") and lines(tmp_path / "whole") == lines(
        tmp_path / "again"
    )
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "again"))
    assert one["final"] == two["final"] and one["selected_step"] == two["selected_step"]


def test_a_moving_average_is_what_is_kept(tiny_sd, tmp_path) -> None:
    """Two updates: the average starts at the first one's weights and then keeps (1 + 1)/(10 + 1) of itself,
    diffusers' warm-up of the decay."""
    words = ["algo=draft", "ema=0.5", "checkpoint_every=1", "steps=2", "lr=0.05"]
    train(configured(*tiny(tiny_sd, *words)), tmp_path)
    first, last = (
        load_file(tmp_path / "checkpoints" / f"step_{k:06d}" / "policy.safetensors") for k in (1, 2)
    )
    kept = load_file(tmp_path / "model" / "pytorch_lora_weights.safetensors")
    scale = {
        name: 4.0 if ".lora_B" in name else 1.0 for name in last
    }  # alpha 8 over rank 2, which B holds in what leaves the run
    for name in last:
        torch.testing.assert_close(
            kept[f"unet.{name}"], scale[name] * (2 / 11 * first[name] + 9 / 11 * last[name])
        )
    assert max((kept[f"unet.{name}"] - scale[name] * last[name]).abs().max() for name in last) > 1e-3


def test_the_best_in_an_evaluation_is_kept(tiny_sd, tmp_path) -> None:
    """A huge learning rate spoils the model again: the weights of the best evaluation are saved and
    evaluated, the last ones are not."""
    words = ["algo=draft", "lr=0.3", "select=reward", "eval_every=1", "steps=4"]
    train(configured(*tiny(tiny_sd, *words)), tmp_path)
    seen = [json.loads(line)["eval/reward"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["selected_step"] == max(range(5), key=seen.__getitem__)
    best, kept = (
        load_file(tmp_path / "checkpoints" / f"best_{summary['selected_step']:06d}.safetensors"),
        load_file(tmp_path / "model/pytorch_lora_weights.safetensors"),
    )
    scale = {
        name: 4.0 if ".lora_B" in name else 1.0 for name in best
    }  # alpha 8 over rank 2, which B holds in what leaves the run
    assert all(torch.equal(kept[f"unet.{name}"], scale[name] * value) for name, value in best.items())
