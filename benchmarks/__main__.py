"""alignlab against a peer, against the limit, and as it grows; all as ratios of alternating rounds. `make
bench`

    python -m benchmarks                                    # all, into results/benchmarks.md and .json
    python -m benchmarks --only 'limit/*' growth/start --rounds 2
    python -m benchmarks --peer FOLDER --peer-python FILE   # the peer's scripts, its environment's Python

Rounds are kept as they come: stopped, it goes on where it was; finished, the next call begins anew. Without
the peer its part is left out. docs/benchmarks.md says what is measured and how the peer's environment is
made.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from alignlab.runs.provenance import processor
from benchmarks import beside, growth, ideas, limit, peer
from benchmarks.clock import Onlooker
from benchmarks.items import Item, Setting
from benchmarks.page import page

ROOT = Path(__file__).resolve().parents[1]
KEPT = "rounds.json"
"""In the working folder: rounds of a call that is not finished."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names of items, such as 'peer/*' or growth/start",
    )
    parser.add_argument("--rounds", type=int, help="at most so many of each item, for a try")
    parser.add_argument("--list", action="store_true", help="names the items")
    parser.add_argument(
        "--peer",
        type=Path,
        default=ROOT.parent / "shared" / "peers" / "trl",
        help="folder of the peer's scripts",
    )
    parser.add_argument("--peer-python", type=Path, default=ROOT / "build" / "trl-venv" / "bin" / "python")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    return parser.parse_args()


def items() -> list[Item]:
    """All of them, the cheap ones first."""
    return [*limit.items(), *growth.ITEMS, *ideas.ITEMS, *beside.ITEMS, *peer.ITEMS]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["items"] if path.is_file() else {}


def versions(path: Path) -> str:
    """The versions of an earlier call."""
    return json.loads(path.read_text()).get("versions", "unknown") if path.is_file() else "unknown"


def write(path: Path, results: dict[str, Any]) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(path)


def rounded(sides: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Numbers to six digits."""
    return {side: {name: float(f"{value:.6g}") for name, value in its.items()} for side, its in sides.items()}


def measure(item: Item, setting: Setting, wanted: int, kept: dict[str, Any], path: Path) -> None:
    """The rounds that an item still lacks, written one by one."""
    rounds = kept.setdefault(item.name, {"rounds": []})["rounds"]
    while len(rounds) < wanted:
        began = time.perf_counter()
        with Onlooker() as onlooker:
            sides = item.measure(setting, len(rounds))
        rounds.append({"sides": rounded(sides), "others": round(onlooker.others, 2)})
        write(path, {"items": kept})
        print(
            f"{item.name}: round {len(rounds)} of {wanted}, {time.perf_counter() - began:.0f} s", flush=True
        )


def about() -> str:
    """The machine and the versions, in words."""
    return (
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}"
    )


def main() -> int:
    args = options()
    chosen = [item for item in items() if any(fnmatch(item.name, pattern) for pattern in args.only)]
    if args.list:
        print("\n".join(item.name for item in chosen))
        return 0
    if not chosen:
        sys.exit(f"error: no item is called {' or '.join(args.only)}; --list names them")
    if args.rounds is not None and args.rounds < 1:
        sys.exit(f"error: --rounds {args.rounds} measures nothing; give at least 1")
    for folder in (args.work, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        peer=args.peer.resolve(), peer_python=args.peer_python.absolute(), work=args.work.resolve()
    )
    missing = peer.absent(setting)
    if missing and any(item.needs_peer for item in chosen):
        print(f"left out: the comparison with TRL ({missing})")
    torch.set_num_threads(1)
    path, failed = args.work / KEPT, False
    kept = read(path)
    for item in chosen:
        if item.needs_peer and missing:
            continue
        try:
            measure(item, setting, min(args.rounds or item.rounds, item.rounds), kept, path)
        except peer.PeerError as error:
            print(f"error: {item.name}: {error}", file=sys.stderr)
            failed = True
    old = args.results / "benchmarks.json"
    finished = {item.name: {"about": about(), **kept.pop(item.name)} for item in chosen if item.name in kept}
    every = read(old) | {
        name: item for name, item in finished.items() if item["rounds"]
    }  # what failed at once keeps its old rounds
    results = {
        "versions": versions(old) if missing else peer.versions(setting),
        "items": {item.name: every[item.name] for item in items() if item.name in every},
    }
    write(old, results)
    (args.results / "benchmarks.md").write_text(page(results))
    if kept:  # of a longer list that was stopped
        write(path, {"items": kept})
    else:
        path.unlink(missing_ok=True)
    print(f"{args.results / 'benchmarks.md'} is written")
    return int(failed)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the process that is being measured is ended too
    sys.exit(main())
