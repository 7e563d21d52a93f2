"""python -m alignlab.evaluate run=runs/DIR

Measures what a run learned against the model that it started from. Both draw the same prompts from the same
noises, so every number is a difference image by image. Three sets of images:

    train      every training prompt
               rewards, win rate, drift from the base model
    unseen     prompts that training never drew
               the same: does it generalise?
    diversity  many images of each of a few training prompts
               mean pairwise LPIPS and Vendi score (DRaFT+'s protocol)

RUN/evaluation/evaluation.json has the numbers with their intervals, images.csv one line for each image of the
run and base.csv those of the base model, which are computed once and kept by the hash of the model and of all
that measures it.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from alignlab.compare.image_table import TABLES, Images, read_images, six_digits, write_images
from alignlab.config.build import ConfigError
from alignlab.config.checks import bench_problems, choice_problems
from alignlab.config.command import command
from alignlab.config.compose import opted_in, plain
from alignlab.config.record import record
from alignlab.config.reward_nodes import weighed, without_weighing
from alignlab.data.prompts import thinned
from alignlab.files.checksums import Damaged, check, digest_of_file, digest_of_json, seal
from alignlab.files.safe_folder import RunError, refuse_links
from alignlab.files.writing import all_aside, refuse_unwritable, room_for
from alignlab.metrics.statistics import Interval, bootstrap, win_rate
from alignlab.metrics.vendi import vendi_score
from alignlab.rewards import OnServer, Reward
from alignlab.rewards.clip import Clip, locate
from alignlab.rewards.compose import RewardError
from alignlab.runs.layout import run_folders
from alignlab.runs.provenance import provenance
from alignlab.runs.stored_config import read_config
from alignlab.training.evaluation import distance_to_base, evaluate
from alignlab.training.setup import Bench
from alignlab.weights.load import TunedConfig, dialled, of_run, policy_of, tuned_problems

GROUPS = ("model", "reward", "prompts", "eval_sampler", "diversity")
RESULT = "evaluation.json"
"""It has its own digest and those of the tables beside it: what was damaged, or is of another evaluation, is
told from what is whole."""


@dataclass
class EvaluateConfig(TunedConfig):
    """The keys of conf/evaluate.yaml. `run` may be a pattern of several."""

    name: str = "evaluation"
    """The folder of the results, inside the run's."""
    images: int = 4
    """Images of each training and each unseen prompt. [images]"""
    max_prompts: int = 64
    """Of each set; larger sets are thinned out evenly. [prompts]"""
    diversity_prompts: int = 8
    """Training prompts of which many images are drawn, to measure diversity. [prompts]"""
    diversity_images: int = 100
    """Images of each of them. 100 are DRaFT+'s. [images]"""
    features: str | None = "emoji_clip"
    """The CLIP of the Vendi score: a folder in open_clip's format, one shipped, or hf-hub:owner/name."""
    batch: int = 64
    """Images sampled at once. [images]"""
    cache: str = "~/.cache/alignlab/base"
    """Where the base model's measurements are kept."""
    reward: Any = None
    """What the model was trained on: the run's own, unless it is named."""
    eval_rewards: Any = None
    """What else is measured, beside what the run itself measured."""
    prompts: Any = None
    """The run's own, unless they are named."""
    diversity: Any = None
    """The distance between images: the run's own, unless it is named."""


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def checked(cfg: DictConfig) -> EvaluateConfig:
    """The configuration as a record.

    Raises:
        ConfigError: with every problem that was found.
    """
    given = plain(cfg)
    allowed = opted_in(given)
    weighed(given)
    c = record(EvaluateConfig, {**given, "allow_targets": allowed})
    problems = list(bench_problems(given, allowed))
    least = {"images": 1, "max_prompts": 1, "diversity_prompts": 0, "diversity_images": 2, "batch": 1}
    problems += [
        f"{key}={given[key]} must be at least {low}" for key, low in least.items() if given[key] < low
    ]
    problems += tuned_problems(c)
    if c.features is not None:
        try:
            locate(c.features, key="features")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if not isinstance(c.name, str) or c.name in ("", ".", "..") or Path(c.name).name != c.name:
        problems.append(f"name={c.name} must be the name of one folder, which is made in the run's")
    elif c.name in ("samples", "checkpoints", "model", "tensorboard", "probes"):
        problems.append(f"name={c.name} is a folder of the run's own; choose another")
    if not problems and c.run is not None:
        for run in run_folders(c.run):  # what a run says of itself is held to the same rules
            try:
                as_trained = as_the_run(c, run)
            except RunError as error:
                problems.append(str(error))
            else:
                wrong = [
                    *bench_problems(asdict(as_trained), allowed),
                    *choice_problems(as_trained, ("precision",)),
                ]
                problems += [f"run={run}: {problem}" for problem in wrong]
    if problems:
        raise ConfigError("\n".join(problems))
    return c


def as_the_run(c: EvaluateConfig, run: Path) -> EvaluateConfig:
    """`c` with the groups of the run, but for those that were asked for by name. The run's rewards are all
    measured."""
    watched = {**(read_config(run).get("eval_rewards") or {}), **(c.eval_rewards or {})}
    return replace(of_run(c, run, GROUPS), eval_rewards=watched)


class Evaluation:
    """The measurements of one policy and of its base model.

    Args:
        c: a checked configuration, with the groups of the run.
    """

    def __init__(self, c: EvaluateConfig) -> None:
        self.c = c
        self.policy = policy_of(c.model, run=c.run, lora=c.lora, precision=c.precision, device=c.device)
        bench = Bench.of(c, self.policy)
        turned = dialled(self.policy, bench.eval_sampler, lora_scale=c.lora_scale, annealing=c.annealing)
        self.bench = replace(bench, policy=turned)
        self.features = None if c.features is None else _clip(c.features)
        prompts = self.bench.prompts
        few = thinned(prompts.prompts, c.diversity_prompts)
        self.sets: dict[str, tuple[tuple[str, ...], int]] = {
            "train": (thinned(prompts.prompts, c.max_prompts), c.images),
            "unseen": (thinned(prompts.unseen, c.max_prompts), c.images),
            "diversity": (few, c.diversity_images),
        }
        self.sets = {name: chosen for name, chosen in self.sets.items() if chosen[0]}

    @torch.no_grad()
    def images(self, progress: Progress, who: str) -> Images:
        """Samples and scores every set, some prompts at a time."""
        rows: list[dict[str, Any]] = []
        prompt_rows: list[dict[str, Any]] = []
        kept = []
        task = progress.add_task(who, total=sum(len(p) * n for p, n in self.sets.values()))
        for name, (prompts, n) in self.sets.items():
            at_once = max(1, self.c.batch // n)
            for chosen in (prompts[k : k + at_once] for k in range(0, len(prompts), at_once)):
                seen = evaluate(self.bench, chosen, images=n, stream=f"paired/{name}", batch=self.c.batch)
                columns = {**seen.rewards, **{f"image/{k}": v for k, v in seen.statistics.items()}}
                rows += [
                    {
                        "set": name,
                        "prompt": chosen[k // n],
                        "image": k % n,
                        **{column: six_digits(v[k]) for column, v in columns.items()},
                    }
                    for k in range(n * len(chosen))
                ]
                if name == "train":
                    kept.append((seen.images * 255).round().byte())
                if name == "diversity":
                    prompt_rows += [
                        self.spread(*row)
                        for row in zip(chosen, seen.lpips, seen.images.split(n), strict=True)
                    ]
                progress.advance(task, n * len(chosen))
        return Images(rows=rows, prompts=prompt_rows, pictures=torch.cat(kept))

    def spread(self, prompt: str, lpips: float, images: Tensor) -> dict[str, Any]:
        """The diversity of one prompt's images."""
        vendi = (
            None
            if self.features is None
            else vendi_score(self.features.images(images.to(self.policy.device)))
        )
        return {"prompt": prompt, "lpips": lpips, "vendi": vendi}

    @torch.no_grad()
    def base(self, progress: Progress) -> Images:
        """The base model's, from the cache if these weights were ever measured in this way."""
        path = Path(self.c.cache).expanduser() / self.key
        if (path / "images.csv").is_file():
            try:
                check(path)
                return read_images(path)
            except (Damaged, ValueError) as damage:
                progress.print(f"warning: {path} was damaged ({damage}); the base model is measured again")
        refuse_links(path.parent, path.name)
        with self.policy.reference():
            measured = self.images(progress, "base model")
        with room_for(path, "cache"), all_aside(path, last="images.csv") as aside:
            write_images(aside, measured, pictures=True)
            seal(aside)
        return read_images(path)

    @cached_property
    def key(self) -> str:
        """Of the base model's weights, of what was asked of it, and of the rewards: what they are, and how
        they and the distance judge four fixed pictures."""
        digest = hashlib.blake2b(digest_size=12)
        with self.policy.reference():
            modules = (self.policy.family.denoiser, *self.policy.family.frozen)
        for module in modules:
            # Whatever adapters there are: theirs left out, what they wrap by its own name.
            weights = {
                name.replace(".base_layer", ""): w
                for name, w in module.state_dict().items()
                if "lora_" not in name
            }
            for _, weight in sorted(weights.items()):
                digest.update(
                    weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        probe = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(self.policy.device)
        with torch.no_grad():
            judged = {
                **self.bench.score(probe, [self.bench.prompts.prompts[0]] * 4, 4),
                "diversity": self.bench.diversity.pairwise(probe).flatten(),
            }
        asked = {
            "sets": self.sets,
            "eval_sampler": self.c.eval_sampler,
            "diversity": self.bench.diversity.name,
            "features": self.c.features,
            "rewards": self.judges,
            "judged": {k: [f"{x:.4g}" for x in v.tolist()] for k, v in judged.items()},
        }
        digest.update(json.dumps(asked, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def judges(self) -> dict[str, Any]:
        """The rewards by name: their arguments, and of one on a server what that holds."""
        nodes = {**(self.c.eval_rewards or {}), **self.c.reward}
        built = {**self.bench.held_out.rewards, **self.bench.reward.rewards}
        return {name: [without_weighing(nodes[name]), *_held(reward)] for name, reward in built.items()}

    def drift(self, mine: Images, base: Images) -> dict[str, float | None]:
        """How far the policy is from the base model: perceptually, image by image, and in the model's own
        distances."""
        assert mine.pictures is not None and base.pictures is not None
        apart = self.bench.diversity.between(mine.pictures.float() / 255, base.pictures.float() / 255)
        few = self.sets["train"][0][: self.c.batch]
        return {
            "lpips_to_base": apart.double().mean().item(),
            **distance_to_base(self.bench.policy, self.bench.eval_sampler, few),
        }


def _held(reward: Reward) -> tuple[str | None, str | None]:
    """Which reward a server holds, by name and digest; None for one that is computed here."""
    return (reward.held, reward.digest) if isinstance(reward, OnServer) else (None, None)


def _clip(path: str) -> Clip:
    """Of the Vendi score.

    Raises:
        ConfigError: if it is broken.
    """
    try:
        return Clip(path)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error).replace("path=", "features=", 1)) from None


def numbers(mine: Images, base: Images, names: list[str]) -> dict[str, Any]:
    """Means with 95 % intervals over prompts and images (one run says nothing of the spread over seeds)."""
    out: dict[str, Any] = {}
    for name in mine.sets:
        out[name] = {
            reward: {
                "base": asdict(bootstrap(b[None])),
                "tuned": asdict(bootstrap(m[None])),
                "gain": asdict(bootstrap((m - b)[None])),
                "win_rate": asdict(bootstrap(win_rate(m, b)[None])),
            }
            for reward in names
            for m, b in [(mine.values(name, reward), base.values(name, reward))]
        }
    return out


def spread(mine: Images, base: Images) -> dict[str, Any]:
    """Diversity within each prompt, averaged over prompts, with 95 % intervals over the prompts."""
    out: dict[str, Any] = {}
    for measure in ("lpips", "vendi"):
        pairs = [
            (m[measure], b[measure])
            for m, b in zip(mine.prompts, base.prompts, strict=True)
            if m[measure] is not None
        ]
        for who, column in zip(("tuned", "base"), zip(*pairs, strict=True) if pairs else (), strict=False):
            values: Interval = bootstrap(np.asarray(column, dtype=float)[None, :, None])
            out.setdefault(measure, {})[who] = asdict(values)
    return out


def shifts(mine: Images, base: Images) -> dict[str, Any]:
    """Image statistics on the training prompts: means, and the shift in standard deviations of the base
    model's images."""
    out = {}
    for name in (c for c in mine.columns if c.startswith("image/")):
        m, b = mine.values("train", name), base.values("train", name)
        out[name.removeprefix("image/")] = {
            "base": b.mean(),
            "tuned": m.mean(),
            "z": (m.mean() - b.mean()) / max(b.std(), 1e-9),
        }
    return out


def run_evaluation(c: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """Measures, writes `folder`, and returns what evaluation.json holds."""
    began = time.perf_counter()
    refuse_unwritable(folder, "name", RESULT, *TABLES)
    refuse_unwritable(Path(c.cache).expanduser(), "cache")
    this = Evaluation(c)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        base = this.base(progress)
        cached = time.perf_counter()
        mine = this.images(progress, str(c.run or c.lora or "model"))
    bench = this.bench
    model = {k: v for k, v in c.model.items() if k != "lora_targets"}
    result = {
        "run": c.run,
        "protocol": {
            "model": model,
            "base": this.key,
            "eval_sampler": c.eval_sampler,
            "resolution": None if mine.pictures is None else list(mine.pictures.shape[-2:]),
            "sets": {
                name: {"prompts": list(prompts), "images": n} for name, (prompts, n) in this.sets.items()
            },
            "diversity_metric": bench.diversity.name,
            "vendi_features": c.features,
        },
        "dials": {"lora_scale": c.lora_scale, "annealing": c.annealing},
        "units": bench.units,
        "training_rewards": list(bench.reward.rewards),
        "rewards": numbers(mine, base, list(bench.units)),
        "diversity": spread(mine, base),
        "drift": this.drift(mine, base),
        "image_statistics": shifts(mine, base),
        "seconds": {"base": cached - began, "tuned": time.perf_counter() - cached},
        **provenance(this.policy.device),
    }
    with room_for(folder, "name"), all_aside(folder, last=RESULT) as aside:
        write_images(aside, mine)
        write_images(aside, base, name="base")
        result["tables"] = {name: digest_of_file(aside / name) for name in TABLES}
        result["digest"] = digest_of_json(result)
        (aside / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def folder_of(c: EvaluateConfig) -> Path:
    """Where the results go: into the run's folder, or the LoRA's, or runs."""
    home = Path(c.run or c.lora or "runs")
    return (home.parent if home.is_file() else home) / c.name


@command("evaluate", schema=EvaluateConfig, check=checked)
def main(cfg: DictConfig) -> float:
    """Hydra's task. Returns the last run's gain in its first training reward."""
    c = checked(cfg)
    jobs = [as_the_run(c, run) for run in run_folders(c.run)] if c.run else [c]
    gain, folders = float("nan"), [folder_of(job) for job in jobs]
    for folder in folders:
        refuse_links(folder.parent, folder.name)
    for job, folder in zip(jobs, folders, strict=True):
        try:
            result = run_evaluation(job, folder)
        except (RunError, RewardError) as error:
            raise ConfigError(str(error)) from None
        print(summary(result))
        print(f"written: {folder}")
        gain = result["rewards"]["train"][result["training_rewards"][0]]["gain"]["value"]
    return gain


def summary(result: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    out = [f"{result['run'] or 'model'}: 95 % intervals over prompts and images"]
    for where, rewards in result["rewards"].items():
        for name, row in rewards.items() if where != "diversity" else ():
            base, gain, wins = row["base"], row["gain"], row["win_rate"]
            out.append(
                f"{where:>7} {name:>20}  base {base['value']:8.3f}  gain {gain['value']:+8.3f} "
                f"[{gain['low']:+.3f}, {gain['high']:+.3f}]  wins {wins['value']:.0%}"
            )
    for name, row in result["diversity"].items():
        label = result["protocol"]["diversity_metric"] if name == "lpips" else "vendi"
        out.append(f"{label:>28}  base {row['base']['value']:8.3f}  tuned {row['tuned']['value']:8.3f}")
    out.append(
        f"{'distance to base':>28}  {result['drift']['lpips_to_base']:.3f} "
        f"({result['protocol']['diversity_metric']})"
    )
    return "\n".join(out)


if __name__ == "__main__":
    main()
