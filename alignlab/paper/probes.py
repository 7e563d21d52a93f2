"""What a finished run's weights are asked afterwards, for a figure. The answers are kept in RUN/probes, so
that a figure can be drawn again where the weights are not: they are too large to publish, the answers are
kilobytes.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from alignlab.config.build import build
from alignlab.config.checks import bench_problems
from alignlab.config.compose import CONF
from alignlab.config.schema import TrainConfig, stored_record
from alignlab.data.prompts import thinned
from alignlab.files.safe_folder import RunError, refuse_links
from alignlab.files.writing import all_aside, refuse_unwritable, room_for
from alignlab.runs.folder import save_grid
from alignlab.training.evaluation import evaluate
from alignlab.training.setup import Bench, weighted_sum
from alignlab.weights.dials import scale_lora
from alignlab.weights.load import dialled, pictures, policy_of

ANSWER = "answer.json"
LORA_SCALES = (0.25, 0.5, 0.75)
ANNEALING = (0.5, 1.0, 2.0, 4.0)
SETS = ("animals_45", "other_animals", "objects", "animals_activities", "animals_colours")
"""Prompt sets of conf/prompts: what training drew, and what it never drew."""
PROMPTS_A_SET = 45
LION = "a lion"
VARIED = (
    "a cat",
    "a panda",
    "a rocket on a blue background",
    "a lion playing chess",
    "a strawberry",
    "a zebra on a green background",
)


def dials(bench: Bench, c: TrainConfig, folder: Path) -> list[dict[str, Any]]:
    """Reward, held-out rewards and diversity at scales of the LoRA and powers of annealed guidance, on the
    prompts and noises of the evaluations during training: scale 0 is their first line, scale 1 their last."""
    whole, out = bench.policy, []
    for name, values in (("lora_scale", LORA_SCALES), ("annealing", ANNEALING)):
        for value in values:
            turned, prompts = (
                replace(bench, policy=dialled(whole, bench.eval_sampler, **{name: value})),
                bench.prompts.prompts[: c.evaluation.prompts],
            )
            seen = evaluate(
                turned,
                prompts,
                images=c.evaluation.images,
                stream="eval",
                batch=c.evaluation.batch,
            )
            out.append({"dial": name, "value": value, **seen.numbers(bench.reward.combine)})
        scale_lora(whole, 1.0)
    return out


def generalisation(bench: Bench, c: TrainConfig, folder: Path) -> dict[str, Any]:
    """The training reward of the base and of the tuned model, the same noises, on prompts of several sets:
    {set: {prompts, base, tuned}}, rewards [prompts][images]."""
    bench, images, out = replace(bench, held_out=weighted_sum({})), c.evaluation.final_images, {}
    for name in SETS:
        every = build(yaml.safe_load((CONF / "prompts" / f"{name}.yaml").read_text())).prompts
        prompts = thinned(every, 2 if c.quick else PROMPTS_A_SET)
        tuned = evaluate(bench, prompts, images=images, stream="probe", batch=c.evaluation.batch)
        with bench.policy.reference():
            base = evaluate(bench, prompts, images=images, stream="probe", batch=c.evaluation.batch)
        rewards = {
            who: bench.reward.combine(seen.rewards).view(len(prompts), images)
            for who, seen in (("base", base), ("tuned", tuned))
        }
        out[name] = {
            "prompts": prompts,
            **{who: [[round(x, 4) for x in row] for row in r.tolist()] for who, r in rewards.items()},
        }
    return out


def pictures_of(prompts: Sequence[str], n: int) -> Callable[[Bench, TrainConfig, Path], dict[str, Any]]:
    """A probe: tuned.png and base.png, a row of `n` noises for each prompt."""

    def look(bench: Bench, c: TrainConfig, folder: Path) -> dict[str, Any]:
        for who, scope in (("tuned", nullcontext()), ("base", bench.policy.reference())):
            with scope:
                rows = [pictures(bench.policy, bench.eval_sampler, prompt, n=n) for prompt in prompts]
            save_grid(torch.cat(rows), folder / f"{who}.png", columns=n)
        return {"prompts": prompts, "images": n}

    return look


PROBES: dict[str, Callable[[Bench, TrainConfig, Path], Any]] = {
    "dials": dials,
    "generalisation": generalisation,
    "lion": pictures_of([LION], 8),
    "varied": pictures_of(VARIED, 4),
}


@torch.no_grad()
def probe(run: Path, name: str) -> bool:
    """Asks, unless it was asked before; whether there is an answer. There is none where the run's weights are
    not at hand."""
    folder = run / "probes" / name
    if (folder / ANSWER).is_file():
        return True
    if not any((run / "model").rglob("*.safetensors")):
        return False
    refuse_links(run, f"probes/{name}")
    c = stored_record(run)
    wrong = list(bench_problems(asdict(c), ()))
    if wrong:
        raise RunError(f"run={run}: {wrong[0]}")
    bench = Bench.of(c, policy_of(c.model, run=str(run), precision=c.precision))
    refuse_unwritable(folder, "home", ANSWER)
    with room_for(folder, "home"), all_aside(folder, last=ANSWER) as aside:
        (aside / ANSWER).write_text(
            json.dumps(PROBES[name](bench, c, aside), indent=1) + "\n", encoding="utf-8"
        )
    return True
