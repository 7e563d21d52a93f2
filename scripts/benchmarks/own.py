"""alignlab in a process of its own, reported as the peer's scripts report themselves: one RESULT line of JSON.

    python scripts/benchmarks/own.py --epochs 3 algo=ddpo model.path_or_id=FOLDER ...

The words are those of `alignlab.train`. Epochs are `train_epoch`'s; nothing is evaluated or saved. `rollout` is sampling, `reward` scoring, and
`train` all the rest of the epochs.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import hydra  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from alignlab import train  # noqa: E402
from alignlab.config import CONF, checked  # noqa: E402
from alignlab.journal import peak_memory_mb  # noqa: E402
from alignlab.lab import Lab  # noqa: E402
from benchmarks.clock import Timers, seconds  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.process_time()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("train", ["device=cpu", *args.words]))
    lab = Lab.from_config(c)
    start, before = time.process_time() - began, psutil.Process().memory_info().rss / 2**20
    timers, rewards = Timers(), []

    def epochs() -> None:
        for epoch in range(1, args.epochs + 1):
            rewards.append(train.train_epoch(lab, c, epoch)["reward/mean"])

    with mock.patch.object(lab.collected, "rollout", timers.around("rollout", lab.collected.rollout)):
        with mock.patch.object(lab.reward, "submit", timers.around("reward", lab.reward.submit)):  # brightness answers at once
            total = seconds(epochs)
    numbers = {
        f"{phase}_{kind}": getattr(timers, book)[phase]
        for phase in ("rollout", "reward")
        for kind, book in (("s", "wall"), ("cpu_s", "cpu"))
    }
    numbers |= {"total_s": total["wall"], "total_cpu_s": total["cpu"], "start_cpu_s": start}
    for kind in ("s", "cpu_s"):
        numbers[f"train_{kind}"] = numbers[f"total_{kind}"] - numbers[f"rollout_{kind}"] - numbers[f"reward_{kind}"]
    memory = {"rss_before_mb": before, "peak_rss_mb": peak_memory_mb(torch.device("cpu"))}
    print("RESULT " + json.dumps({**numbers, **memory, "reward_mean": rewards, "passes": lab.policy.passes}))


if __name__ == "__main__":
    main()
