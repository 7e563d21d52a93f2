"""Runs are grouped into variants, compared only where that means something, and read at equal budgets."""

import json

import numpy as np
import pytest

from alignlab.compare.finished import (
    CompareError,
    at_budget,
    equal_budget,
    matched_reward,
    read_runs,
    refuse_unlike,
    variants,
)
from alignlab.compare.outcomes import base_point, contrasts, outcomes
from tests.runs_on_disk import made_run


@pytest.fixture
def six(tmp_path):
    """DRaFT, and DRaFT+ at two coefficients, two seeds each."""
    for seed in (0, 1):
        made_run(tmp_path / f"draft-{seed}", seed=seed, gain=1.0)
        made_run(tmp_path / f"plus-a-{seed}", seed=seed, gain=0.8, changes={"kl_coeff": 0.1})
        made_run(tmp_path / f"plus-b-{seed}", seed=seed, gain=0.4, changes={"kl_coeff": 1.0})
    return read_runs([str(tmp_path / "*")])


def test_variants(six):
    """Seeds are one variant; labels name the algorithm and what differs among its variants, and nothing
    else."""
    found = {v.label: [run.seed for run in v.runs] for v in variants(six)}
    assert found == {"DRaFT": [0, 1], "DRaFT+ kl_coeff=0.1": [0, 1], "DRaFT+ kl_coeff=1.0": [0, 1]}


def test_a_legend_names_the_fewest_keys_that_tell_variants_apart(tmp_path):
    """An algorithm's own before general ones; a lone variant needs none; the penalty is always named."""
    made_run(tmp_path / "a", {"steps": 10, "algo.k": 1, "algo.truncation": "fixed"})
    made_run(tmp_path / "b", {"steps": 20, "algo.k": 5, "algo.truncation": "fixed"})
    made_run(tmp_path / "c", {"steps": 20, "algo.k": 5, "algo.truncation": "per_step"})
    made_run(tmp_path / "plus", {"steps": 20, "algo.k": 5, "kl_coeff": 0.1})
    found = {v.runs[0].folder.name: v.short for v in variants(read_runs([str(tmp_path / "*")]))}
    assert found == {
        "a": "DRaFT k=1 truncation=fixed",
        "b": "DRaFT k=5 truncation=fixed",
        "c": "DRaFT k=5 truncation=per_step",
        "plus": "DRaFT+ kl_coeff=0.1",
    }


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("eval_sampler.steps", 25, "eval_sampler.steps is 20 in the first and 25 in the second"),
        ("eval_sampler.guidance_scale", 5.0, "eval_sampler.guidance_scale is 3.0"),
        ("eval_sampler._target_", "alignlab.engine.samplers.flow", "eval_sampler._target_"),
        ("prompts.prompts", ["cat", "cow"], "prompts.prompts"),
        ("model.path_or_id", "other", "model.path_or_id is emoji in the first and other"),
        ("reward.bright.weight", 1.0, "reward.bright.weight is 2.0 in the first and 1.0"),
        ("diversity._target_", "alignlab.metrics.diversity.AlexDistance", "diversity._target_"),
        ("evaluation.images", 3, "evaluation.images is 2 in the first and 3"),
    ],
)
def test_unlike_runs_are_refused(tmp_path, key, value, named):
    """In one sentence that names both runs, the key and both values."""
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", {key: value}, seed=1)
    with pytest.raises(CompareError) as refused:
        refuse_unlike(read_runs([str(tmp_path / "*")]))
    assert (
        named in str(refused.value)
        and str(tmp_path / "a") in str(refused.value)
        and str(tmp_path / "b") in str(refused.value)
    )


@pytest.mark.parametrize(("key", "value"), [("reward_unit", "kB"), ("diversity_metric", "lpips-alex")])
def test_units_are_refused(tmp_path, key, value):
    made_run(tmp_path / "a")
    path = made_run(tmp_path / "b", seed=1) / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CompareError, match=f"{key} is .* in the first and {value}"):
        refuse_unlike(read_runs([str(tmp_path / "*")]))


def test_evaluations_of_other_resolution_are_refused(tmp_path):
    made_run(tmp_path / "a")
    path = made_run(tmp_path / "b", seed=1) / "evaluation" / "evaluation.json"
    about = json.loads(path.read_text())
    about["protocol"]["resolution"] = [64, 64]
    path.write_text(json.dumps(about))
    with pytest.raises(
        CompareError, match=r"evaluation.resolution is \[48, 48\] in the first and \[64, 64\]"
    ):
        refuse_unlike(read_runs([str(tmp_path / "*")]))


@pytest.mark.parametrize(("apart", "refused"), [(0.06, True), (0.04, False), (-0.06, True)])
def test_other_weights_of_the_same_name_are_refused(tmp_path, apart, refused):
    """A base model whose reward is a tenth of a standard deviation away is another one, whatever it is
    called; rounding is less."""
    made_run(tmp_path / "a")
    path = made_run(tmp_path / "b", seed=1) / "summary.json"
    about = json.loads(path.read_text())
    about["base"]["reward"] += apart
    path.write_text(json.dumps(about))
    runs = read_runs([str(tmp_path / "*")])
    if refused:
        with pytest.raises(
            CompareError, match=r"rewards of 1 and .* so the weights of model.path_or_id were others"
        ):
            refuse_unlike(runs)
    else:
        refuse_unlike(runs)


def test_training_may_differ(tmp_path):
    """Learning rate, batch, training prompts' repetition and batch of the evaluation do not hinder a
    comparison."""
    made_run(tmp_path / "a")
    made_run(
        tmp_path / "b",
        {"lr": 1e-4, "prompts.per_prompt": 4, "evaluation.batch": 8, "model.lora_targets": ["to_k"]},
    )
    refuse_unlike(read_runs([str(tmp_path / "*")]))


def test_what_cannot_be_read(tmp_path):
    """No run, an unfinished one, and the same run twice: one sentence each, with the mend."""
    with pytest.raises(CompareError, match="holds no run"):
        read_runs([str(tmp_path / "*")])
    path = made_run(tmp_path / "a")
    (path / "summary.json").unlink()
    with pytest.raises(CompareError, match="resume="):
        read_runs([str(path)])
    made_run(tmp_path / "b")
    made_run(tmp_path / "c")
    with pytest.raises(CompareError, match="same run"):
        variants(read_runs([str(tmp_path / "b"), str(tmp_path / "c")]))
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 0')
    with pytest.raises(CompareError, match="cannot be read"):
        read_runs([str(tmp_path / "b")])


def test_budgets(tmp_path):
    """Counts add up over epochs; a reward is read between evaluations; the equal budget is the least that all
    reached."""
    run = read_runs([str(made_run(tmp_path / "a"))])[0]
    assert run.curve("samples_seen") == [0, 160, 320] and run.curve("denoiser_forwards") == [0, 6400, 12800]
    assert run.curve("seconds") == [0, 3, 6]
    reward = run.curve("eval/reward")
    assert at_budget(run, "samples_seen", 80) == pytest.approx((reward[0] + reward[1]) / 2)
    assert (
        equal_budget(variants([run]), "samples_seen") == 320
        and equal_budget(variants([run]), "unknown") is None
    )


def test_matched(six):
    """Every variant is read at one reward that all of them reached: higher gain at the same slope, same
    diversity."""
    level, found = matched_reward(variants(six))
    assert 1.3 < level < 1.4
    for values in found.values():
        assert len(values) == 2
        assert np.mean(values) == pytest.approx(0.6 - 0.2 * (level - 1), abs=0.02)


def test_outcomes(six):
    """Weighted rewards (weight 2), gains, win rates, diversity and held-out gains come out as they were put
    in."""
    those = variants(six)
    by = {o.label: o for o in outcomes(those)}
    assert base_point(those)[0] == pytest.approx(1.0, abs=0.1)
    for label, gain in (("DRaFT", 1.0), ("DRaFT+ kl_coeff=0.1", 0.8), ("DRaFT+ kl_coeff=1.0", 0.4)):
        o = by[label]
        assert (
            o.seeds == 2
            and o.gain.value == pytest.approx(gain, abs=0.02)
            and o.gain.low <= o.gain.value <= o.gain.high
        )
        assert o.iqm_gain.value == pytest.approx(gain, abs=0.02) and o.unseen_gain.value == pytest.approx(
            gain, abs=0.02
        )
        assert (
            o.win_rate.value == 1
            and o.diversity.value == pytest.approx(0.605 - 0.2 * gain)
            and o.vendi.value == pytest.approx(5 - 2 * gain)
        )
        assert (
            o.held_out["held"].value == 0 and o.lpips_to_base == pytest.approx(0.1 * gain) and o.flags == ()
        )
    reward = {(c.first, c.second): c for c in contrasts(those)["reward"]}
    assert len(reward) == 3
    c = reward["DRaFT", "DRaFT+ kl_coeff=1.0"]
    assert c.difference.value == pytest.approx(0.6, abs=0.02) and c.difference.low > 0


def test_one_missing_evaluation_takes_all_back_to_training(tmp_path):
    """Numbers of an evaluation and of training are never set side by side."""
    made_run(tmp_path / "a")
    made_run(tmp_path / "b", {"kl_coeff": 0.1}, evaluated=False)
    those = variants(read_runs([str(tmp_path / "*")]))
    assert all(o.win_rate is None and o.gain.value == pytest.approx(1.0) for o in outcomes(those))
    assert contrasts(those) == {} and base_point(those) == (1.0, 0.6)


def test_flags(tmp_path):
    made_run(tmp_path / "a", held_out_falls=True)
    (o,) = outcomes(variants(read_runs([str(tmp_path / "a")])))
    assert len(o.flags) == 1 and o.flags[0].startswith("seed 0: held fell by 1.00 sd")
