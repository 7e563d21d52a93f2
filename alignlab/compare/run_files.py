"""What is read of the files of a finished run, with types.

A folder may be somebody else's, so each record is made and checked once, where the files are read: `of` takes
what a file holds, and raises `Strange` if that is nothing that a run writes. A fact that not every run has,
because only some algorithms or later versions write it, is None or empty if it is missing or has another
type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from alignlab.files.checksums import digest_of_json

T = TypeVar("T")

Line = dict[str, Any]
"""A line of metrics.jsonl: its numbers by name."""


class Strange(Exception):
    """A file holds something else than a run writes."""


@dataclass(frozen=True, kw_only=True)
class TrainingReward:
    """One of the rewards of config.yaml that are trained on."""

    weight: float
    normalize: bool
    """Whether it counts in standard deviations of the base model's images."""

    @classmethod
    def of(cls, node: Any) -> Self:
        return cls(weight=_number(node, "weight"), normalize=bool(node.get("normalize")))


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The algorithm of config.yaml, and those of its arguments that figures are about."""

    name: str
    """Of its class."""
    estimator: str
    """Of DDPO: sf or is."""
    weighting: str | None
    """Of RWR: dense or sparse."""
    resample_every: int
    """Of online DPO: epochs that one set of images serves."""
    k: int | None
    """Of DRaFT, as all that follow: how many steps keep their graph."""
    truncation: str | None
    lv_samples: int
    detach_input: bool
    reward_cap: float | None
    kl: str | None

    @classmethod
    def of(cls, node: Any) -> Self:
        name = _text(node, "_target_").rpartition(".")[2]
        return cls(
            name=name,
            estimator=_text(node, "estimator") if name == "DDPO" else "",
            weighting=_if_a(str, node, "weighting"),
            resample_every=_if_a(int, node, "resample_every") or 1,
            k=_if_a(int, node, "k"),
            truncation=_if_a(str, node, "truncation"),
            lv_samples=_if_a(int, node, "lv_samples") or 0,
            detach_input=_if_a(bool, node, "detach_input") or False,
            reward_cap=_number(node, "reward_cap") if _numbers(node, "reward_cap") else None,
            kl=_if_a(str, node, "kl"),
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """config.yaml."""

    algorithm: Algorithm
    kl_coeff: float
    seed: int
    steps: int
    """Epochs of training."""
    quick: bool
    rewards: dict[str, TrainingReward]
    held_out: tuple[str, ...]
    """The rewards that are measured and not trained on."""
    noisy_steps: int | None
    """Sampler steps that draw noise in training, where each step has an eta of its own."""
    eval_steps: float
    eval_guidance: float
    """Of the sampler of all evaluations."""
    shown_prompts: tuple[str, ...]
    """Those of the evaluations during training."""

    @classmethod
    def of(cls, config: Any) -> Self:
        rewards = {name: TrainingReward.of(node) for name, node in _table(config, "reward").items()}
        sampler, eval_sampler = _if_a(dict, config, "sampler") or {}, _table(config, "eval_sampler")
        eta = _if_a(list, sampler, "eta")
        prompts = _if_a(list, _table(config, "prompts"), "prompts") or []
        _table(config, "model")
        return cls(
            algorithm=Algorithm.of(_table(config, "algo")),
            kl_coeff=_number(config, "kl_coeff"),
            seed=_a(int, config, "seed"),
            steps=_if_a(int, config, "steps") or 0,
            quick=_if_a(bool, config, "quick") or False,
            rewards=rewards,
            held_out=tuple(name for name in _table(config, "eval_rewards") if name not in rewards),
            noisy_steps=None if eta is None else sum(isinstance(e, int | float) and e > 0 for e in eta),
            eval_steps=_number(eval_sampler, "steps"),
            eval_guidance=_number(eval_sampler, "guidance_scale"),
            shown_prompts=tuple(map(str, prompts[: _if_a(int, _table(config, "evaluation"), "prompts")])),
        )

    @property
    def method(self) -> str:
        """The algorithm, as the papers call it."""
        if self.algorithm.name == "DRaFT" and self.kl_coeff:
            return "DRaFT+"
        name, estimator = self.algorithm.name, self.algorithm.estimator
        return f"{name}-{estimator.upper()}" if estimator else name


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One of the two ends of summary.json: the base model, or what was trained, on all training prompts."""

    reward: float
    lpips: float | None
    """None if each prompt had one image."""
    numbers: dict[str, float]
    """All by name, these two as well: each reward, and its standard deviation as NAME_std."""

    @classmethod
    def of(cls, node: Any) -> Self:
        lpips = node.get("lpips")
        if not isinstance(lpips, float | int | None):
            raise Strange
        numbers = {name: value for name, value in node.items() if isinstance(value, int | float)}
        return cls(reward=_number(node, "reward"), lpips=lpips, numbers=numbers)

    @property
    def diversity(self) -> float:
        """Not a number where it was not measured."""
        return math.nan if self.lpips is None else self.lpips


@dataclass(frozen=True, kw_only=True)
class Summary:
    """summary.json."""

    base: Measured
    final: Measured
    reward_unit: str
    diversity_metric: str
    units: dict[str, str]
    """Of each reward."""
    wall_seconds: float
    machine: dict[str, Any]
    versions: object
    git: object

    @classmethod
    def of(cls, node: Any) -> Self:
        return cls(
            base=Measured.of(_table(node, "base")),
            final=Measured.of(_table(node, "final")),
            reward_unit=_text(node, "reward_unit"),
            diversity_metric=_text(node, "diversity_metric"),
            units=_if_a(dict, node, "units") or {},
            wall_seconds=_number(node, "wall_seconds") if _numbers(node, "wall_seconds") else math.nan,
            machine=_if_a(dict, node, "machine") or {},
            versions=node.get("versions"),
            git=node.get("git"),
        )

    def gain(self, name: str) -> float:
        """Of a reward by name, or of "reward", over the base model."""
        return self.final.numbers[name] - self.base.numbers[name]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """evaluation.json."""

    protocol: dict[str, Any]
    units: dict[str, str]
    """Of each reward that was measured."""
    lpips_to_base: float
    tables: dict[str, str]
    """Digests of the tables beside it; empty for evaluations of earlier versions."""

    @classmethod
    def of(cls, node: Any) -> Self:
        made = cls(
            protocol=_table(node, "protocol"),
            units=_table(node, "units"),
            lpips_to_base=_number(_table(node, "drift"), "lpips_to_base"),
            tables=_if_a(dict, node, "tables") or {},
        )
        content = {key: value for key, value in node.items() if key != "digest"}
        if node.get("digest") not in (None, digest_of_json(content)):
            raise Strange
        return made


def whole_lines(lines: Sequence[Any]) -> list[Line]:
    """The lines of metrics.jsonl. At least two of them hold an evaluation."""
    if not all(_numbers(line, "step", "samples_seen") for line in lines):
        raise Strange
    measured = [line for line in lines if "eval/reward" in line]
    if not all(_numbers(line, "eval/reward", "eval/lpips") for line in measured):
        raise Strange
    if sum(_numbers(line, "eval/reward_std") for line in measured) < 2:
        raise Strange
    return list(lines)


def _numbers(node: Any, *keys: str) -> bool:
    return isinstance(node, dict) and all(isinstance(node.get(key), int | float) for key in keys)


def _number(node: Any, key: str) -> float:
    if not _numbers(node, key):
        raise Strange
    value: float = node[key]
    return value


def _text(node: Any, key: str) -> str:
    return _a(str, node, key)


def _table(node: Any, key: str) -> dict[str, Any]:
    return _a(dict, node, key)


def _a(kind: type[T], node: Any, key: str) -> T:
    value = _if_a(kind, node, key)
    if value is None:
        raise Strange
    return value


def _if_a(kind: type[T], node: Any, key: str) -> T | None:
    value = node.get(key) if isinstance(node, dict) else None
    return value if isinstance(value, kind) else None
