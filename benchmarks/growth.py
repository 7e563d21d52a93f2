"""How time and memory grow: with images, steps and prompts, with K; what a start and a report cost."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.planning.footprint import footprint
from alignlab.train import train_epoch
from alignlab.training.setup import Lab
from benchmarks.clock import seconds
from benchmarks.items import Item, Setting, Sides, alternated
from scripts.gpu.architectures import pipeline_folder

ROOT = Path(__file__).resolve().parents[1]
DECADES = (1, 10, 100)
"""The sizes of an axis over its smallest."""
PROMPTS = (10_000, 100_000, 1_000_000)


def configuration(*words: str) -> TrainConfig:
    import hydra

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(hydra.compose("train", ["device=cpu", "reward=brightness", *words]))


LABS: dict[str, tuple[Lab, TrainConfig]] = {}
"""By their words, made and warmed up in the first round."""


def epochs(setting: Setting, number: int, sizes: Sequence[Sequence[str]]) -> Sides:
    """An epoch of DDPO on a tiny pipeline at each size; prompts are encoded before."""
    folder = pipeline_folder("tiny", setting.work, torch.device("cpu"))
    common = (
        "algo.estimator=sf",
        "model=sdxl",
        "model.variant=null",
        f"model.path_or_id={folder}",
        "algo=ddpo",
        "micro_batch=4",
        "prompts.per_prompt=1",
        "prompts.prompts=[cat,dog,horse,monkey]",
        "prompts.unseen=[]",
    )
    works = {}
    for scale, words in zip(DECADES, sizes, strict=True):
        which = " ".join(words)
        if which not in LABS:
            c = configuration(*common, *words)
            LABS[which] = Lab.from_config(c), c
            train_epoch(*LABS[which], 1)
        works[str(scale)] = lambda made=LABS[which]: seconds(lambda: train_epoch(*made, 2 + number))
    return alternated(works, number)


def images(setting: Setting, number: int) -> Sides:
    """4, 40 and 400 images at 2 steps."""
    steps = ("sampler.steps=2", "eval_sampler.steps=2")
    return epochs(setting, number, [(f"samples_per_step={4 * scale}", *steps) for scale in DECADES])


def steps(setting: Setting, number: int) -> Sides:
    """2, 20 and 200 steps for 4 images."""
    return epochs(
        setting,
        number,
        [(f"sampler.steps={2 * k}", f"eval_sampler.steps={2 * k}", "samples_per_step=4") for k in DECADES],
    )


LOAD = """
import json, sys, time
import psutil
from alignlab.data.prompts import Prompts
Prompts(prompts=["a"]).draw(64, seed=0, epoch=0)  # the first time of everything
taken = lambda: psutil.Process().memory_info().rss / 2**20
before, wall, cpu = taken(), time.perf_counter(), time.process_time()
prompts = Prompts(file=sys.argv[1], unseen_share=0.1)
read = time.process_time() - cpu
drawn = prompts.draw(64, seed=0, epoch=1)
took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "mb": taken() - before}
print(json.dumps(took | {"read": read, "prompts": len(prompts.prompts)}))
"""


def prompts(setting: Setting, number: int) -> Sides:
    """Prompt files of 10,000 to 1,000,000 lines: read, split into seen and unseen, an epoch's 64 drawn."""
    sides: Sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in PROMPTS:
            file = Path(folder) / f"{count}.txt"
            file.write_text(
                "".join(
                    f"a picture of thing {k} in a place called {k * 7919 % count}\n" for k in range(count)
                )
            )
            quiet = os.environ | {
                "OPENBLAS_NUM_THREADS": "1"
            }  # its waiting threads spin, which would count as this work
            command = [sys.executable, "-c", LOAD, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=quiet)
            sides[str(count // PROMPTS[0])] = json.loads(done.stdout)
    return sides


def memory(setting: Setting, number: int) -> Sides:
    """Bytes of a dry run (alignlab.planning.footprint: exact, the code's own). `stacks` are what one more
    step adds to the peak of sampling (also in four micro-batches, whose latents are put together afterwards),
    and of DDPO's training, over the latents of a step of all images; `K` the peak of DRaFT-K's training
    beyond weights, with checkpointing."""
    images, short, long = 32, 10, 50
    peaks = {}
    for micro_batch in (32, 8):
        for n in (short, long):
            words = (
                f"samples_per_step={images}",
                f"micro_batch={micro_batch}",
                f"sampler.steps={n}",
                f"eval_sampler.steps={n}",
            )
            c = configuration("algo=ddpo", "prompts.per_prompt=4", *words)
            peaks[micro_batch, n] = footprint(c, train_epoch, device="cpu").peaks
    latents = images * 8 * 12 * 12 * 4  # bytes of a step's

    def stacks(micro_batch: int, *phases: str) -> float:
        least, most = (max(peaks[micro_batch, n][phase] for phase in phases) for n in (short, long))
        return (most - least) / (long - short) / latents

    training = ("loss", "backward", "optimizer step")
    sides: Sides = {
        "stacks": {
            "sampling": stacks(32, "sampling"),
            "parts": stacks(8, "sampling"),
            "training": stacks(32, *training),
        }
    }
    for k in (1, 5, 20):
        c = configuration(
            "algo=draft", f"algo.k={k}", "policy.checkpointing=true", "samples_per_step=16", "micro_batch=16"
        )
        seen = footprint(c, train_epoch, device="cpu")
        sides[f"K={k}"] = {"mb": (seen.training - seen.denoiser - seen.frozen) / 2**20}
    return sides


IMPORTS = """
import hydra
from alignlab.config.compose import CONF, checked
with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
    checked(hydra.compose("train", ["reward=brightness"]))
import alignlab.train, alignlab.training.setup, alignlab.models.sd
import diffusers.models, peft, transformers.models.clip
"""


def start(setting: Setting, number: int) -> Sides:
    """`alignlab.train` with a mistake: everything is imported but what a model is made of, composed and
    checked. `with the models' libraries`: a configuration composed and checked, and diffusers, peft and
    transformers too."""

    def refused() -> dict[str, float]:
        done, took = _child([sys.executable, "-m", "alignlab.train", "lr=-1"], ROOT)
        if done.returncode != 2 or "lr=-1" not in done.stderr:
            said = done.stderr[-200:]
            raise RuntimeError(
                "alignlab.train lr=-1 was to end with code 2 and a sentence; it ended with "
                f"{done.returncode}: {said}"
            )
        return took

    def imported() -> dict[str, float]:
        done, took = _child([sys.executable, "-c", IMPORTS], ROOT)
        if done.returncode:
            raise RuntimeError(
                f"the imports of a run ended with code {done.returncode}: {done.stderr.strip()[-200:]}"
            )
        return took

    return alternated({"alignlab": refused, "with the models' libraries": imported}, number)


def _child(
    command: Sequence[str], where: str | Path
) -> tuple[subprocess.CompletedProcess[str], dict[str, float]]:
    """A process, and its seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done: list[Any] = []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    took = seconds(
        lambda: done.append(
            subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment)
        )
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done[0], {"wall": took["wall"], "cpu": cpu}


def report(setting: Setting, number: int) -> Sides:
    """The page of 100 runs in 20 groups of 5 seeds, each evaluated."""
    from tests.runs_on_disk import made_run

    with tempfile.TemporaryDirectory() as folder:
        for group in range(20):
            for seed in range(5):
                made_run(
                    Path(folder) / f"{group:02}-{seed}",
                    {"kl_coeff": 0.01 * group},
                    gain=1 - 0.03 * group,
                    seed=seed,
                )
        done, took = _child(
            [sys.executable, "-m", "alignlab.report", f"runs={folder}/*", f"output_dir={folder}/report"],
            folder,
        )
        if done.returncode:
            raise RuntimeError(
                f"alignlab.report ended with code {done.returncode}: {done.stderr.strip()[-200:]}"
            )
    return {"alignlab": took}


ITEMS = (
    Item(name="growth/images", measure=images),
    Item(name="growth/steps", measure=steps),
    Item(name="growth/prompts", measure=prompts),
    Item(name="growth/memory", measure=memory, rounds=1),
    Item(name="growth/start", measure=start),
    Item(name="growth/report", measure=report),
)
