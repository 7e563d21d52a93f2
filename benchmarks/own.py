"""alignlab in a process of its own, reported as the peer's scripts report themselves: one RESULT line of
JSON.

    python benchmarks/own.py --epochs 3 algo=ddpo model.path_or_id=FOLDER ...

The words are those of `alignlab.train`. Epochs are `train_epoch`'s; nothing is evaluated or saved. `rollout`
is sampling, `reward` scoring, and `train` all the rest of the epochs. With `--bare` they are the bare passes
that the same epochs need.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
import psutil
import torch

from alignlab import train
from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.training.setup import Lab
from benchmarks.clock import Timers, seconds
from benchmarks.limit import Bare


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--bare", action="store_true", help="only the passes through the U-Net that those epochs need"
    )
    parser.add_argument("words", nargs="*")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("train", ["device=cpu", *args.words]))
    lab = Lab.from_config(c)
    lab.policy.encode([""])  # the peer has encoded it by now
    before, timers, rewards = psutil.Process().memory_info().rss / 2**20, Timers(), []
    if args.bare:
        return report(bare(lab, c, args.epochs), rss_before_mb=before, reward_mean=[])

    def epochs() -> None:
        for epoch in range(1, args.epochs + 1):
            rewards.append(train.train_epoch(lab, c, epoch)["reward/mean"])

    with mock.patch.object(lab.collected, "rollout", timers.around("rollout", lab.collected.rollout)):
        with mock.patch.object(
            lab.reward, "submit", timers.around("reward", lab.reward.submit)
        ):  # brightness answers at once
            total = seconds(epochs)
    numbers = {
        f"{phase}_{kind}": getattr(timers, book)[phase]
        for phase in ("rollout", "reward")
        for kind, book in (("s", "wall"), ("cpu_s", "cpu"))
    }
    for kind, clock in (("s", "wall"), ("cpu_s", "cpu")):
        numbers[f"train_{kind}"] = total[clock] - numbers[f"rollout_{kind}"] - numbers[f"reward_{kind}"]
    report(numbers, rss_before_mb=before, reward_mean=rewards, passes=lab.policy.passes)


def bare(lab: Lab, c: TrainConfig, epochs: int) -> dict[str, float]:
    """Seconds of the passes alone, in a loop on ready tensors: DDPO's sampling and its updates; DRaFT's
    steps, the last K with their way back."""
    images, micro, steps = c.samples_per_step, c.micro_batch, c.sampler["steps"]
    k = c.algo.get("k")
    whole = Bare(lab, images)
    if k is None:
        part = Bare(lab, micro)
        rollout = seconds(lambda: whole.forwards(epochs * steps))
        train = seconds(lambda: part.updates(epochs * steps * images // micro))
    else:
        rollout = seconds(lambda: whole.forwards(epochs * (steps - k)))
        train = seconds(lambda: whole.updates(epochs * k))
    return {
        f"{phase}_{kind}": its[clock]
        for phase, its in (("rollout", rollout), ("train", train))
        for kind, clock in (("s", "wall"), ("cpu_s", "cpu"))
    }


def report(numbers: dict[str, float], **more: Any) -> None:
    print("RESULT " + json.dumps({**numbers, **more}))


if __name__ == "__main__":
    main()
