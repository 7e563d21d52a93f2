"""alignlab against TRL 0.23.1, the last release with trainers for DDPO and AlignProp.

Both sides are processes of their own, start on the same pipeline folder, and do the same work: images, batch,
steps, guidance, eta, LoRA of rank 4 on the attention projections, optimiser updates, passes through the
U-Net. docs/benchmarks.md says what differs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.training.progress import high_water_mb
from benchmarks.items import Item, Measure, Setting, Sides

OWN = Path(__file__).with_name("own.py")
PROMPTS = "cat,dog,horse,monkey,rabbit,zebra,spider,bird"
"""Those of the peer's scripts."""
SAME = (
    f"prompts.prompts=[{PROMPTS}]",
    "prompts.template='{}'",
    "prompts.per_prompt=1",
    "prompts.unseen=[]",
    "model.lora_targets=[to_q,to_k,to_v,to_out.0]",
    "policy.lora.rank=4",
    "policy.lora.alpha=4",
    "sampler.guidance_scale=5",
    "sampler.eta=1",
    "sampler.steps=10",
    "reward=brightness",
)
DDPO = (
    "algo=ddpo",
    "algo.updates_per_epoch=2",
    "algo.statistics.per_prompt=false",
    "algo.clip_scaling=none",
    "samples_per_step=8",
)
DRAFT = ("algo=draft", "samples_per_step=4", "micro_batch=4", "lr=1e-3")
THEIRS = {
    "ddpo": (
        "run_ddpo.py",
        "--sample-batch",
        "8",
        "--train-batch",
        "4",
        "--steps",
        "10",
        "--reward",
        "brightness",
        "--lr",
        "3e-4",
    ),
    "alignprop": ("run_alignprop.py", "--train-batch", "4", "--steps", "10", "--lr", "1e-3"),
}
BEST = 16
"""Our micro-batch of (sample, step) pairs; larger ones are no faster and take more memory."""


class PeerError(RuntimeError):
    """The peer cannot be run; one sentence."""


def absent(setting: Setting) -> str | None:
    """Why the peer cannot be measured here; None if it can."""
    if not (setting.peer / "run_ddpo.py").is_file():
        return f"the peer's scripts are not in {setting.peer}; give their folder as --peer"
    if not setting.peer_python.is_file():
        return (
            f"the peer's Python is not at {setting.peer_python}; docs/benchmarks.md says how to make its "
            "environment (--peer-python)"
        )
    return None


def one_by_one(commands: Mapping[str, Sequence[str]], where: Path) -> dict[str, dict[str, Any]]:
    """Runs a process for each side, one after the other.

    Returns:
        {side: its RESULT line, with "peak_mb", the most resident memory that the system ever counted of it}.
        A process's own `ru_maxrss` would not
        do: Linux begins it with that of the process which started it.

    Raises:
        PeerError: if one fails or says nothing.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    found = {}
    for side, command in commands.items():
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command, stdout=said, stderr=errors, text=True, env=environment, cwd=where
            )
            peak = 0.0
            try:
                while process.poll() is None:
                    peak = max(peak, high_water_mb(process.pid))
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait()
            for file in (said, errors):
                file.seek(0)
            line = next((line for line in said if line.startswith("RESULT ")), None)
            if process.returncode or line is None:
                last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
                raise PeerError(
                    f"{' '.join(map(str, command[:2]))} ended with code {process.returncode}: {last}"
                )
            found[side] = {**json.loads(line.removeprefix("RESULT ")), "peak_mb": peak}
    return found


def versions(setting: Setting) -> str:
    """What the two sides are made of, in words."""
    code = (
        "from importlib.metadata import version as v; print(', '.join(f'{p} {v(p)}' for p in ('torch', "
        "'diffusers', 'peft', 'transformers')))"
    )
    told = [
        subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
        for python in (sys.executable, setting.peer_python)
    ]
    return f"alignlab has {told[0]}; TRL has {told[1]}"


def pipeline(setting: Setting) -> str:
    """The tiny pipeline, made once by the peer's script."""
    folder = setting.work / "tiny_sd"
    if not (folder / "model_index.json").is_file():
        command = [str(setting.peer_python), str(setting.peer / "make_tiny_sd.py"), "--out", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(
                f"make_tiny_sd.py ended with code {done.returncode}: "
                f"{(done.stderr.strip().splitlines() or [''])[-1]}"
            )
    return str(folder)


def theirs(
    setting: Setting, script: str, *words: str, epochs: int, seed: int = 0, threads: int = 1
) -> list[str]:
    """The peer's command."""
    name, *fixed = THEIRS[script]
    common = [
        "--model",
        pipeline(setting),
        "--epochs",
        str(epochs),
        "--seed",
        str(seed),
        "--threads",
        str(threads),
    ]
    return [str(setting.peer_python), str(setting.peer / name), *common, *fixed, *words]


def ours(setting: Setting, *words: str, epochs: int, seed: int = 0, threads: int = 1) -> list[str]:
    """alignlab's command."""
    common = [f"model.path_or_id={pipeline(setting)}", f"seed={seed}", "eval_sampler.steps=10"]
    return [
        sys.executable,
        str(OWN),
        "--epochs",
        str(epochs),
        "--threads",
        str(threads),
        *common,
        *SAME,
        *words,
    ]


def bare(setting: Setting, *words: str, epochs: int, threads: int = 1) -> list[str]:
    """The passes through the U-Net that the work needs, and nothing else."""
    return [*ours(setting, *words, epochs=epochs, threads=threads), "--bare"]


def measured(
    setting: Setting, commands: Mapping[str, Sequence[str]], number: int
) -> dict[str, dict[str, Any]]:
    """What the sides say, in the same words. Odd rounds begin with the last side."""
    said = one_by_one(dict(commands if number % 2 == 0 else reversed(commands.items())), setting.work)
    return {side: _named(said[side]) for side in commands}


def _named(said: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the processor and, as `_wall`, of the wall; MiB."""
    names = {
        "rollout": said["rollout_cpu_s"],
        "train": said["train_cpu_s"],
        "rollout_wall": said["rollout_s"],
        "train_wall": said["train_s"],
    }
    both = {f"both{clock}": names[f"rollout{clock}"] + names[f"train{clock}"] for clock in ("", "_wall")}
    return {
        **names,
        **both,
        "growth_mb": said["peak_mb"] - said["rss_before_mb"],
        "rewards": said["reward_mean"],
    }


def _plain(sides: dict[str, dict[str, Any]]) -> Sides:
    return {
        side: {name: value for name, value in its.items() if name != "rewards"} for side, its in sides.items()
    }


def ddpo(threads: int) -> Measure:
    """Three epochs of 8 images, two updates each: at the peer's micro-batch of 4, and at ours."""

    def measure(setting: Setting, number: int) -> Sides:
        same: Any = {"epochs": 3, "threads": threads}
        commands = {
            "alignlab, its micro-batch": ours(setting, *DDPO, "lr=3e-4", "micro_batch=4", **same),
            "TRL": theirs(setting, "ddpo", **same),
            "alignlab": ours(setting, *DDPO, "lr=3e-4", f"micro_batch={BEST}", **same),
            "bare, its micro-batch": bare(setting, *DDPO, "micro_batch=4", **same),
            "bare": bare(setting, *DDPO, f"micro_batch={BEST}", **same),
        }
        return _plain(measured(setting, commands, number))

    return measure


def draft(k: int, threads: int) -> Measure:
    """Four epochs of 4 images: with checkpoints as the peer has them, and without as is our default."""

    def measure(setting: Setting, number: int) -> Sides:
        words, same = (*DRAFT, f"algo.k={k}"), {"epochs": 4, "threads": threads}
        commands = {
            "alignlab, checkpointing": ours(setting, *words, "policy.checkpointing=true", **same),
            "TRL": theirs(setting, "alignprop", "--last-k", str(k), **same),
            "alignlab": ours(setting, *words, **same),
            "bare": bare(setting, *words, **same),
        }
        return _plain(measured(setting, commands, number))

    return measure


def learning(kind: str, epochs: int, *, own_words: Sequence[str], their_words: Sequence[str]) -> Measure:
    """A run of each side at equal settings; the round's number is the seed. `first` is the mean reward of the
    first epoch, `late` that of the last quarter of epochs."""

    def learned(its: dict[str, Any]) -> dict[str, float]:
        rewards, late = its["rewards"], max(1, epochs // 4)
        return {"first": rewards[0], "late": sum(rewards[-late:]) / late, "cpu": its["both"]}

    def measure(setting: Setting, number: int) -> Sides:
        commands = {
            "alignlab": ours(setting, *own_words, epochs=epochs, seed=number),
            "TRL": theirs(setting, kind, *their_words, epochs=epochs, seed=number),
        }
        return {side: learned(its) for side, its in measured(setting, commands, number).items()}

    return measure


LEARN_DDPO = learning(
    "ddpo", 30, own_words=(*DDPO, f"micro_batch={BEST}", "lr=1e-2"), their_words=("--lr", "1e-2")
)
LEARN_DRAFT = learning("alignprop", 40, own_words=(*DRAFT, "algo.k=1"), their_words=("--last-k", "1"))
ITEMS = (
    *(
        Item(
            name=f"peer/{name}, {threads} thread{'s' * (threads > 1)}",
            measure=measure(threads),
            needs_peer=True,
        )
        for threads in (1, 2)
        for name, measure in (
            ("ddpo", ddpo),
            ("draft1", lambda threads: draft(1, threads)),
            ("draftN", lambda threads: draft(10, threads)),
        )
    ),
    Item(name="learning/draft1", measure=LEARN_DRAFT, needs_peer=True),
    Item(name="learning/ddpo", measure=LEARN_DDPO, needs_peer=True),
)
