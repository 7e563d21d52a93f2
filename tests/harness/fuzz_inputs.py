"""python -m tests.harness.fuzz_inputs --configs 600 --seed 0 --out results/reliability_inputs.json

Hostile inputs of every kind, each of which must be taken or end in sentences and exit code 2, with no
traceback and nothing written: mutated configurations of every command, files of prompts and pairs, damaged
pipelines, LoRAs, rewards, CLIPs and run folders. In this process, up to the point where the work would begin;
a sample in processes of their own, and a sample of what was taken trains for real. Prints what is broken and
a table, writes JSON; the exit code is 1 if anything is broken.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from alignlab import evaluate, export, report, sample, train
from tests.harness.fuzz import folders
from tests.harness.fuzz.configs import COMMANDS, command_lines, tried
from tests.harness.fuzz.files import SMALL, million, pairs_tried, png, prompts_tried
from tests.harness.fuzz.outcome import Outcome, attempt, command_line

ASSETS = Path(train.__file__).parent / "assets"
KINDS = (
    "configurations",
    "prompts",
    "pairs",
    "pipelines",
    "loras",
    "rewards",
    "clips",
    "runs",
    "processes",
    "training",
)
TINY = [w for w in SMALL if not w.startswith("output_dir")]


def prepared(home: Path, pipeline: str) -> dict[str, str]:
    """A finished run, its LoRA as a kohya file, and a table: what mutations start from."""
    words = [
        *TINY,
        f"model.path_or_id={pipeline}",
        "prompts.prompts=[cat,dog]",
        "prompts.unseen=[]",
        "evaluation.final_images=2",
        f"output_dir={home}/run",
    ]
    if command_line(train, words):
        raise SystemExit("the run that everything starts from failed")
    (home / "kohya").mkdir()
    command_line(export, [f"run={home}/run", f"output={home}/kohya/lora.safetensors"])
    shutil.copytree(home / "run" / "model", home / "lora")
    (home / "table.csv").write_text("caption,jpg_0,jpg_1,label_0\na,0.png,1.png,1\n")
    (home / "file").write_text("x")
    for name in ("0.png", "1.png"):
        (home / name).write_bytes(png(16, 16))
    return {
        "run": f"{home}/run",
        "table": f"{home}/table.csv",
        "file": f"{home}/file",
        "new": f"{home}/new",
        "huge": "x" * 5000,
    }


def fuzzed(
    kinds: list[str], home: Path, pipeline: str, *, seed: int, configs: int, sample_of: int
) -> Iterator[Outcome]:
    """Everything of the kinds that were asked for, in a desk of its own below `home`."""
    places, desk = prepared(home, pipeline), home / "desk"
    desk.mkdir()
    lines = list(command_lines(seed, configs, places))
    if "configurations" in kinds:
        for name, words in lines:
            yield tried(name, words, desk)
    if "prompts" in kinds:
        yield from prompts_tried(pipeline, desk)
    if "pairs" in kinds:
        yield from pairs_tried(pipeline, desk)
    copy, whole = (
        f"{desk}/copy",
        [*TINY, "prompts.prompts=[cat,dog]", "prompts.unseen=[]", "output_dir=written"],
    )
    plain = [word for word in whole if not word.startswith("reward=")]
    build = "train.Run.begin"  # everything is built, nothing is written
    source = ASSETS / pipeline if (ASSETS / pipeline).is_dir() else Path(pipeline)
    if "pipelines" in kinds:
        for name, damage in folders.pipeline_damages(source):
            yield from folders.damaged(
                "pipeline", source, name, damage, desk, [(train, build, [*whole, f"model.path_or_id={copy}"])]
            )
    if "loras" in kinds:
        look = [f"model.path_or_id={pipeline}", "n=1", "eval_sampler.steps=1", "device=cpu"]
        for kind, where, file, damages in (
            ("LoRA", home / "lora", "", folders.lora_damages("pytorch_lora_weights.safetensors")),
            ("kohya file", home / "kohya", "/lora.safetensors", folders.kohya_damages("lora.safetensors")),
        ):
            for name, damage in damages:
                jobs = [
                    (train, build, [*whole, f"model.path_or_id={pipeline}", f"init_from={copy}{file}"]),
                    (sample, "sample.save_grid", [*look, f"lora={copy}{file}"]),
                ]
                yield from folders.damaged(kind, where, name, damage, desk, jobs)
    if "rewards" in kinds:
        for kind in ("aesthetic", "preference"):
            where, its = (
                ASSETS / f"emoji_{kind}",
                [f"reward={kind}", f"reward.{kind}.path={copy}", f"model.path_or_id={pipeline}"],
            )
            for name, damage in folders.reward_damages(where):
                yield from folders.damaged(
                    "reward folder", where, f"{kind}: {name}", damage, desk, [(train, build, [*plain, *its])]
                )
    if "clips" in kinds:
        its = ["reward=clip", f"reward.clip.path={copy}", f"model.path_or_id={pipeline}"]
        for name, damage in folders.clip_damages(ASSETS / "emoji_clip"):
            yield from folders.damaged(
                "CLIP", ASSETS / "emoji_clip", name, damage, desk, [(train, build, [*plain, *its])]
            )
    if "runs" in kinds:
        jobs: list[Any] = [
            (train, build, [f"resume={copy}"]),
            (evaluate, "evaluate.run_evaluation", [f"run={copy}"]),
            (sample, "sample.save_grid", [f"run={copy}", "n=1"]),
            (export, None, [f"run={copy}", "output=written.safetensors"]),
            (report, None, [f"runs={copy}", "output_dir=written"]),
        ]
        for name, damage in folders.run_damages(yaml.safe_load((home / "run" / "config.yaml").read_text())):
            yield from folders.damaged("run folder", home / "run", name, damage, desk, jobs)
    yield from typed(kinds, lines, whole, pipeline, desk, seed=seed, sample_of=sample_of)


def typed(
    kinds: list[str],
    lines: list[tuple[str, list[str]]],
    whole: list[str],
    pipeline: str,
    desk: Path,
    *,
    seed: int,
    sample_of: int,
) -> Iterator[Outcome]:
    """Some of the command lines, as a user types them: those that are refused, and those that train."""
    draw = random.Random(seed)
    if "processes" in kinds:
        known = {
            (name, tuple(words)): tried(name, words, desk)
            for name, words in draw.sample(lines, min(len(lines), 4 * sample_of))
        }
        refused = [key for key, outcome in known.items() if outcome.verdict == "refused"][:sample_of]
        for name, typed in refused:
            yield process(name, list(typed), desk, known[name, typed].said)
    if "training" in kinds:
        for name, words in draw.sample(lines, len(lines)):
            if (
                name == "train"
                and sample_of
                and "-m" not in words
                and tried(name, words, desk).verdict == "valid"
            ):
                sample_of -= 1
                yield trained(words, whole, pipeline, desk)


def process(name: str, words: list[str], desk: Path, said: str) -> Outcome:
    """The same command line as a user types it; it must say the same."""

    def call() -> int:
        done = subprocess.run(
            [sys.executable, "-m", COMMANDS[name][0].__name__, *words],
            cwd=desk,
            capture_output=True,
            text=True,
            timeout=120,
        )
        print(done.stderr, file=sys.stderr, end="")
        return done.returncode

    outcome = attempt("process of its own", f"{name}: {' '.join(words)[:300]}", call, desk, limit=150)
    if outcome.verdict == "refused" and outcome.said != said:
        return Outcome(
            outcome.kind,
            outcome.case,
            "broken",
            f"said {outcome.said!r}, and in process {said!r}",
            outcome.seconds,
        )
    return outcome


def trained(words: list[str], small: list[str], pipeline: str, desk: Path) -> Outcome:
    """What the check took, trained in the smallest size (keys that it set stay as they are, but for
    sizes)."""
    sizes = [word for word in small if not word.startswith(("reward=", "prompts."))]
    sizes += (
        []
        if any("path_or_id" in word or word.startswith(("model=", "~model")) for word in words)
        else [f"model.path_or_id={pipeline}"]
    )
    typed = [
        *(word for word in words if word.partition("=")[0] not in {size.partition("=")[0] for size in sizes}),
        *sizes,
    ]
    outcome = attempt(
        "training", " ".join(words)[:300], lambda: command_line(train, typed), desk, limit=180, writes=True
    )
    for new in ("written", "outputs", "multirun", "runs"):
        shutil.rmtree(desk / new, ignore_errors=True)
    return outcome


def table(found: list[Outcome]) -> str:
    """Counts by kind, as Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    for outcome in found:
        counts[outcome.kind][outcome.verdict] += 1
        seconds[outcome.kind] += outcome.seconds
    rows = [
        "| kind | inputs | taken | refused in sentences | broken | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for kind, its in counts.items():
        rows.append(
            f"| {kind} | {its.total()} | {its['valid']} | {its['refused']} | {its['broken']} | "
            f"{seconds[kind]:.0f} |"
        )
    return "\n".join(rows)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--configs", type=int, default=600)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--sample", type=int, default=12, help="of real processes, and of real runs")
    arguments.add_argument("--kinds", default=",".join(KINDS))
    arguments.add_argument("--pipeline", default="emoji", help="a Stable Diffusion pipeline folder, or emoji")
    arguments.add_argument("--out", type=Path)
    asked = arguments.parse_args()
    warnings.simplefilter("ignore")
    found, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        with contextlib.redirect_stdout(sys.stderr):
            for outcome in fuzzed(
                asked.kinds.split(","),
                home,
                asked.pipeline,
                seed=asked.seed,
                configs=asked.configs,
                sample_of=asked.sample,
            ):
                found.append(outcome)
                if outcome.verdict == "broken":
                    print(f"broken  {outcome.kind}  {outcome.case}\n        {outcome.said}", flush=True)
        many = million(home) if "prompts" in asked.kinds else {}
        about = {
            "seed": asked.seed,
            "seconds": time.perf_counter() - began,
            "a million prompts": many,
            "outcomes": [vars(o) for o in found],
        }
        text = json.dumps(about, indent=1).replace(str(home), "HOME")
    if asked.out:
        asked.out.write_text(text + "\n")
    print(table(found))
    print("\n".join(f"{key}: {value:.1f}" for key, value in many.items()))
    return 1 if any(outcome.verdict == "broken" for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
