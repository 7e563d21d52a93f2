"""What a GPU makes of alignlab: images and updates a second, time inside the U-Net, utilisation, memory of
DRaFT-K. `make gpu-check`

    python scripts/gpu_check.py        # Stable Diffusion 1.5 and XL in bf16, into results/gpu/DEVICE.*
    python scripts/gpu_check.py --sizes sd15 --only 'ddpo*' 'memory/*' --budget-seconds 600
    python scripts/gpu_check.py --sizes tiny --device cpu --results runs/gpu      # without a GPU, a minute

Weights are random, so that nothing is fetched; pipelines are kept in build/gpu_check. Each size is measured
in a process of its own. What does not fit is recorded as such and the list goes on; what is measured is not
measured again.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu.page import page, peak_tflops  # noqa: E402

DONE = ("measured", "out of memory")
STARTED = "started"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=("tiny", "sd15", "sdxl"), default=["sd15", "sdxl"])
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="names of items, such as draft, 'ddpo*', 'memory/*'",
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=float("inf"),
        help="no longer than this; the next call goes on",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="bf16; fp32 on a CPU")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--pipelines", type=Path, default=ROOT / "build" / "gpu_check")
    parser.add_argument(
        "--measure", help=argparse.SUPPRESS
    )  # in a process of its own: this size, into that file
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    return args


def unfit(args: argparse.Namespace) -> str | None:
    """Why this cannot be measured here."""
    if args.device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; --sizes tiny --device cpu tries this without one"
    major, minor = torch.cuda.get_device_capability()
    if args.precision == "bf16" and major < 8:
        return (
            f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no bfloat16 "
            "arithmetic; set --precision fp16"
        )
    return None


def read(path: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The device, and what was measured before on it in this precision."""
    cuda = args.device == "cuda"
    fresh = {
        "device": name,
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "peak_tflops": peak_tflops(name) if args.precision != "fp32" else None,
        "precision": args.precision,
        "command": (
            f"python scripts/gpu_check.py --sizes {' '.join(args.sizes)} --device {args.device} --precision "
            f"{args.precision}"
        ),
        "items": {},
    }
    return fresh | {"items": json.loads(path.read_text())["items"]} if path.is_file() else fresh


def write(path: Path, results: dict[str, Any]) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(path)


def wanted(args: argparse.Namespace, size: str, results: dict[str, Any]) -> list[Any]:
    """Items of a size that are asked for and not there yet."""
    from gpu.items import items_of

    asked = [item for item in items_of(size) if any(fnmatch(item.name, pattern) for pattern in args.only)]
    return [
        item for item in asked if results["items"].get(item.key, {}).get("status") not in (*DONE, "failed")
    ]


def measure_size(args: argparse.Namespace) -> None:
    """The process that measures one size: writes after each item, and what it has started before."""
    from gpu.architectures import pipeline_folder
    from gpu.items import Workbench

    from alignlab.runs.provenance import provenance

    results = json.loads(args.into.read_text())
    items = wanted(args, args.measure, results)
    if not items:
        return
    device = torch.device(args.device)
    bench = Workbench(
        args.measure,
        pipeline_folder(args.measure, args.pipelines, device),
        device=args.device,
        precision=args.precision,
    )
    about = provenance(device)
    for item in items:
        entry = {
            "status": STARTED,
            "torch": torch.__version__,
            "commit": about["git"] and about["git"]["commit"],
        }
        results["items"][item.key] = entry
        write(args.into, results)
        try:
            entry |= bench.measure(item) | {"status": "measured"}
        except torch.OutOfMemoryError:
            entry["status"] = "out of memory"
        except Exception as error:  # whatever it is, the others are measured
            entry |= {
                "status": "failed",
                "why": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            }
        write(args.into, results)
        print(
            f"{item.key}: {entry['status']}",
            entry.get("why") or f"{entry.get('seconds', 0):.1f} s",
            flush=True,
        )
        bench.tidy()


def run_sizes(args: argparse.Namespace, path: Path, words: list[str]) -> None:
    """A process for each size; another one where it died, without the item that it died of; none when the
    time is up."""
    until = time.monotonic() + args.budget_seconds
    for size in args.sizes:
        again = True
        while again and time.monotonic() < until:
            left = until - time.monotonic()
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                *words,
                "--measure",
                size,
                "--into",
                str(path),
            ]
            try:
                code = subprocess.run(command, timeout=left if left < float("inf") else None).returncode
            except subprocess.TimeoutExpired:
                code = None
            results = json.loads(path.read_text())
            died = [key for key, item in results["items"].items() if item["status"] == STARTED]
            for key in died:
                if code is None:
                    del results["items"][key]  # stopped by the budget: the next call measures it
                else:
                    results["items"][key] |= {
                        "status": "failed",
                        "why": f"its process ended with code {code}",
                    }
            write(path, results)
            again = bool(died) and code is not None
            if code and not died:
                print(
                    f"error: {size} cannot be measured, its process ended with code {code}; what it said is "
                    "above",
                    file=sys.stderr,
                )


def main() -> None:
    args = options()
    if args.measure:
        return measure_size(args)
    problem = unfit(args)
    if problem:
        sys.exit(f"error: {problem}")
    args.results.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    stem = name if args.precision == "bf16" else f"{name} {args.precision}"
    path = args.results / f"{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}.json"
    results = read(path, name, args)
    results["items"] = {
        key: item for key, item in results["items"].items() if item["status"] in DONE
    }  # what failed is tried again
    write(path, results)
    run_sizes(args, path, sys.argv[1:])
    results = json.loads(path.read_text())
    path.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
