"""python -m alignlab.train algo=draftp kl_coeff=0.25

The loop, top to bottom: rollout -> reward -> advantages -> objective -> step -> evaluate -> save. It knows no algorithm:
an objective consumes a lazy stream of scored rollouts and yields updates (objectives/__init__.py).
"""

import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import alignlab
from alignlab.config import NOT_SCIENCE, ConfigError, build, checked, command, device_of
from alignlab.data.prompts import Prompts
from alignlab.evaluate import Diversity, Measured, distance_to_base, evaluate
from alignlab.metrics.diversity import PerceptualDistance
from alignlab.noise import noise_key
from alignlab.objectives import Objective
from alignlab.policy import Policy
from alignlab.rewards.compose import WeightedSum
from alignlab.rollout import Rollout, rollout
from alignlab.runs import Run, RunError, git_state
from alignlab.samplers import Sampler

STATEFUL = ("objective", "optimizer", "scaler", "reward")
"""The parts of a lab whose state a checkpoint holds, beside the policy's weights."""


@dataclass(kw_only=True)
class Lab:
    """Everything a run is made of."""

    policy: Policy
    sampler: Sampler
    eval_sampler: Sampler
    reward: WeightedSum
    held_out: WeightedSum
    diversity: Diversity
    prompts: Prompts
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @staticmethod
    def of(c: dict[str, Any]) -> "Lab":
        """Builds a checked configuration. The seed decides the LoRA's initial A; all other draws are keyed (noise.py)."""
        torch.manual_seed(c["seed"])
        device = device_of(c["device"])
        family = build(c["model"])
        policy = build(c["policy"], family=family, precision=c["precision"], device=device)
        reward, held_out = (weighted_sum(c[group]) for group in ("reward", "eval_rewards"))
        samplers = [build(c[group], scheduler=family.scheduler).to(device) for group in ("sampler", "eval_sampler")]
        return Lab(
            policy=policy,
            sampler=samplers[0],
            eval_sampler=samplers[1],
            reward=reward,
            held_out=held_out,
            diversity=PerceptualDistance(),
            prompts=build(c["prompts"]),
            objective=build(c["algo"]),
            optimizer=build(c["optimizer"], params=policy.parameters()),
            scaler=torch.amp.GradScaler(device.type, enabled=c["precision"] == "fp16"),
        )

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Training and held-out rewards by name."""
        return {**self.held_out.score(images, prompts), **self.reward.score(images, prompts)}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in STATEFUL}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])


def weighted_sum(nodes: dict[str, Any]) -> WeightedSum:
    """The rewards of one group, with their weights."""
    parts = {name: {k: v for k, v in node.items() if k not in ("weight", "normalize")} for name, node in nodes.items()}
    return WeightedSum(
        {name: build(node) for name, node in parts.items()},
        {name: node["weight"] for name, node in nodes.items()},
        {name for name, node in nodes.items() if node["normalize"]},
    )


def train(c: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs (or goes on with) one configuration in `folder`, and returns its summary."""
    run = Run(folder, c, ignore=NOT_SCIENCE)
    if run.summary is not None:
        print(f"{folder} is finished; nothing to do")
        return run.summary
    lab, began = Lab.of(c), time.perf_counter()
    saved = run.load_checkpoint()
    if saved is not None:
        weights, state = saved
        lab.policy.load_state_dict(weights)
        lab.load_state_dict(state["lab"])
        start, base, spent = state["step"], state["base"], state["wall_seconds"]
    else:
        start, base, spent = 0, measure_base(lab, c, run), 0.0

    def save(step: int) -> None:
        wall = spent + time.perf_counter() - began
        run.save_checkpoint(
            step,
            lab.policy.state_dict(),
            {"lab": lab.state_dict(), "base": base, "wall_seconds": wall, "metrics_lines": len(run.metrics())},
        )

    if saved is None:
        save(0)
    with trackers(c, run) as tracker, progress(c["steps"], start) as bar:
        for step in range(start + 1, c["steps"] + 1):
            line = {"step": step, "samples_seen": step * c["samples_per_step"], **train_epoch(lab, c, step)}
            if step % c["eval_every"] == 0 or step == c["steps"]:
                line |= {f"eval/{k}": v for k, v in measure(lab, c, run, step).items()}
            run.log(line)
            tracker.log({k: v for k, v in line.items() if v is not None}, step=step)
            bar(line)
            if step == c["steps"] or (c["checkpoint_every"] and step % c["checkpoint_every"] == 0):
                save(step)
    lab.policy.save(folder / "model")
    return finish(lab, c, run, base, spent + time.perf_counter() - began)


def train_epoch(lab: Lab, c: dict[str, Any], epoch: int) -> dict[str, Any]:
    """One epoch: sample and score (lazily), then the objective's updates. Draws are a pure function of (seed, epoch)."""
    n, chunk, began = c["samples_per_step"], min(c["micro_batch"], c["samples_per_step"]), time.perf_counter()
    rng = np.random.default_rng([c["seed"], epoch])
    prompts = lab.prompts.draw(n, seed=c["seed"], epoch=epoch)
    key = noise_key(prompts, seed=c["seed"], stream="train", epoch=epoch)
    rewards: list[dict[str, torch.Tensor]] = []
    if lab.policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def scored_rollouts() -> Iterator[Rollout]:
        for k in range(0, n, chunk):
            plan = lab.objective.plan(len(lab.sampler), rng)
            with torch.set_grad_enabled(lab.objective.needs_gradient):
                record = rollout(
                    lab.policy,
                    lab.sampler,
                    key[range(k, k + chunk)],
                    gradients=plan,
                    store=lab.objective.store(len(lab.sampler)),
                    offload=c["offload"],
                )
                total, by_name = lab.reward(record.images, record.prompts)
            rewards.append({k: v[: record.samples].detach() for k, v in {**by_name, "reward": total}.items()})
            yield replace(record, rewards=by_name, reward=total, share=chunk / n)

    log, norms = Averages(), []
    for update in lab.objective.updates(lab.policy, scored_rollouts(), c["micro_batch"], rng):
        lab.optimizer.zero_grad(set_to_none=True)
        for share, batch in update.batches:
            loss, metrics = lab.objective.loss(lab.policy, batch)
            lab.scaler.scale(share * loss).backward()
            log.add(share, {"loss": loss.detach(), **metrics})
        lab.scaler.unscale_(lab.optimizer)
        norms.append(nn.utils.clip_grad_norm_(lab.policy.parameters(), c["max_grad_norm"]).item())
        if not np.isfinite(norms[-1]) and not lab.scaler.is_enabled():
            raise RunError(
                f"epoch {epoch}: the gradient is not finite (norm {norms[-1]}); lower lr or max_grad_norm. The last checkpoint is intact"
            )
        lab.scaler.step(lab.optimizer)
        lab.scaler.update()

    seconds = time.perf_counter() - began
    line: dict[str, Any] = {}
    for name in rewards[0]:
        values = torch.cat([r[name] for r in rewards]).double()
        prefix = "reward" if name == "reward" else f"reward/{name}"
        line |= {f"{prefix}/mean": values.mean().item(), f"{prefix}/std": values.std(correction=0).item()}
    line |= {"loss": None, "kl": None, **log.means(), **lab.objective.epoch_metrics()}
    line |= {"grad_norm": float(np.mean(norms)), "updates": len(norms)}
    return line | {"seconds": seconds, "images_per_second": n / seconds, "peak_memory_mb": peak_memory_mb(lab.policy.device)}


class Averages:
    """Share-weighted means of micro-batch metrics, on the device until they are read; *_max keep the largest."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.shares: dict[str, float] = {}

    def add(self, share: float, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            if name.endswith("_max"):
                self.sums[name] = torch.maximum(self.sums.get(name, value), value)
                self.shares[name] = 1.0
            else:
                self.sums[name] = self.sums.get(name, 0.0) + share * value
                self.shares[name] = self.shares.get(name, 0.0) + share

    def means(self) -> dict[str, float]:
        return {name: (value / self.shares[name]).item() for name, value in self.sums.items()}


# -- evaluation and what a run leaves


def measure(lab: Lab, c: dict[str, Any], run: Run, step: int) -> dict[str, float | None]:
    """The evaluation during training, with its grid of samples."""
    chosen, images = lab.prompts.prompts[: c["evaluation"]["prompts"]], c["evaluation"]["images"]
    seen = evaluate(lab.policy, lab.eval_sampler, lab.score, lab.diversity, chosen, images=images, stream="eval")
    run.save_samples(step, seen.images, columns=images)
    away = distance_to_base(lab.policy, lab.sampler, chosen)
    return seen.numbers(lab.reward.combine) | {f"kl_{k}": v for k, v in away.items()}


def measure_all(lab: Lab, c: dict[str, Any]) -> Measured:
    """Every training prompt, on noise that nothing else uses: the numbers of the summary."""
    images = c["evaluation"]["final_images"]
    return evaluate(lab.policy, lab.eval_sampler, lab.score, lab.diversity, lab.prompts.prompts, images=images, stream="final")


def measure_base(lab: Lab, c: dict[str, Any], run: Run) -> dict[str, float | None]:
    """The model as it was loaded. Normalised rewards take their scale from it."""
    seen = measure_all(lab, c)
    lab.reward.calibrate(seen.rewards)
    measure(lab, c, run, 0)
    return seen.numbers(lab.reward.combine)


def finish(lab: Lab, c: dict[str, Any], run: Run, base: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
    lines = run.metrics()
    summary = {
        "base": base,
        "final": measure_all(lab, c).numbers(lab.reward.combine),
        "diversity_metric": lab.diversity.name,
        "reward_unit": lab.reward.unit,
        "wall_seconds": wall_seconds,
        "samples_seen": lines[-1]["samples_seen"] if lines else 0,
        "images_per_second": float(np.median([line["images_per_second"] for line in lines])) if lines else None,
        "peak_memory_mb": max((line["peak_memory_mb"] for line in lines), default=None),
        "seed": c["seed"],
        "versions": {"alignlab": alignlab.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "machine": {"device": str(lab.policy.device), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "git": git_state(Path(alignlab.__file__).parent),
    }
    run.finish(summary)
    return summary


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class trackers:
    """TensorBoard in the run folder, and one more tracker by name, through accelerate."""

    def __init__(self, c: dict[str, Any], run: Run) -> None:
        AcceleratorState._reset_state(True)  # a sweep runs its jobs in one process
        extra = [] if c["tracker"] == "none" else [c["tracker"]]
        self.accelerator = Accelerator(
            cpu=device_of(c["device"]).type == "cpu", log_with=["tensorboard", *extra], project_dir=run.folder
        )
        self.accelerator.init_trackers("tensorboard")

    def __enter__(self) -> Accelerator:
        return self.accelerator

    def __exit__(self, *_: Any) -> None:
        self.accelerator.end_training()


class progress:
    """A bar with epoch, images/s, reward and remaining time; plain lines at evaluations when the output is no terminal."""

    def __init__(self, steps: int, start: int) -> None:
        columns = (
            TextColumn("epoch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns)
        self.task = self.bar.add_task("epoch", total=steps, completed=start, note="")

    def __enter__(self) -> "progress":
        self.bar.start()
        return self

    def __call__(self, line: dict[str, Any]) -> None:
        note = f"reward {line['reward/mean']:.3f}  {line['images_per_second']:.1f} images/s"
        self.bar.update(self.task, completed=line["step"], note=note)
        if "eval/reward" in line:
            self.bar.print(
                f"epoch {line['step']:>4}  {note}  evaluation: reward {line['eval/reward']:.3f}, lpips {line['eval/lpips']:.3f}"
            )

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()


@command("train")
def main(cfg: DictConfig) -> float:
    """Hydra's task: checks everything, then trains. Returns the final reward, for sweepers that optimise."""
    c = checked(cfg)
    folder = Path(c["resume"] or HydraConfig.get().runtime.output_dir)
    try:
        summary = train(c, folder)
    except RunError as error:
        raise ConfigError(str(error)) from None
    base, final = summary["base"], summary["final"]
    for name, value in final.items():
        if value is not None:
            print(f"{name:>24}  base {base[name]:8.3f}  final {value:8.3f}")
    print(f"pictures: {folder / 'samples'}")
    return float(final["reward"])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
