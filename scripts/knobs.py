"""What the memory and speed keys cost in time: an epoch with each, against one without, alternating. `python
scripts/knobs.py`

    python scripts/knobs.py --rounds 5 --only ema 'checkpointing'

CPU seconds of one thread (seconds of the device on CUDA), median of the rounds' ratios, on the embedded model
with DRaFT-5. The memory that they save is in `python -m alignlab.plan`.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402

from alignlab.config.compose import CONF, checked  # noqa: E402
from alignlab.config.schema import TrainConfig  # noqa: E402
from alignlab.train import train_epoch  # noqa: E402
from alignlab.training.setup import Lab  # noqa: E402

COMMON = [
    "algo=draft",
    "algo.k=5",
    "reward=clip_blue",
    "samples_per_step=8",
    "micro_batch=8",
    "sampler.steps=10",
    "eval_sampler.steps=10",
]
KNOBS = {
    "policy.checkpointing=true": ["policy.checkpointing=true"],
    "policy.decode_batch=1": ["policy.decode_batch=1"],
    "policy.decode_batch=1 and checkpointing": ["policy.decode_batch=1", "policy.checkpointing=true"],
    "policy.text_on_host=true": ["policy.text_on_host=true"],
    "offload=true": ["offload=true"],
    "ema=0.99": ["ema=0.99"],
    "optimizer=adamw8bit": ["optimizer=adamw8bit"],
    "micro_batch=2": ["micro_batch=2"],
}


def lab(words: list[str], device: str) -> tuple[Lab, TrainConfig]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("train", [*COMMON, f"device={device}", *words]))
    return Lab.from_config(c), c


def seconds(made: tuple[Lab, TrainConfig], epoch: int) -> float:
    lab, c = made
    clock = time.perf_counter if c.device == "cuda" else time.process_time
    began = clock()
    train_epoch(lab, c, epoch)  # it ends with numbers on the CPU, so the device is done
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the keys' names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain = lab([], args.device)
    seconds(plain, 1)
    print("| key | time, of an epoch without it |\n|---|---|")
    for name, words in KNOBS.items():
        if any(part in name for part in args.only):
            other = lab(words, args.device)
            seconds(other, 1)  # the first time of everything
            ratios = []
            for epoch in range(2, 2 + args.rounds):
                ratios.append(seconds(other, epoch) / seconds(plain, epoch))
            print(
                f"| `{name}` | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
