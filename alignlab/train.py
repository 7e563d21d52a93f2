"""python -m alignlab.train algo=draftp kl_coeff=0.25

Trains a model: rollout -> reward -> advantages -> objective -> step -> evaluate -> save. It knows no
algorithm: an objective consumes a lazy stream of scored rollouts and yields updates (objectives/__init__.py).
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from alignlab.config.command import command
from alignlab.config.compose import checked
from alignlab.config.jobs import device_of, notice, run_folder
from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import clip_gradients, join, rank, sum_gradients, wait
from alignlab.runs.folder import Onlooker, Run
from alignlab.runs.provenance import provenance
from alignlab.runs.stored_config import NOT_SCIENCE
from alignlab.training.evaluation import measure, measure_all, measure_base, settle
from alignlab.training.failures import explained
from alignlab.training.guards import Guard
from alignlab.training.lr_schedule import lr_factor, set_lr
from alignlab.training.model_card import look_ahead, push, write_card
from alignlab.training.progress import Journal, peak_memory_mb, reset_peak_memory, reward_numbers, tell
from alignlab.training.scoring import ScoredRollouts
from alignlab.training.setup import Lab
from alignlab.training.signals import asked, leave, stoppable
from alignlab.training.trackers import Trackers, trackers_of
from alignlab.training.unfinished_epoch import Collected
from alignlab.training.watchdog import watched


def train(c: TrainConfig, folder: Path) -> dict[str, Any]:
    """Runs one checked configuration in `folder`, or resumes it, and returns the run's summary."""
    run = (Onlooker if rank() else Run)(folder, asdict(c), ignore=NOT_SCIENCE)
    if (done := run.finished()) is not None:
        return done
    look_ahead(c)
    lab, began = Lab.from_config(c, resumed=run.started), time.perf_counter()
    wait()  # all processes must have looked at the folder before process 0 changes it ...
    run.begin()
    wait()  # ... and must see what it wrote before they read checkpoints
    saved, lab.collected = run.load_checkpoint(), Collected(folder / "collected")
    trackers = Trackers(trackers_of(c, run, first=saved[1]["step"] + 1 if saved else 0), folder)
    if saved is None:
        start, base, spent = 0, measure_base(lab, c), 0.0
        first = {"step": 0, "samples_seen": 0, **measure(lab, c, run, 0)}
        run.log(first)
    else:
        weights, state = saved
        lab.policy.load_state_dict(weights)
        lab.load_state_dict(state["lab"])
        start, base, spent = state["step"], state["base"], state["wall_seconds"]

    def seconds() -> float:
        return spent + time.perf_counter() - began

    def save(step: int) -> None:
        state = {"lab": lab.state_dict(), "base": base, "wall_seconds": seconds()}
        run.save_checkpoint(step, lab.policy.state_dict(), state)

    if saved is None:
        save(0)
    epochs = range(start + 1, c.steps + 1)
    with Journal(epochs, trackers=trackers, diversity=lab.diversity.name) as journal:
        if saved is None:
            journal(first)
        for step in epochs:
            with lab.collected.epoch(step, lab.policy, lab.objective, save):
                line: dict[str, Any] = {"step": step, "samples_seen": step * c.samples_per_step}
                line |= train_epoch(lab, c, step)
            if step % c.eval_every == 0 or step == c.steps:
                line |= measure(lab, c, run, step)
            run.log(line)  # before the checkpoint, which keeps a copy of the lines so far
            journal(line)
            if asked() or step == c.steps or (c.checkpoint_every and step % c.checkpoint_every == 0):
                save(step)
            leave()  # ends here if a signal asked for it, for the epoch is saved

    wait()  # process 0 has written the last line, which all processes read
    selected = settle(lab, c, run)
    run.save_model(lab.policy.save)
    summary = {"base": base, **final_numbers(lab, c, run, seconds), "selected_step": selected}
    summary |= provenance(lab.policy.device)
    if rank() == 0:
        write_card(lab, c, run, summary)
    run.finish(summary)  # the run counts as finished from here on, so an upload comes after it
    if rank() == 0:
        push(folder, c.push_to_hub)
    return summary


def final_numbers(lab: Lab, c: TrainConfig, run: Run, seconds: Callable[[], float]) -> dict[str, Any]:
    """Measures the model that the run exports, and sums up the run's speed and memory.

    Args:
        seconds: returns the seconds that the run has taken, the final evaluation included.
    """
    lines, final = run.metrics()[1:], measure_all(lab, c).numbers(lab.reward.combine)
    return {
        "final": final,
        "diversity_metric": lab.diversity.name,
        "reward_unit": lab.reward.unit,
        "units": lab.units,
        "wall_seconds": seconds(),
        "samples_seen": c.steps * c.samples_per_step,
        "images_per_second": float(np.median([line["images_per_second"] for line in lines])),
        "peak_memory_mb": max(line["peak_memory_mb"] for line in lines),
        "seed": c.seed,
    }


def train_epoch(lab: Lab, c: TrainConfig, epoch: int) -> dict[str, Any]:
    """Trains for one epoch and returns its metrics. Every draw is a pure function of (seed, epoch)."""
    began, spent = time.perf_counter(), lab.spent()
    reset_peak_memory(lab.policy.device)
    rng, trained = np.random.default_rng([c.seed, epoch]), lab.policy.parameters()
    lr = set_lr(lab.optimizer, lr_factor(c.lr_schedule, epoch, epochs=c.steps, warmup=c.lr_warmup))
    guard = Guard(lab, c, epoch)
    rollouts = ScoredRollouts(lab, c, epoch, rng=rng, guard=guard)

    for update in lab.objective.updates(lab.policy, iter(rollouts), c.micro_batch, rng):
        lab.optimizer.zero_grad(set_to_none=True)
        for share, batch in update.batches:
            loss, metrics = lab.objective.loss(lab.policy, batch)
            lab.scaler.scale(share * loss).backward()
            guard.saw(share, batch, loss, metrics)
        sum_gradients(trained)
        lab.scaler.unscale_(lab.optimizer)  # the norm is clipped in the loss's own scale
        if guard.passes(clip_gradients(trained, c.max_grad_norm)):
            lab.scaler.step(lab.optimizer)
            if lab.ema is not None:
                lab.ema.step(trained)
        lab.scaler.update()

    seconds = time.perf_counter() - began
    return {
        **reward_numbers(rollouts.rewards),
        **guard.numbers(),
        "lr": lr,
        **{kind: count - spent[kind] for kind, count in lab.spent().items()},
        "seconds": seconds,
        "images_per_second": c.samples_per_step / seconds,
        "peak_memory_mb": peak_memory_mb(lab.policy.device),
    }


def smaller(c: TrainConfig, key: str) -> str:
    """Says what to lower after memory ran out, by a dry run of this loop."""
    from alignlab.planning import fit  # not at the top: a run that fits never needs the simulator

    return fit.smaller(c, key, train_epoch)


@command("train")
def main(cfg: DictConfig) -> float:
    """Hydra's task: checks everything, then trains. Returns the final reward, for sweepers that optimise."""
    c = checked(cfg)
    join(device_of(c.device))
    folder = run_folder(c)
    with watched(folder), stoppable(folder, notice()), explained(c, folder, smaller):
        summary = train(c, folder)
    if rank() == 0:
        tell(summary, folder)
    return float(summary["final"]["reward"])


if __name__ == "__main__":
    main()
