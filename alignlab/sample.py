"""python -m alignlab.sample run=runs/DIR prompt='a lion'

Draws pictures of a prompt: the base model's above, the tuned one's below, the same noise in each column.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from torch import Tensor

from alignlab.config.build import ConfigError, build, not_texts
from alignlab.config.checks import bench_problems, choice_problems
from alignlab.config.command import command
from alignlab.config.compose import opted_in, plain
from alignlab.config.record import record
from alignlab.files.safe_folder import RunError, refuse_led_away
from alignlab.files.writing import aside_of, refuse_unwritable, room_for
from alignlab.runs.folder import save_grid
from alignlab.runs.layout import run_folders
from alignlab.weights.load import TunedConfig, dialled, of_run, pictures, policy_of, tuned_problems


@dataclass
class SampleConfig(TunedConfig):
    """The keys of conf/sample.yaml."""

    prompt: Any = "a lion"
    """One, or a list."""
    n: int = 8
    """Images of each prompt. [images]"""
    seed: int = 0
    """Fixes the noises. [any whole number from 0]"""
    output: str | None = None
    """A .png file; null is sample.png in the run's folder, or here."""


ConfigStore.instance().store(name="sample_schema", node=SampleConfig)


def checked(cfg: DictConfig) -> SampleConfig:
    """The configuration as a record, `prompt` a list, with the run's model, sampler and precision unless they
    were asked for by name.

    Raises:
        ConfigError: with every problem that was found.
    """
    given = plain(cfg)
    prompts = [given["prompt"]] if isinstance(given["prompt"], str) else given["prompt"]
    c = record(SampleConfig, {**given, "prompt": prompts, "allow_targets": opted_in(given)})
    problems = [*tuned_problems(c)]
    if c.n < 1:
        problems.append(f"n={c.n} must be at least 1")
    if not (isinstance(c.prompt, list) and c.prompt and all(isinstance(prompt, str) for prompt in c.prompt)):
        remark = not_texts("prompt", c.prompt) if isinstance(c.prompt, list) and c.prompt else ""
        problems.append(f"prompt={c.prompt} must be a text, or a list of texts{remark}")
    if c.output is not None and not c.output.endswith(".png"):
        problems.append(f"output={c.output} must end in .png")
    folders = run_folders(c.run) if c.run is not None else []
    if len(folders) > 1:
        problems.append(f"run={c.run} names {len(folders)} runs; give one of them")
    if len(folders) == 1:
        try:
            c = of_run(c, folders[0], ("model", "eval_sampler"))
        except RunError as error:
            raise ConfigError("\n".join([*problems, str(error)])) from None
        problems += choice_problems(c, ("precision",))
    problems += bench_problems(asdict(c), opted_in(given), ("model", "eval_sampler"))
    if problems:
        raise ConfigError("\n".join(problems))
    return c


@command("sample", schema=SampleConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    path = Path(c.output or Path(c.run or ".") / "sample.png")
    refuse_led_away(path)
    try:
        refuse_unwritable(path.parent, "output", path.name)
        policy = policy_of(c.model, run=c.run, lora=c.lora, precision=c.precision, device=c.device)
        sampler = build(c.eval_sampler, scheduler=policy.family.scheduler).to(policy.device)
        shown = dialled(policy, sampler, lora_scale=c.lora_scale, annealing=c.annealing)
    except RunError as error:
        raise ConfigError(str(error)) from None
    rows: list[Tensor] = []
    for prompt in c.prompt:
        with policy.reference():
            rows.append(pictures(policy, sampler, prompt, n=c.n, seed=c.seed))
        rows.append(pictures(shown, sampler, prompt, n=c.n, seed=c.seed))
    try:
        with room_for(path, "output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside_of(path.resolve()) as aside:  # a link of the user's own is followed
                save_grid(torch.cat(rows), aside, columns=c.n)
    except RunError as error:
        raise ConfigError(str(error)) from None
    print(f"written: {path} (base model above, tuned below: {', '.join(c.prompt)})")


if __name__ == "__main__":
    main()
