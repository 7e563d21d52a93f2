"""Finished runs, read back and set side by side; those that cannot be compared are refused, and told why.

Runs that differ in nothing but the seed are one variant. Comparable means the same evaluation: model,
prompts, sampler, steps, guidance, resolution, rewards and their units, and distance. How a run was trained
may differ; that is what is compared.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignlab.compare.image_table import Images, read_images
from alignlab.compare.run_files import Evaluation, Line, Settings, Strange, Summary, whole_lines
from alignlab.files.checksums import digest_of_file
from alignlab.files.safe_folder import RunError
from alignlab.metrics.hacking import hacking_flags
from alignlab.metrics.pareto import at_matched_reward
from alignlab.runs.layout import METRICS, run_folders
from alignlab.runs.metrics_lines import changed_metrics, read_metrics
from alignlab.runs.pasted import line as command_line
from alignlab.runs.pasted import resume, word
from alignlab.runs.stored_config import NOT_SCIENCE, first_difference, read_config

BUDGETS = {
    "epochs": "step",
    "images": "samples_seen",
    "reward queries": "reward_queries",
    "denoiser passes forward": "denoiser_forwards",
    "denoiser passes backward": "denoiser_backwards",
    "seconds": "seconds",
}
"""What a curve can be drawn against, and the key of metrics.jsonl that it comes from. The last four are
counted in each epoch."""
SAME = ("model", "eval_sampler", "prompts", "reward", "diversity", "evaluation")
"""The parts of a configuration that must agree."""
OWN = (
    *NOT_SCIENCE,
    "seed",
    "eval_rewards",
    "allow_targets",
    "eval_every",
)
"""Keys that make no variant."""
REPEATED = ("algo.kl_coeff", "algo.statistics.combine")
"""Keys of an algorithm that repeat a top-level one."""


class CompareError(ValueError):
    """The runs cannot be read or compared; one sentence."""


@dataclass(frozen=True)
class Finished:
    """One finished run."""

    folder: Path
    settings: Settings
    config: dict[str, Any]
    """All of config.yaml: variants may differ in any key."""
    summary: Summary
    lines: list[Line]
    """metrics.jsonl, the base model's evaluation first."""
    evaluation: Evaluation | None
    """None if the run was not evaluated."""

    @property
    def seed(self) -> int:
        return self.settings.seed

    @cached_property
    def evaluations(self) -> list[Line]:
        """The lines with an evaluation, each with its budgets so far."""
        spent, out = {key: 0.0 for key in list(BUDGETS.values())[2:] if key in self.lines[-1]}, []
        for line in self.lines:
            spent = {key: total + line.get(key, 0.0) for key, total in spent.items()}
            if "eval/reward" in line:
                out.append({**line, **spent})
        return out

    def curve(self, key: str) -> list[float]:
        return [float(line[key]) for line in self.evaluations]

    @cached_property
    def flags(self) -> list[str]:
        """Signs of reward hacking."""
        return hacking_flags(self.evaluations, list(self.settings.rewards))

    @cached_property
    def images(self) -> Images | None:
        return self._measured("images")

    @cached_property
    def base(self) -> Images | None:
        return self._measured("base")

    def _measured(self, name: str) -> Images | None:
        if not self.evaluation:
            return None
        home, again = self.folder / "evaluation", _again(self.folder)
        try:
            images = read_images(home, name)
            for file, digest in self.evaluation.tables.items():
                if file.startswith(name) and digest_of_file(home / file) != digest:
                    raise ValueError(f"{home / file} is not what the evaluation wrote")
        except ValueError as error:
            raise CompareError(f"{error}; {again}") from None
        lacks = [unit for unit in self.evaluation.units if unit not in images.columns]
        if lacks or "train" not in images.sets:
            what = f"the column {lacks[0]}" if lacks else "images of the training prompts"
            raise CompareError(f"{home / name}.csv lacks {what}; {again}")
        return images


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed only."""

    label: str
    """The algorithm, and every key in which its variants differ."""
    short: str
    """The algorithm, and the fewest keys that tell its variants apart: for legends."""
    runs: list[Finished]

    def curves(self, key: str) -> NDArray[np.float64]:
        """[seeds, evaluations]; runs of one variant are evaluated at the same epochs."""
        return np.array([run.curve(key) for run in self.runs])

    def spread(self, measure: str) -> NDArray[np.float64] | None:
        """[seeds, prompts, 1] of "lpips" or "vendi" on the diversity set."""
        rows = [[row[measure] for row in run.images.prompts] for run in self.runs if run.images]
        if len(rows) < len(self.runs) or not rows[0] or rows[0][0] is None:
            return None
        return np.array(rows, dtype=float)[..., None]


def read_runs(patterns: Sequence[str]) -> list[Finished]:
    """The finished runs in folders, or in patterns of folders; runs that are not finished are an error.

    Raises:
        CompareError: if there is none, or one is not finished.
    """
    folders = list(dict.fromkeys(folder for pattern in patterns for folder in run_folders(pattern)))
    if not folders:
        raise CompareError(
            f"runs={','.join(patterns)} holds no run (a folder with config.yaml); give run folders or a "
            "pattern like 'multirun/DIR/*', and in a list put quotes around names with commas or brackets"
        )
    unfinished = [str(f) for f in folders if not (f / "summary.json").is_file()]
    if unfinished:
        raise CompareError(
            f"{', '.join(unfinished)} not finished (no summary.json); leave out, or finish with "
            f"{resume(Path(unfinished[0]))}"
        )
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> Finished:
    try:
        config = read_config(folder)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        lines = read_metrics(folder)
        evaluation = _evaluation(folder)
    except CompareError:
        raise
    except RunError as error:
        raise CompareError(str(error)) from None
    except OSError as error:
        raise CompareError(f"{folder} cannot be read ({error.strerror}); leave it out") from None
    except (ValueError, RecursionError) as error:
        raise CompareError(
            f"{folder} cannot be read: its summary.json was damaged ({error}); leave it out"
        ) from None
    changed = changed_metrics(folder)
    if changed is not None:
        state = "is not what the run wrote" if (folder / METRICS).is_file() else "was lost"
        mend = f"this puts it back from {changed[0]}: {resume(folder)}"
        raise CompareError(f"{folder / METRICS} {state}; {mend}")
    file = "config.yaml"
    try:
        settings = Settings.of(config)
        file = "summary.json"
        told = Summary.of(summary)
        file = METRICS
        whole = whole_lines(lines)
    except Strange:
        raise CompareError(
            f"{folder} cannot be read: its {file} holds something else than a run writes; leave it out"
        ) from None
    return Finished(
        folder=folder, config=config, settings=settings, summary=told, lines=whole, evaluation=evaluation
    )


def _evaluation(folder: Path) -> Evaluation | None:
    """evaluation.json of a run; None if it was not evaluated."""
    path = folder / "evaluation" / "evaluation.json"
    if not path.is_file():
        return None
    try:
        return Evaluation.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, Strange):
        raise CompareError(f"{path} was damaged; {_again(folder)}") from None


def _again(folder: Path) -> str:
    return f"evaluate the run again: {command_line('evaluate', word('run', folder))}"


def refuse_unlike(runs: Sequence[Finished]) -> None:
    """Raises a CompareError that names the first difference in how two runs were measured."""
    first = runs[0]
    for run in runs[1:]:
        for keys_of in (_measured_by, _protocol):
            old, new = keys_of(first), keys_of(run)
            if old is not None and new is not None:
                difference = first_difference(old, new)
                if difference is not None:
                    key, a, b = difference
                    raise CompareError(
                        f"{first.folder} and {run.folder} cannot be compared: {key} is {a} in the first and "
                        f"{b} in the second; leave one of them out"
                    )
        bases = [r.summary.base.reward for r in (first, run)]
        deviation = next(line["eval/reward_std"] for line in first.lines if "eval/reward_std" in line)
        if abs(bases[0] - bases[1]) > 0.1 * deviation:  # the same noises: rounding is all that may differ
            raise CompareError(
                f"{first.folder} and {run.folder} cannot be compared: their base models have rewards of "
                f"{bases[0]:.4g} and {bases[1]:.4g}, "
                "so the weights of model.path_or_id were others; leave one of them out"
            )


def _measured_by(run: Finished) -> dict[str, Any]:
    own = {key: run.config.get(key) for key in SAME}
    for key, free in (("model", "lora_targets"), ("prompts", "per_prompt"), ("evaluation", "batch")):
        own[key] = {k: v for k, v in run.config[key].items() if k != free}
    return {
        **own,
        "reward_unit": run.summary.reward_unit,
        "diversity_metric": run.summary.diversity_metric,
    }


def _protocol(run: Finished) -> dict[str, Any] | None:
    return None if run.evaluation is None else {"evaluation": run.evaluation.protocol}


def variants(runs: Sequence[Finished]) -> list[Variant]:
    """Grouped by configuration, labelled by algorithm and by the keys in which variants of one algorithm
    differ, in the order met."""
    plain = [_flat({k: v for k, v in run.config.items() if k not in OWN}) for run in runs]
    names = [run.settings.method for run in runs]
    groups: dict[str, list[Finished]] = {}
    differences: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    apart = {
        name: _apart([keys for keys, method in zip(plain, names, strict=True) if method == name])
        for name in differences
    }
    for run, keys, name in zip(runs, plain, names, strict=True):
        differing = [k for k in keys if k in apart[name] or (k == "kl_coeff" and keys[k])]
        shown = {k: keys[k] for k in differing if k not in REPEATED or k.rpartition(".")[2] not in differing}
        label = _label(name, shown)
        groups.setdefault(label, []).append(run)
        differences[name][label] = shown
    for label, group in groups.items():
        seeds = [run.seed for run in group]
        if len(set(seeds)) < len(seeds):
            twice = [str(run.folder) for run in group if seeds.count(run.seed) > 1]
            raise CompareError(
                f"{' and '.join(twice)} are the same run ({label}, same seed); leave one of them out"
            )
        if len({tuple(run.curve("step")) for run in group}) > 1:
            raise CompareError(
                f"the runs of {label} were evaluated at different epochs; give all of them the same "
                "eval_every"
            )
    short: dict[str, str] = {}
    for name, settings in differences.items():
        few = _telling(list(settings.values()))
        for label, keys in settings.items():
            short[label] = _label(name, {k: keys[k] for k in few if k in keys})
    return [
        Variant(label, short[label], sorted(group, key=lambda run: run.seed))
        for label, group in groups.items()
    ]


def _apart(rivals: Sequence[dict[str, Any]]) -> set[str]:
    """The keys that do not have the same value in all of these."""
    first = rivals[0]
    return {
        k for k in {k for keys in rivals for k in keys} if any(keys.get(k) != first.get(k) for keys in rivals)
    }


def _label(name: str, keys: dict[str, Any]) -> str:
    return " ".join([name, *(f"{k.removeprefix('algo.')}={value}" for k, value in keys.items())])


def _telling(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Chooses the keys that tell the variants of one algorithm apart, as few as will do.

    The algorithm's own keys are preferred to general ones, and kl_coeff always stays.
    """
    keys = list(dict.fromkeys(k for variant in settings for k in variant))
    for key in sorted(reversed(keys), key=lambda k: k.startswith("algo.")):
        fewer = [k for k in keys if k != key]
        distinct = {repr([variant.get(k) for k in fewer]) for variant in settings}
        if key != "kl_coeff" and len(distinct) == len(settings):
            keys = fewer
    return keys


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def equal_budget(compared: Sequence[Variant], key: str) -> float | None:
    """The largest budget that every run reached; None if a run did not count it."""
    ends = [run.evaluations[-1] for variant in compared for run in variant.runs]
    return float(min(line[key] for line in ends)) if all(key in line for line in ends) else None


def at_budget(run: Finished, key: str, budget: float, value: str = "eval/reward") -> float:
    """`value` at that budget, linear between evaluations."""
    return float(np.interp(budget, run.curve(key), run.curve(value)))


def matched_reward(compared: Sequence[Variant]) -> tuple[float, dict[str, list[float]]]:
    """A reward that every run reached, 90 % of the way from the base model to the least of their maxima, and
    each variant's diversity when it first reached it, one value a seed."""
    curves = [run.curve("eval/reward") for variant in compared for run in variant.runs]
    base = curves[0][0]
    level = base + 0.9 * (min(map(max, curves)) - base)
    diversities = {
        v.label: [at_matched_reward(r.curve("eval/reward"), r.curve("eval/lpips"), level) for r in v.runs]
        for v in compared
    }
    return level, {label: [x for x in values if x is not None] for label, values in diversities.items()}
