"""Kills runs at random moments and goes on with them: do they end where an undisturbed run ends?

    python -m tests.harness.kill_and_resume --work FOLDER
    python -m tests.harness.kill_and_resume --work FOLDER --only 'ddpo*' --kills 5

Every objective, LoRA and full, on a tiny Stable Diffusion XL with random weights. A chain is one run folder:
its process is killed (SIGKILL) at a random moment of the phase that is still rarest, started again, killed
again, until it finishes; then it is compared with the undisturbed run bit by bit: weights, optimiser,
statistics, moving average, every line of metrics.jsonl, grids. Each phase is met in at least a sixth of
--kills; what a death hit is logged. Writes results/reliability/kills.json and prints its table.
"""

import argparse
import fnmatch
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from alignlab import train as loop
from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.rewards.compose import WeightedSum
from alignlab.runs.folder import Run
from alignlab.training import unfinished_epoch
from scripts.gpu.architectures import pipeline_folder

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = {
    "ddpo": ("algo=ddpo", "algo.updates_per_epoch=2", "kl_coeff=0.1"),
    "draftp": ("algo=draftp", "algo.k=2", "kl_coeff=0.5"),
    "draft": ("algo=draft", "algo.truncation=per_rollout"),
    "rwr": ("algo=rwr", "algo.inner_epochs=1"),
    "dpo": ("algo=dpo", "algo.beta=100", "algo.prompt_dropout=0.3"),
    "dpo_online": (
        "algo=dpo_online",
        "algo.beta=100",
        "algo.resample_every=2",
        "algo.ref_update_every=3",
        "prompts.per_prompt=2",
    ),
    "kto": ("algo=kto", "algo.beta=100", "algo.prompt_dropout=0.3"),
    "sft": ("algo=sft", "algo.prompt_dropout=0.3"),
}
OFFLINE = ("dpo", "kto", "sft")
"""They have data of their own."""
MANY = ("ddpo", "draftp")
"""Killed 30 times each way; the others 8 times."""
SIZES = """steps=10 samples_per_step=4 micro_batch=2 eval_every=2 checkpoint_every=1 ema=0.9 device=cpu
    sampler.steps=4 eval_sampler.steps=2 reward=brightness policy.lora.rank=2 prompts.prompts=[cat,dog,fish]
    prompts.unseen=[] prompts.per_prompt=1 evaluation.prompts=2 evaluation.images=2
    evaluation.final_images=1 model=sdxl model.variant=null lr=1e-3""".split()
PHASES = ("sampling", "scoring", "optimiser step", "checkpoint writing", "anything else")
TIMING = {"seconds", "images_per_second", "peak_memory_mb", "wall_seconds", "git"}
"""What two equal runs may differ in."""


def configuration(name: str, kind: str, home: Path) -> TrainConfig:
    """The checked configuration of a case."""
    words = [
        *SIZES,
        *OBJECTIVES[name],
        f"policy.full={str(kind == 'full').lower()}",
        f"model.path_or_id={home / 'tiny'}",
    ]
    words += [f"algo.data={preferences(home / 'pairs')}"] if name in OFFLINE else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(hydra.compose("train", words))


def preferences(folder: Path) -> Path:
    """A table of eight pairs of noisy images, red ones preferred."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = np.random.default_rng(0), []
    for k in range(8):
        for who, colour in {"winner": (200, 60, 40), "loser": (40, 60, 200)}.items():
            pixels = np.clip(np.array(colour) + draw.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{who}_{k}.png")
        rows.append({"prompt": ("cat", "dog")[k % 2], "winner": f"winner_{k}.png", "loser": f"loser_{k}.png"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


class Phase:
    """What a child is doing, readable after its death: a byte for the phase, and how often each was
    entered."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 2 * len(PHASES) + 1)
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES[:-1]}

    @property
    def now(self) -> str:
        return PHASES[self.shared[0]]

    def entered(self, phase: str) -> int:
        k = 1 + 2 * PHASES.index(phase)
        return int.from_bytes(self.shared[k : k + 2], "little")

    def clear(self) -> None:
        self.shared[:] = bytes(len(self.shared))
        self.shared[0] = len(PHASES) - 1

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        outside, k, began = self.shared[0], 1 + 2 * PHASES.index(phase), time.perf_counter()
        self.shared[k : k + 2] = (self.entered(phase) + 1).to_bytes(2, "little")
        self.shared[0] = PHASES.index(phase)
        try:
            yield
        finally:
            self.shared[0] = outside
            self.seconds[phase].append(time.perf_counter() - began)

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.of(phase):
                return function(*args, **kwargs)

        return inside

    def watched(self, run: Callable[[], Any]) -> Any:
        """`run` with its phases told."""
        step, score, save = torch.optim.AdamW.step, WeightedSum.submit, Run.save_checkpoint
        with (
            patch.object(unfinished_epoch, "rollout", self.around("sampling", unfinished_epoch.rollout)),
            patch.object(WeightedSum, "submit", self.around("scoring", score)),
            patch.object(torch.optim.AdamW, "step", self.around("optimiser step", step)),
            patch.object(Run, "save_checkpoint", self.around("checkpoint writing", save)),
        ):
            return run()


def started(c: TrainConfig, folder: Path, phase: Phase) -> int:
    """A child process that trains in `folder`; its output goes beside it. Returns its id."""
    phase.clear()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with folder.with_suffix(".log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        phase.watched(lambda: loop.train(c, folder))
        folder.with_suffix(".phases").write_text(json.dumps(phase.seconds))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finished(child: int) -> bool:
    """Whether it has ended by itself.

    Raises:
        SystemExit: if it failed.
    """
    gone, status = os.waitpid(child, os.WNOHANG)
    if gone and status:
        raise SystemExit(f"a child failed with status {status}; its log says why")
    return bool(gone)


def killed(child: int, phase: Phase, target: str, visit: int, delay: float) -> str | None:
    """Waits for the `visit`th time that the child is in `target` (or for nothing), `delay` seconds longer,
    and kills it. Returns the phase that it died in; None if it ended before."""
    while target != PHASES[-1] and not (phase.entered(target) >= visit and phase.now == target):
        if finished(child):
            return None
        time.sleep(5e-5)
    until = time.perf_counter() + delay
    while time.perf_counter() < until:
        if finished(child):
            return None
        time.sleep(min(1e-3, max(until - time.perf_counter(), 0)))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return phase.now if os.WIFSIGNALED(status) else None


def differences(one: Path, two: Path) -> Iterator[str]:
    """In what two finished runs differ, beside what they took."""
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMING}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (one, two)
    ]
    if lines[0] != lines[1]:
        yield f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines"
    summaries = [
        {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in TIMING}
        for run in (one, two)
    ]
    if summaries[0] != summaries[1]:
        yield "summary.json"
    names = [
        {
            str(p.relative_to(run))
            for p in run.rglob("*")
            if p.is_file() and not {"tensorboard", ".lock"} & {*p.parts}
        }
        for run in (one, two)
    ]
    yield from (f"{name} is in one only" for name in sorted(names[0] ^ names[1]))
    for name in sorted(names[0] & names[1]):
        a, b = one / name, two / name
        if name.endswith(".safetensors"):
            same = equal(load_file(a), load_file(b))
        elif name.endswith(".pt"):
            same = equal(*(torch.load(path, weights_only=True) for path in (a, b)))
        elif name.endswith(".png"):
            same = a.read_bytes() == b.read_bytes()
        else:
            continue
        if not same:
            yield name


def equal(a: Any, b: Any) -> bool:
    """Bit by bit, at any depth, times left out."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(equal(a[k], b[k]) for k in a if k not in TIMING)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def disturb(name: str, kind: str, kills: int, home: Path, rng: random.Random) -> dict[str, Any]:
    """Kills a case `kills` times, and compares every chain with the undisturbed run."""
    c, phase, there = configuration(name, kind, home), Phase(), home / f"{name}-{kind}"
    there.mkdir(parents=True)
    child = started(c, there / "undisturbed", phase)
    began = time.perf_counter()
    while not finished(child):
        time.sleep(0.01)
    whole = time.perf_counter() - began
    usual = json.loads((there / "undisturbed.phases").read_text())
    deaths: list[dict[str, Any]] = []
    chains, wrong = 0, []
    kinds = [
        phase for phase in PHASES if usual.get(phase, [1.0])
    ]  # DPO samples and scores in its evaluations only

    def rarest() -> tuple[int, str]:
        seen = Counter(death["phase"] for death in deaths)
        return min((seen[phase], phase) for phase in kinds)

    while len(deaths) < kills or rarest()[0] < kills // 6:
        folder, chains = there / f"chain_{chains}", chains + 1
        while True:
            more, choice = len(deaths) < kills or rarest()[0] < kills // 6, rarest()[1]
            delay = rng.random() * (float(np.median(usual[choice])) if choice in usual else whole / 2)
            child = started(c, folder, phase)
            died = killed(child, phase, choice, rng.randint(1, 8), delay if more else 1e9)
            if died is None:
                break
            steps = (
                len((folder / "metrics.jsonl").read_text().splitlines()) - 1
                if (folder / "metrics.jsonl").is_file()
                else -1
            )
            deaths.append({"case": f"{name} {kind}", "chain": chains - 1, "phase": died, "after_line": steps})
        wrong += [f"chain {chains - 1}: {what}" for what in differences(there / "undisturbed", folder)]
    return {"case": f"{name} {kind}", "kills": deaths, "chains": chains, "different": wrong}


def page(results: list[dict[str, Any]]) -> str:
    """The table of what was killed where."""
    head = [
        "| run | kills | " + " | ".join(PHASES) + " | chains | that differ |",
        "|---|" + "---|" * (len(PHASES) + 3),
    ]
    rows = []
    for r in results:
        died = Counter(death["phase"] for death in r["kills"])
        counts = " | ".join(str(died[phase]) for phase in PHASES)
        different = len({what.partition(":")[0] for what in r["different"]})
        rows.append(f"| {r['case']} | {len(r['kills'])} | {counts} | {r['chains']} | {different} |")
    return "\n".join([*head, *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="a pattern of cases, for example 'ddpo lora'")
    parser.add_argument(
        "--kills", type=int, help="of each case (default: 30 for ddpo and draftp, 8 for the others)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reliability")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline_folder("tiny", args.work, torch.device("cpu"))
    results, rng = [], random.Random(args.seed)
    for name in OBJECTIVES:
        for kind in ("lora", "full"):
            if fnmatch.fnmatch(f"{name} {kind}", args.only):
                kills = args.kills or (30 if name in MANY else 8)
                results.append(disturb(name, kind, kills, args.work, rng))
                print(page(results[-1:]).splitlines()[-1], *results[-1]["different"], sep="\n", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "kills.json").write_text(
        json.dumps({"seed": args.seed, "cases": results}, indent=1) + "\n"
    )
    print(page(results))
    return int(any(r["different"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
