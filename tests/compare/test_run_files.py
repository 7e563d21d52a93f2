"""What is read of a finished run has a type; a file that holds something else than a run writes is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignlab.compare.finished import CompareError, read_runs
from alignlab.compare.run_files import Settings, Strange, Summary, whole_lines
from tests.runs_on_disk import CONFIG, made_run


def changed(node: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy in which a dotted key has another value, or is gone where that is `...`."""
    copy = json.loads(json.dumps(node))
    *above, last = key.split(".")
    inner = copy
    for part in above:
        inner = inner[part]
    inner.pop(last, None)
    return copy if value is ... else (inner.update({last: value}) or copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, ...) for key in ("seed", "kl_coeff", "eval_sampler", "evaluation", "algo._target_")),
        ("seed", "one"),
        ("kl_coeff", None),
        ("eval_sampler.steps", "many"),
        ("algo._target_", 5),
        ("algo._target_", "alignlab.objectives.ddpo.DDPO"),  # without an estimator
        ("reward.bright", "alone"),
        ("reward.bright.weight", None),
    ],
)
def test_a_configuration_of_another_form(key: str, value: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (run / "config.yaml").write_text(yaml.safe_dump(changed(CONFIG, key, value)))
    refused(run, "config.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, ...) for key in ("base", "final.reward", "reward_unit", "diversity_metric")),
        ("final.reward", "high"),
        ("base.lpips", "wide"),
        ("final", []),
    ],
)
def test_a_summary_of_another_form(key: str, value: Any, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    path = run / "summary.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), key, value)))
    refused(run, "summary.json")


METRICS: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "a line without samples_seen": lambda lines: [changed(lines[0], "samples_seen", ...), *lines[1:]],
    "an evaluation without diversity": lambda lines: [changed(lines[0], "eval/lpips", None), *lines[1:]],
    "a text for a number": lambda lines: [changed(lines[0], "eval/reward", "high"), *lines[1:]],
    "one evaluation": lambda lines: lines[:1],
    "none": lambda lines: [],
}


@pytest.mark.parametrize("change", METRICS)
def test_metrics_of_another_form(change: str, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    lines = METRICS[change]([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(run, "metrics.jsonl")


def refused(run: Path, file: str) -> None:
    with pytest.raises(CompareError) as error:
        read_runs([str(run)])
    assert str(error.value) == (
        f"{run} cannot be read: its {file} holds something else than a run writes; leave it out"
    )


def test_what_is_no_table_at_all() -> None:
    for content in (None, [], 5, "text"):
        for read in (Settings.of, Summary.of, lambda content: whole_lines([content])):
            with pytest.raises(Strange):
                read(content)


def test_what_only_some_runs_have(tmp_path: Path) -> None:
    """An argument of one algorithm is None or empty in the others; of another type it counts as not there,
    for somebody's own algorithm may give the name another meaning."""
    its = Settings.of(CONFIG)
    assert its.algorithm.k == 1 and its.algorithm.reward_cap is None and its.method == "DRaFT"
    assert its.held_out == () and its.noisy_steps is None and its.shown_prompts == ("cat", "dog")
    own = changed(CONFIG, "algo", {"_target_": "mine.Own", "k": "few", "truncation": 3, "reward_cap": 5})
    algo = Settings.of(own).algorithm
    assert (algo.name, algo.k, algo.truncation, algo.reward_cap) == ("Own", None, None, 5)
    few = changed(CONFIG, "sampler", {"eta": [0.0, 1.0, 0.5, 0.0]})
    assert Settings.of(few).noisy_steps == 2
    plus = Settings.of(changed(CONFIG, "kl_coeff", 0.1))
    ddpo = Settings.of(
        changed(CONFIG, "algo", {"_target_": "alignlab.objectives.ddpo.DDPO", "estimator": "is"})
    )
    assert (plus.method, ddpo.method) == ("DRaFT+", "DDPO-IS")
    watched = changed(
        changed(CONFIG, "eval_rewards", {"bright": {}, "held": {}}), "evaluation", {"prompts": 1}
    )
    assert Settings.of(watched).held_out == ("held",) and Settings.of(watched).shown_prompts == ("cat",)
    (run,) = read_runs([str(made_run(tmp_path / "run"))])
    assert run.summary.gain("reward") == pytest.approx(1.0) and run.summary.units == {}
    assert run.evaluation is not None and run.evaluation.tables == {}
