"""Finished runs as tests need them: folders with the contract's files, made up but consistent, in
milliseconds."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from alignlab.runs.folder import Run

CONFIG: dict[str, Any] = {
    "kl_coeff": 0.0,
    "seed": 0,
    "steps": 20,
    "lr": 2e-3,
    "eval_every": 10,
    "output_dir": None,
    "algo": {"_target_": "alignlab.objectives.draft.DRaFT", "k": 1, "kl_coeff": 0.0},
    "model": {
        "_target_": "alignlab.models.sd.StableDiffusion",
        "path_or_id": "emoji",
        "lora_targets": ["to_q"],
    },
    "eval_sampler": {
        "_target_": "alignlab.engine.samplers.ddim",
        "steps": 20,
        "eta": 0.0,
        "guidance_scale": 3.0,
    },
    "prompts": {"_target_": "alignlab.data.prompts.Prompts", "prompts": ["cat", "dog"], "per_prompt": 1},
    "reward": {
        "bright": {"_target_": "alignlab.rewards.brightness.Brightness", "weight": 2.0, "normalize": False}
    },
    "eval_rewards": {},
    "diversity": {"_target_": "alignlab.metrics.diversity.EmojiDistance"},
    "evaluation": {"prompts": 2, "images": 2, "final_images": 2, "batch": 64},
}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run that another process trains, for as long as this lasts."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        run = Run(folder, {"steps": 2})  # the lock is let go with it
        run.begin()
        os.write(begun, b"!")
        signal.pause()
    try:
        os.read(ready, 1)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(begun)


def made_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    gain: float = 1.0,
    seed: int = 0,
    evaluated: bool = True,
    held_out_falls: bool = False,
) -> Path:
    """A run that raised its reward from 1 to 1 + gain. `changes` are dotted keys of the configuration."""
    config = json.loads(json.dumps(CONFIG)) | {"seed": seed}
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
        if key == "kl_coeff":
            config["algo"]["kl_coeff"] = value
    rng = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = []
    for k, step in enumerate((0, 10, 20)):
        reward, other = 1 + gain * k / 2 + 0.01 * rng.normal(), (-0.5 * k if held_out_falls else 0.1 * k)
        line = {
            "step": step,
            "samples_seen": 16 * step,
            "eval/reward": reward,
            "eval/bright": reward / 2,
            "eval/held": other,
        }
        line |= {
            "eval/reward_std": 0.5,
            "eval/bright_std": 0.25,
            "eval/held_std": 1.0,
            "eval/lpips": 0.6 - 0.1 * k * gain,
            "seconds": 3.0 * (k > 0),
        }
        lines.append(
            line
            | {
                "reward_queries": 160 * (k > 0),
                "denoiser_forwards": 6400 * (k > 0),
                "denoiser_backwards": 320 * (k > 0),
            }
        )
        Image.new("RGB", (64, 64), (100 * k, 90, 40)).save(folder / "samples" / f"step_{step:06d}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ends = {"base": {"reward": 1.0, "lpips": 0.6}, "final": {"reward": 1 + gain, "lpips": 0.6 - 0.2 * gain}}
    about = {
        "reward_unit": "mean pixel",
        "diversity_metric": "lpips-emoji",
        "machine": {},
        "versions": {},
        "git": None,
    }
    (folder / "summary.json").write_text(json.dumps({**ends, **about}))
    if evaluated:
        write_evaluation(folder, gain, rng, list(config["prompts"]["prompts"]))
    return folder


def write_evaluation(folder: Path, gain: float, rng: np.random.Generator, prompts: list[str]) -> None:
    home = folder / "evaluation"
    home.mkdir()
    protocol = {"base": "abc", "sets": {"train": {"prompts": prompts, "images": 4}}, "resolution": [48, 48]}
    units = {"bright": "mean pixel", "held": "points"}
    (home / "evaluation.json").write_text(
        json.dumps({"protocol": protocol, "units": units, "drift": {"lpips_to_base": 0.1 * gain}})
    )
    base = np.random.default_rng(99).normal(0.5, 0.1, (3, len(prompts), 4))
    for name, shift in (("base", 0.0), ("images", gain / 2)):
        rows = ["set,prompt,image,bright,held"]
        for where, values in zip(("train", "unseen", "diversity"), base, strict=True):
            for prompt, line in zip(prompts, values, strict=True):
                for k, v in enumerate(line):
                    bright = v + shift + 0.01 * rng.normal() * (shift > 0)
                    rows.append(f"{where},{json.dumps(prompt)},{k},{bright:.6g},{-v:.6g}")
        (home / f"{name}.csv").write_text("\n".join(rows) + "\n")
        spread = [
            {"prompt": p, "lpips": 0.6 - 0.4 * shift + 0.01 * k, "vendi": 5 - 4 * shift}
            for k, p in enumerate(prompts)
        ]
        (home / f"{name}_diversity.json").write_text(json.dumps(spread))
