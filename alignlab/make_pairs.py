"""python -m alignlab.make_pairs run=runs/DIR candidates=8 output_dir=pairs

Makes preference pairs by rewards. It draws several images of each prompt from any model or run, scores them,
and pairs them by a rule (data/pairing.py). The folder that it writes is data for training: `algo=dpo
algo.data=pairs`. Candidates keep their scores, so that other pairs can be made of them without sampling:
`again=pairs pairing.rule=pareto`.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignlab.config.build import ConfigError, build, node_problems
from alignlab.config.checks import bench_problems, choice_problems, sampler_problems
from alignlab.config.command import command
from alignlab.config.compose import asked, opted_in, plain
from alignlab.config.jobs import folder_of_job
from alignlab.config.record import record
from alignlab.config.reward_nodes import weighed
from alignlab.data.pairing import Paired
from alignlab.data.prompts import thinned
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import rollout
from alignlab.files.checksums import digest_of
from alignlab.files.safe_folder import RunError, fresh, locked
from alignlab.files.writing import refuse_unwritable
from alignlab.rewards.compose import RewardError
from alignlab.runs.candidates import (
    ABOUT,
    CANDIDATES,
    LABELS,
    PAIRS,
    Candidates,
    copy,
    read_about,
    read_candidates,
    write_pairs,
)
from alignlab.runs.layout import run_folders
from alignlab.runs.pasted import line, word
from alignlab.runs.provenance import provenance
from alignlab.runs.stored_config import read_config
from alignlab.training.setup import warn_of_cut, weighted_sum
from alignlab.weights.load import TunedConfig, dialled, of_run, policy_of, tuned_problems

GROUPS = ("model", "reward", "prompts", "eval_sampler")
CHANGEABLE = ("again", "batch", "device", "output_dir", "allow_targets", "allow_servers", "pairing")
"""Keys on which the candidates do not depend."""


@dataclass
class MakePairsConfig(TunedConfig):
    """The keys of conf/make_pairs.yaml."""

    again: str | None = None
    """A folder that this command wrote: makes its pairs anew by `pairing`, without sampling or scoring, in
    place or in output_dir."""
    candidates: int = 4
    """Images of each prompt. [images]"""
    split: str = "seen"
    """Which prompts: seen (those that training draws), unseen, or all. [seen | unseen | all]"""
    max_prompts: int | None = None
    """Of them; more are thinned out evenly. Null takes all. [prompts]"""
    shared_latent: bool = False
    """All images of a prompt begin at the same x_T, as D3PO's do; the sampler must then draw noise
    (eval_sampler.eta=1)."""
    seed: int = 0
    """Fixes the noises of the candidates. [any whole number from 0]"""
    batch: int = 64
    """Images sampled at once. [images]"""
    output_dir: str | None = None
    """A new folder under runs/ if it is null. The same command goes on in the same folder."""
    pairing: Any = None
    """Which candidate beats which: rule, k, margin, normalise, scope, and weights (null: those of the
    rewards)."""
    reward: Any = None
    """What decides which candidate is better: the run's own, unless it is named."""
    prompts: Any = None
    """The run's own, unless they are named."""


ConfigStore.instance().store(name="make_pairs_schema", node=MakePairsConfig)


def checked(cfg: DictConfig) -> MakePairsConfig:
    """The configuration as a record, with the groups of the run, but for those that were asked for by name.

    Raises:
        ConfigError: with every problem that was found.
    """
    given = plain(cfg)
    allowed = opted_in(given)
    weighed(given)
    c = record(MakePairsConfig, {**given, "allow_targets": allowed})
    problems = list(node_problems("pairing", c.pairing, allowed=allowed, offers=("__call__",)))
    if c.again is not None:
        sampling = sorted(key for key in asked() if key.partition(".")[0] not in CHANGEABLE)
        if sampling:
            problems.append(
                f"again={c.again} samples and scores nothing, so {sampling[0]} has no effect; leave it out"
            )
        if not (Path(c.again) / "make_pairs.yaml").is_file():
            problems.append(
                f"again={c.again} is no folder that alignlab.make_pairs wrote (it has no "
                "make_pairs.yaml); give one"
            )
        if problems:
            raise ConfigError("\n".join(problems))
        return c
    least = {"candidates": 2, "batch": 1, "seed": 0}
    problems += [
        f"{key}={given[key]} must be at least {low}" for key, low in least.items() if given[key] < low
    ]
    most = {"candidates": 100, "batch": 10**6, "seed": 2**32 - 1}
    problems += [
        f"{key}={given[key]} must be at most {high}" for key, high in most.items() if given[key] > high
    ]
    if c.max_prompts is not None and c.max_prompts < 1:
        problems.append(f"max_prompts={c.max_prompts} must be at least 1; null takes all")
    if c.split not in ("seen", "unseen", "all"):
        problems.append(f"split={c.split} is not one of seen, unseen, all")
    problems += tuned_problems(c)
    folders = run_folders(c.run) if c.run is not None else []
    if len(folders) > 1:
        problems.append(f"run={c.run} names {len(folders)} runs; give one of them")
    if len(folders) == 1:
        try:
            c = of_run(c, folders[0], GROUPS)
        except RunError as error:
            raise ConfigError("\n".join([*problems, str(error)])) from None
        weighed({"reward": c.reward})
        problems += choice_problems(c, ("precision",))
    if not c.reward:
        problems.append(
            "reward is empty; choose one with reward=NAME, or several with 'reward=[clip,colour]'"
        )
    wrong = list(bench_problems(asdict(c), allowed, ("model", "prompts", "eval_sampler")))
    problems += _impossible(c) if not wrong and not problems else wrong
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return c


def _impossible(c: MakePairsConfig) -> list[str]:
    """What is wrong with values that are each right by themselves."""
    problems, pairing = list(sampler_problems(c.model, {"eval_sampler": c.eval_sampler})), c.pairing
    if c.shared_latent and not np.any(c.eval_sampler.get("eta", 0)):
        problems.append(
            "shared_latent=true with eval_sampler.eta=0 draws the same image every time; set "
            "eval_sampler.eta=1"
        )
    if (
        pairing.get("rule") == "topk_bottomk"
        and isinstance(pairing.get("k"), int)
        and 2 * pairing["k"] > c.candidates
    ):
        problems.append(
            f"pairing.k={pairing['k']} best and as many worst are more than candidates={c.candidates}; "
            "lower it"
        )
    weights = {
        **{name: node["weight"] for name, node in c.reward.items()},
        **(pairing.get("weights") or {}),
    }
    unknown = [name for name in weights if name not in c.reward]
    if unknown:
        problems.append(f"pairing.weights.{unknown[0]} names no reward; they are {', '.join(c.reward)}")
    elif not any(weights.values()):
        problems.append(
            f"every reward has the weight 0 ({', '.join(weights)}), so none would choose; set "
            "reward.NAME.weight=1"
        )
    for name, node in c.reward.items():
        if node.get("normalize") and pairing.get("normalise") == "none":
            problems.append(
                f"reward.{name}.normalize=true counts in standard deviations of a run's base model, which "
                "are not known here; set pairing.normalise=zscore, or normalize=false"
            )
    if not chosen(c):
        problems.append(
            f"split={c.split}, but these prompts have none; choose another split, or prompts with unseen ones"
        )
    return problems


def chosen(c: MakePairsConfig) -> tuple[str, ...]:
    """The prompts."""
    source = build(c.prompts)
    prompts: tuple[str, ...] = {
        "seen": source.prompts,
        "unseen": source.unseen,
        "all": (*source.prompts, *source.unseen),
    }.get(c.split, ())
    return prompts if c.max_prompts is None else thinned(prompts, c.max_prompts)


def _asked(c: MakePairsConfig) -> dict[str, Any]:
    """What the candidates depend on, with the policy's settings of the run that draws them."""
    values = asdict(c) | ({"policy": read_config(Path(c.run)).get("policy", {})} if c.run else {})
    return {key: value for key, value in values.items() if key not in CHANGEABLE}


@torch.no_grad()
def fill(c: MakePairsConfig, folder: Path) -> None:
    """Samples and scores what is not there yet.

    Raises:
        RunError, RewardError: if that cannot go on. What was done is kept.
    """
    prompts, each = chosen(c), c.candidates
    out = Candidates(folder, _asked(c), prompts, each)
    at_once = max(1, c.batch // each)
    done = out.done(at_once)
    if done == len(prompts) and not out.damaged:
        return
    print(
        f"{len(prompts) - done} of {len(prompts)} prompts are to be sampled into {folder} (the same command, "
        f"with {word('output_dir', folder)}, goes on there)"
    )
    reward = weighted_sum(c.reward, group=each)
    policy = policy_of(c.model, run=c.run, lora=c.lora, precision=c.precision, device=c.device)
    warn_of_cut(policy, prompts)
    sampler = build(c.eval_sampler, scheduler=policy.family.scheduler).to(policy.device)
    turned = dialled(policy, sampler, lora_scale=c.lora_scale, annealing=c.annealing)
    about = {
        "weights": digest_of(policy.state_dict()) if c.run or c.lora else None,
        "prompts": hashlib.blake2b("\0".join(prompts).encode(), digest_size=16).hexdigest(),
        "units": {name: scorer.unit for name, scorer in reward.rewards.items()},
    }
    out.begin({**about, **provenance(policy.device)})
    out.cut_back(done)
    with Progress(TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("images", total=each * len(prompts), completed=each * done)
        for first in range(done, len(prompts), at_once):
            some = prompts[first : first + at_once]
            if known := out.scores(first, len(some)):
                out.log(first, len(some), c.seed, known)
                progress.advance(task, each * len(some))
                continue
            if out.missing(first, len(some)):
                key = noise_key(
                    [p for p in some for _ in range(each)],
                    seed=c.seed,
                    stream="pairs",
                    shared_first=c.shared_latent,
                )
                parts = [
                    key[range(k, min(k + c.batch, len(key.prompts)))]
                    for k in range(0, len(key.prompts), c.batch)
                ]
                out.save(
                    first, torch.cat([rollout(turned, sampler, part, store="image").images for part in parts])
                )
            images = out.images(first, len(some), policy.family.image_size).to(policy.device)
            scores = reward.score(images, [p for p in some for _ in range(each)], each)
            out.log(first, len(some), c.seed, {name: values.tolist() for name, values in scores.items()})
            progress.advance(task, each * len(some))


def pair(c: MakePairsConfig, folder: Path) -> tuple[Paired, list[str]]:
    """Makes the pairs of a folder's candidates, writes them, and returns them with the candidates' prompts.

    Raises:
        RunError: if the candidates cannot be read, or the rule does not fit them.
    """
    source = Path(c.again or folder)
    other = folder.resolve() != source.resolve()
    with (
        nullcontext() if other or c.again is None else locked(folder, "being filled")
    ):  # `fill` holds it already
        rows = read_candidates(source)
        if not rows:
            raise RunError(
                f"{source} holds no scored candidates yet; finish it first, by the command that began it"
            )
        names, prompts = [*rows[0].rewards], [row.prompt for row in rows]
        node = {**c.pairing, "weights": {**_weights(source, names), **(c.pairing.get("weights") or {})}}
        try:
            paired: Paired = build(node)(
                prompts, {name: [row.rewards[name] for row in rows] for name in names}
            )
        except ValueError as error:
            raise RunError(f"pairing: {error}") from None
        if other:
            copy(source, folder, rows)
        write_pairs(folder, rows, paired, node)
    return paired, prompts


def _weights(source: Path, names: Sequence[str]) -> dict[str, float]:
    """Of the rewards, as the folder's make_pairs.yaml has them."""
    nodes = read_about(source)["config"].get("reward")
    weights = {
        name: nodes[name].get("weight")
        for name in names
        if isinstance(nodes, dict) and isinstance(nodes.get(name), dict)
    }
    return {name: weight for name, weight in weights.items() if isinstance(weight, (int, float))}


@command("make_pairs", schema=MakePairsConfig, check=checked)
def main(cfg: DictConfig) -> float:
    """Hydra's task. Returns the number of pairs."""
    c, began = checked(cfg), time.perf_counter()
    at = HydraConfig.get()
    given = folder_of_job() if at.mode == RunMode.MULTIRUN else c.output_dir or c.again
    folder = Path(given) if given else fresh(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-pairs")
    try:
        refuse_unwritable(folder, "output_dir", ABOUT, CANDIDATES, PAIRS, LABELS)
        if c.again is None:
            fill(c, folder)
        paired, prompts = pair(c, folder)
    except RewardError as error:
        raise ConfigError(
            f"{error}; the images are kept in {folder}, and the same command goes on there"
        ) from None
    except RunError as error:
        raise ConfigError(str(error)) from None
    print(summary(c.pairing, paired, prompts, time.perf_counter() - began))
    print(f"written: {folder}; to train on them: {line('train', 'algo=dpo', word('algo.data', folder))}")
    return float(len(paired.pairs))


def summary(pairing: dict[str, Any], paired: Paired, prompts: Sequence[str], seconds: float) -> str:
    """What came of it, for the terminal."""
    every, winning = {*prompts}, {prompts[pair.winner] for pair in paired.pairs}
    good = sum(paired.labels.values())
    margins = sorted(pair.margin for pair in paired.pairs)
    out = [
        f"{len(prompts)} candidates of {len(every)} prompts ({seconds:.0f} s)",
        f"{len(margins)} pairs by {pairing.get('rule', pairing['_target_'])}, {paired.ties} ties left out, "
        f"{len(every - winning)} prompts without a pair",
    ]
    if margins:
        out.append(
            f"margins {margins[0]:.4g} to {margins[-1]:.4g}, the middle one {margins[len(margins) // 2]:.4g}"
        )
    return "\n".join([*out, f"{len(paired.labels)} labels, {good} good and {len(paired.labels) - good} bad"])


if __name__ == "__main__":
    main()
