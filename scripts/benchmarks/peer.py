"""alignlab against TRL 0.23.1, the last release with trainers for DDPO and AlignProp.

Both sides are processes of their own, start on the same pipeline folder, and do the same work: images, batch, steps, guidance, eta, LoRA of rank 4
on the attention projections, optimiser updates, passes through the U-Net. docs/benchmarks.md says what differs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.items import Item, Setting, Sides, alternated

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


def result(command: Sequence[str], where: Path) -> dict[str, Any]:
    """The RESULT line of a process with one OpenMP thread.

    Raises:
        PeerError: if it fails or says nothing.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=where)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if done.returncode or line is None:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PeerError(f"{' '.join(map(str, command[:2]))} ended with code {done.returncode}: {last}")
    return json.loads(line.removeprefix("RESULT "))


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


def theirs(setting: Setting, script: str, *words: str, epochs: int, seed: int = 0) -> dict[str, Any]:
    """The peer's numbers, as ours are named."""
    name, *fixed = THEIRS[script]
    common = ["--model", pipeline(setting), "--epochs", str(epochs), "--seed", str(seed)]
    said = result([str(setting.peer_python), str(setting.peer / name), *common, *fixed, *words], setting.work)
    return _named(said)


def ours(setting: Setting, *words: str, epochs: int, seed: int = 0) -> dict[str, Any]:
    """alignlab's numbers."""
    common = [f"model.path_or_id={pipeline(setting)}", f"seed={seed}", "eval_sampler.steps=10"]
    return _named(result([sys.executable, str(OWN), "--epochs", str(epochs), *common, *SAME, *words], setting.work))


def _named(said: dict[str, Any]) -> dict[str, Any]:
    total = said.get("total_cpu_s", said["rollout_cpu_s"] + said["train_cpu_s"])
    return {
        "rollout": said["rollout_cpu_s"], "rollout_wall": said["rollout_s"], "train": said["train_cpu_s"], "train_wall": said["train_s"],
        "both": total, "both_wall": said["total_s"], "growth_mb": said["peak_rss_mb"] - said["rss_before_mb"], "rewards": said["reward_mean"],
    }  # fmt: skip


def _plain(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if name != "rewards"}


def ddpo(setting: Setting, number: int) -> Sides:
    """Three epochs of 8 images, two updates each: at the peer's micro-batch of 4, and at ours of all pairs."""
    return alternated(
        {
            "alignlab, its micro-batch": lambda: _plain(ours(setting, *DDPO, "lr=3e-4", "micro_batch=4", epochs=3)),
            "TRL": lambda: _plain(theirs(setting, "ddpo", epochs=3)),
            "alignlab": lambda: _plain(ours(setting, *DDPO, "lr=3e-4", f"micro_batch={BEST}", epochs=3)),
        },
        number,
    )


def draft(k: int) -> Any:
    """Four epochs of 4 images: with checkpoints as the peer has them, and without as is our default."""

    def measure(setting: Setting, number: int) -> Sides:
        words = (*DRAFT, f"algo.k={k}")
        return alternated(
            {
                "alignlab, checkpointing": lambda: _plain(ours(setting, *words, "policy.checkpointing=true", epochs=4)),
                "TRL": lambda: _plain(theirs(setting, "alignprop", "--last-k", str(k), epochs=4)),
                "alignlab": lambda: _plain(ours(setting, *words, epochs=4)),
            },
            number,
        )

    return measure


def learning(kind: str, epochs: int, *, own_words: Sequence[str], their_words: Sequence[str]) -> Any:
    """A run of each side at equal settings; the round's number is the seed. The gain is that of the last quarter of epochs over the first."""

    def learned(numbers: dict[str, Any]) -> dict[str, float]:
        rewards, late = numbers["rewards"], max(1, epochs // 4)
        return {"gain": sum(rewards[-late:]) / late - rewards[0], "cpu": numbers["both"], "wall": numbers["both_wall"]}

    def measure(setting: Setting, number: int) -> Sides:
        return alternated(
            {
                "alignlab": lambda: learned(ours(setting, *own_words, epochs=epochs, seed=number)),
                "TRL": lambda: learned(theirs(setting, kind, *their_words, epochs=epochs, seed=number)),
            },
            number,
        )

    return measure


LEARN_DDPO = learning("ddpo", 30, own_words=(*DDPO, f"micro_batch={BEST}", "lr=1e-3"), their_words=("--lr", "1e-3"))
LEARN_DRAFT = learning("alignprop", 40, own_words=(*DRAFT, "algo.k=1"), their_words=("--last-k", "1"))
ITEMS = (
    Item(name="peer/ddpo", measure=ddpo, needs_peer=True),
    Item(name="peer/draft1", measure=draft(1), needs_peer=True),
    Item(name="peer/draftN", measure=draft(10), needs_peer=True),
    Item(name="learning/draft1", measure=LEARN_DRAFT, rounds=3, needs_peer=True),
    Item(name="learning/ddpo", measure=LEARN_DDPO, rounds=3, needs_peer=True),
)
