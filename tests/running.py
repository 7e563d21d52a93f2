"""Tiny runs for the tests: the command line in this process, and configurations small enough for seconds."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from safetensors.torch import load_file

from alignlab import train
from alignlab.config.compose import CONF, checked
from alignlab.config.moved_experiments import present_word
from alignlab.config.schema import TrainConfig

TIMING = {"seconds", "images_per_second", "peak_memory_mb"}
"""What two equal runs may differ in."""


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """A user's plain function."""
    return images[:, 0].mean((1, 2))


class Silent:
    """A user's reward that says nothing of itself."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return redness(images, prompts)


def tiny(model: str, *more: str) -> list[str]:
    """Overrides of a run of about a second on the pipeline folder `model`."""
    words = """steps=4 samples_per_step=4 micro_batch=2 eval_every=2 checkpoint_every=1 device=cpu
        sampler.steps=3 eval_sampler.steps=2 reward=brightness policy.lora.rank=2
        prompts.prompts=[cat,dog,fish] prompts.unseen=[] prompts.per_prompt=1
        evaluation.prompts=2 evaluation.images=2 evaluation.final_images=2""".split()
    return [f"model.path_or_id={model}", *words, *more]


def pairs(folder: Path, n: int = 6, ties: int = 1) -> str:
    """Writes n pairs of images, reddish ones preferred to bluish ones, and some ties; the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, table = np.random.default_rng(0), []
    for k in range(n):
        for kind, colour in {"winner": (200, 60, 40), "loser": (40, 60, 200)}.items():
            pixels = np.clip(np.array(colour) + draw.normal(0, 25, (20, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}_{k}.png")
        table.append(
            {
                "prompt": ("cat", "dog")[k % 2],
                "winner": f"winner_{k}.png",
                "loser": f"loser_{k}.png",
                "margin": 1.0,
            }
        )
    table += [{"prompt": "cat", "winner": "loser_0.png", "loser": "loser_0.png"}] * ties
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, table)))
    return str(folder / "pairs.jsonl")


def configured(*overrides: str) -> TrainConfig:
    """The checked configuration of a command line, as a record."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(hydra.compose("train", [*map(present_word, overrides)]))


def command_line(monkeypatch: pytest.MonkeyPatch, *words: str, command: ModuleType = train) -> int:
    """`python -m alignlab.train WORDS` (or another command), in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it, and pytest puts it back
    handlers = logging.root.handlers[:]  # a sweep's Hydra adds one, which would outlive this test's stdout
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        logging.root.handlers[:] = handlers
        HydraConfig.instance().cfg = None  # as after the end of a process
    return 0


def lines(run: Path, leave_out: Sequence[str] = tuple(TIMING)) -> list[dict[str, Any]]:
    """The epochs of metrics.jsonl, after the evaluation of the base model, without what depends on the
    machine's mood."""
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in leave_out} for line in text.splitlines()][
        1:
    ]


def stopped_and_resumed(c: TrainConfig, run: Path, monkeypatch: pytest.MonkeyPatch, *, before: int) -> None:
    """Trains in `run` twice: the first time a signal ends it before epoch `before`."""
    real = train.train_epoch

    def stopping(lab: Any, c: TrainConfig, epoch: int) -> dict[str, Any]:
        if epoch == before:
            raise KeyboardInterrupt
        return real(lab, c, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.train(c, run)
    train.train(c, run)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs' last checkpoints hold bit-identical weights."""
    a, b = (
        load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "policy.safetensors")
        for run in (one, other)
    )
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
