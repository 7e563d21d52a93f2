"""alignlab against TRL 0.23.1, the last release with trainers for DDPO and AlignProp.

Both sides are processes of their own, start on the same pipeline folder, and do the same work: images, batch, steps, guidance, eta, LoRA of rank 4
on the attention projections, optimiser updates, passes through the U-Net. docs/benchmarks.md says what differs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.items import Item, Measure, Setting, Sides

OWN = Path(__file__).with_name("own.py")
PROMPTS = "cat,dog,horse,monkey,rabbit,zebra,spider,bird"
"""Those of the peer's scripts."""
SAME = (
    f"prompts.prompts=[{PROMPTS}]", "prompts.template='{}'", "prompts.per_prompt=1", "prompts.unseen=[]", "model.lora_targets=[to_q,to_k,to_v,to_out.0]",
    "policy.lora.rank=4", "policy.lora.alpha=4", "sampler.guidance_scale=5", "sampler.eta=1", "sampler.steps=10", "reward=brightness",
)  # fmt: skip
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
        return f"the peer's Python is not at {setting.peer_python}; docs/benchmarks.md says how to make its environment (--peer-python)"
    return None


def turns(commands: Mapping[str, Sequence[str]], where: Path, length: float = 0.25) -> dict[str, dict[str, Any]]:
    """Runs a process for each side, one at a time, in turns of `length` seconds (SIGSTOP and SIGCONT), so that whatever else the machine does
    falls on all sides alike.

    Returns:
        {side: its RESULT line, and "own_wall", the seconds of its turns}. CPU seconds are the process's own; wall seconds that it took itself
        count the others' turns too.

    Raises:
        PeerError: if one fails or says nothing.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    wall = dict.fromkeys(commands, 0.0)
    with ExitStack() as stack:
        said = {side: stack.enter_context(tempfile.TemporaryFile("w+")) for side in commands}
        errors = {side: stack.enter_context(tempfile.TemporaryFile("w+")) for side in commands}
        processes: dict[str, subprocess.Popen[str]] = {}
        try:
            waiting = list(commands)
            while waiting:
                for side in list(waiting):
                    began = time.perf_counter()
                    if side not in processes:
                        processes[side] = subprocess.Popen(
                            commands[side], stdout=said[side], stderr=errors[side], text=True, env=environment, cwd=where
                        )
                    else:
                        processes[side].send_signal(signal.SIGCONT)
                    try:
                        processes[side].wait(length if len(waiting) > 1 else None)
                        waiting.remove(side)
                    except subprocess.TimeoutExpired:
                        processes[side].send_signal(signal.SIGSTOP)
                    wall[side] += time.perf_counter() - began
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
        found = {}
        for side, process in processes.items():
            for file in (said[side], errors[side]):
                file.seek(0)
            line = next((line for line in said[side] if line.startswith("RESULT ")), None)
            if process.returncode or line is None:
                last = (errors[side].read().strip().splitlines() or ["it said nothing"])[-1]
                raise PeerError(f"{' '.join(map(str, commands[side][:2]))} ended with code {process.returncode}: {last}")
            found[side] = {**json.loads(line.removeprefix("RESULT ")), "own_wall": wall[side]}
    return found


def pipeline(setting: Setting) -> str:
    """The tiny pipeline, made once by the peer's script."""
    folder = setting.work / "tiny_sd"
    if not (folder / "model_index.json").is_file():
        command = [str(setting.peer_python), str(setting.peer / "make_tiny_sd.py"), "--out", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(
                f"make_tiny_sd.py ended with code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"
            )
    return str(folder)


def theirs(setting: Setting, script: str, *words: str, epochs: int, seed: int = 0, threads: int = 1) -> list[str]:
    """The peer's command."""
    name, *fixed = THEIRS[script]
    common = ["--model", pipeline(setting), "--epochs", str(epochs), "--seed", str(seed), "--threads", str(threads)]
    return [str(setting.peer_python), str(setting.peer / name), *common, *fixed, *words]


def ours(setting: Setting, *words: str, epochs: int, seed: int = 0, threads: int = 1) -> list[str]:
    """alignlab's command."""
    common = [f"model.path_or_id={pipeline(setting)}", f"seed={seed}", "eval_sampler.steps=10"]
    return [sys.executable, str(OWN), "--epochs", str(epochs), "--threads", str(threads), *common, *SAME, *words]


def measured(setting: Setting, commands: Mapping[str, Sequence[str]], number: int) -> dict[str, dict[str, Any]]:
    """What the sides say, in the same words. Odd rounds begin with the last side."""
    said = turns(dict(commands if number % 2 == 0 else reversed(commands.items())), setting.work)
    return {side: _named(said[side]) for side in commands}


def _named(said: dict[str, Any]) -> dict[str, Any]:
    total = said.get("total_cpu_s", said["rollout_cpu_s"] + said["train_cpu_s"])
    growth = said["peak_rss_mb"] - said["rss_before_mb"]
    names = {"rollout": said["rollout_cpu_s"], "train": said["train_cpu_s"], "both": total, "process_wall": said["own_wall"]}
    return {**names, "growth_mb": growth, "rewards": said["reward_mean"]}


def _plain(sides: dict[str, dict[str, Any]]) -> Sides:
    return {side: {name: value for name, value in its.items() if name != "rewards"} for side, its in sides.items()}


def ddpo(threads: int) -> Measure:
    """Three epochs of 8 images, two updates each: at the peer's micro-batch of 4, and at ours."""

    def measure(setting: Setting, number: int) -> Sides:
        same: Any = {"epochs": 3, "threads": threads}
        commands = {
            "alignlab, its micro-batch": ours(setting, *DDPO, "lr=3e-4", "micro_batch=4", **same),
            "TRL": theirs(setting, "ddpo", **same),
            "alignlab": ours(setting, *DDPO, "lr=3e-4", f"micro_batch={BEST}", **same),
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
        }
        return _plain(measured(setting, commands, number))

    return measure


def learning(kind: str, epochs: int, *, own_words: Sequence[str], their_words: Sequence[str]) -> Measure:
    """A run of each side at equal settings; the round's number is the seed. The gain is that of the last quarter of epochs over the first."""

    def learned(its: dict[str, Any]) -> dict[str, float]:
        rewards, late = its["rewards"], max(1, epochs // 4)
        return {"gain": sum(rewards[-late:]) / late - rewards[0], "cpu": its["both"]}

    def measure(setting: Setting, number: int) -> Sides:
        commands = {
            "alignlab": ours(setting, *own_words, epochs=epochs, seed=number),
            "TRL": theirs(setting, kind, *their_words, epochs=epochs, seed=number),
        }
        return {side: learned(its) for side, its in measured(setting, commands, number).items()}

    return measure


LEARN_DDPO = learning("ddpo", 30, own_words=(*DDPO, f"micro_batch={BEST}", "lr=1e-3"), their_words=("--lr", "1e-3"))
LEARN_DRAFT = learning("alignprop", 40, own_words=(*DRAFT, "algo.k=1"), their_words=("--last-k", "1"))
ITEMS = (
    *(
        Item(name=f"peer/{name}, {threads} thread{'s' * (threads > 1)}", measure=measure(threads), needs_peer=True)
        for threads in (1, 2)
        for name, measure in (
            ("ddpo", ddpo),
            ("draft1", lambda threads: draft(1, threads)),
            ("draftN", lambda threads: draft(10, threads)),
        )
    ),
    Item(name="learning/draft1", measure=LEARN_DRAFT, rounds=3, needs_peer=True),
    Item(name="learning/ddpo", measure=LEARN_DDPO, rounds=3, needs_peer=True),
)
