"""Trains every algorithm for two tiny epochs on the embedded model, and tells what came out to the bit.

    python -m tests.golden                       compares with tests/stored/golden.json
    python -m tests.golden --against COMMIT      trains in a checkout of COMMIT too, and compares the two
    python -m tests.golden --write               makes the present numbers the stored ones

A change of the house must leave every number as it is. Between two commits on one machine that holds to the
bit. The stored file holds the bits of some kinds of processors, told apart by their model and by what a few
of torch's kernels compute there, and the metrics themselves, which other processors must meet to 1 %. This
file starts commands only: it does not know in which module anything lies.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "stored" / "golden.json"
COMMON = (
    "quick=true samples_per_step=4 micro_batch=2 sampler.steps=3 eval_sampler.steps=2 prompts.unseen=[] "
    "device=cpu "
    "prompts.prompts=[cat,dog] prompts.per_prompt=2 policy.lora.rank=2 evaluation.prompts=1"
).split()
RUNS = {
    "rwr": ["algo=rwr", "reward=jpeg_compressibility"],
    "ddpo_is": ["algo=ddpo", "kl_coeff=0.1", "reward=[clip_blue,jpeg_compressibility]", "combine=gdpo"],
    "ddpo_sf": ["algo=ddpo", "algo.estimator=sf", "reward=emoji_aesthetic"],
    "draft": ["algo=draft", "algo.k=2", "reward=clip_blue"],
    "draft_lv": ["algo=draft", "algo.lv_samples=2", "reward=emoji_preference"],
    "draft_full": ["algo=draft", "policy.full=true", "lr=1e-5", "ema=0.5"],
    "draftp": ["algo=draftp", "kl_coeff=0.25", "lr_schedule=cosine"],
    "dpo": ["algo=dpo", "algo.data={data}", "algo.pairs=4"],
    "kto": ["algo=kto", "algo.data={data}", "algo.images=4"],
    "sft": ["algo=sft", "algo.data={data}", "algo.images=4"],
    "dpo_online": ["algo=dpo_online", "reward=emoji_preference"],
}
"""The overrides of each algorithm's run."""
MOODS = {"seconds", "images_per_second", "peak_memory_mb"}
"""What two equal runs may differ in."""
TRAIN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import alignlab.train
for run in sys.argv[1].split("\\n"):
    sys.argv = ["train", *run.split("\\t")]
    alignlab.train.main()
"""


def trained(tree: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """The results of the named runs, made in `folder` by the package that lies in `tree`."""
    data = _pairs(folder / "data")
    commands = [
        "\t".join([*COMMON, *RUNS[name], f"output_dir={folder / name}"]).format(data=data) for name in names
    ]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = warm.run(
        [sys.executable, "-c", TRAIN, "\n".join(commands)],
        cwd=folder,
        env=environment,
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(f"the runs ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return {name: _result(folder / name) for name in names}


def _result(run: Path) -> dict[str, Any]:
    """Metrics, and digests of metrics, trained weights and pictures."""
    from safetensors import safe_open

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in sorted(line.items()) if key not in MOODS} for line in lines]
    weights, pictures = hashlib.sha256(), hashlib.sha256()
    with safe_open(sorted((run / "checkpoints").glob("step_*"))[-1] / "policy.safetensors", "np") as file:
        for key in sorted(file.keys()):
            weights.update(key.encode() + file.get_tensor(key).tobytes())
    for path in sorted((run / "samples").glob("*.png")):
        pictures.update(path.read_bytes())
    digests = {
        "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "samples": pictures.hexdigest()[:16],
    }
    return {"metrics": metrics, "digests": digests}


def _pairs(folder: Path) -> Path:
    """A table of pairs of pictures that are the same everywhere."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for k in range(6):
        names = {}
        for kind, colour in {"winner": (200, 60, 40), "loser": (40, 60, 200)}.items():
            steps = np.add.outer(np.arange(48) * (k + 1), np.arange(48) * 3) % 50
            pixels = np.clip(np.array(colour) + steps[..., None] - 25, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}_{k}.png")
            names[kind] = f"{kind}_{k}.png"
        table.append({"prompt": ("cat", "dog")[k % 2], **names})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder / "pairs.jsonl"


def processor() -> str:
    """What tells kinds of processors and versions of torch apart: the model, and the bits that a few kernels
    compute on it. (Two models gave the same bits here, and other ones in larger products.)"""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    x, w = torch.randn(4, 16, 12, 12), torch.randn(24, 16, 3, 3)
    heads = torch.randn(3, 2, 4, 40, 16)
    seen = [F.conv2d(x, w, padding=1), F.conv2d(x.to(memory_format=torch.channels_last), w, padding=1)]
    seen += [
        torch.randn(50, 64) @ torch.randn(64, 96),
        F.scaled_dot_product_attention(*heads),
        F.silu(x),
        x.softmax(1),
    ]
    bits = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in seen)).hexdigest()[:12]
    return f"torch {torch.__version__.partition('+')[0]}, {_model()}, kernels {bits}"


def _model() -> str:
    """The processor's maker, family and model, as Linux names them."""
    told = Path("/proc/cpuinfo")
    pairs = [line.partition(":") for line in told.read_text().splitlines()] if told.is_file() else []
    about = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    names = [about.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")]
    return " ".join(filter(None, names)) or platform.processor() or platform.machine()


def differences(then: dict[str, Any], now: dict[str, Any], *, bits: bool) -> Iterator[str]:
    """One sentence for each run that differs: to the bit, or by more than 1 % in a metric."""
    for name in then:
        if bits:
            for kind, digest in then[name]["digests"].items():
                if now[name]["digests"][kind] != digest:
                    where = _apart(then[name].get("metrics"), now[name]["metrics"], 0.0)
                    yield f"{name}: the {kind} have other bits" + (f"; {where}" if where else "")
        else:
            where = _apart(then[name]["metrics"], now[name]["metrics"], 0.01)
            if where:
                yield f"{name}: {where}"


def _apart(then: list[dict[str, Any]] | None, now: list[dict[str, Any]], tolerance: float) -> str | None:
    """The first metric that differs by more than `tolerance` of its size."""
    for old, new in zip(then or [], now, strict=False):
        if old.keys() != new.keys():
            return f"step {old['step']} has other keys: {sorted(old.keys() ^ new.keys())}"
        for key, value in old.items():
            same = value == new[key]
            if not same and value is not None and new[key] is not None:
                same = math.isclose(value, new[key], rel_tol=tolerance, abs_tol=tolerance * 0.1)
            if not same:
                return f"{key} of step {old['step']} is {new[key]}, and was {value}"
    return None


def main() -> int:
    """Runs the net from the command line; 1 if something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--against", metavar="COMMIT", help="train in a checkout of this commit too, and compare to the bit"
    )
    parser.add_argument("--write", action="store_true", help="store the present numbers")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        now = trained(ROOT, Path(home) / "now", asked.only)
        if asked.against:
            tree = Path(home) / "tree"
            subprocess.run(
                ["git", "worktree", "add", "-q", "--detach", tree, asked.against], cwd=ROOT, check=True
            )
            try:
                apart = list(differences(trained(tree, Path(home) / "then", asked.only), now, bits=True))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
        elif asked.write:
            write(now)
            apart = []
        else:
            apart = list(compared(now))
    print("\n".join(apart) or f"{len(asked.only)} runs: no difference")
    return bool(apart)


def compared(now: dict[str, Any]) -> Iterator[str]:
    """The differences from the stored file: to the bit if it knows this kind of processor, else to 1 %."""
    stored = json.loads(STORED.read_text())
    bits = stored["digests"].get(processor())
    if bits is not None:
        then = {name: {"metrics": stored["metrics"][name], "digests": bits[name]} for name in now}
        yield from differences(then, now, bits=True)
    else:
        then = {name: {"metrics": stored["metrics"][name]} for name in now}
        yield from differences(then, now, bits=False)


def write(now: dict[str, Any]) -> None:
    """Stores the numbers, and the bits of this kind of processor. Bits of other kinds are dropped if a metric
    has changed."""
    stored = json.loads(STORED.read_text()) if STORED.is_file() else {"metrics": {}, "digests": {}}
    metrics = {name: result["metrics"] for name, result in now.items()}
    same = not list(
        differences({name: {"metrics": old} for name, old in stored["metrics"].items()}, now, bits=False)
    )
    kept = stored["digests"] if stored["metrics"] and same else {}
    digests = {**kept, processor(): {name: result["digests"] for name, result in now.items()}}
    STORED.write_text(json.dumps({"metrics": metrics, "digests": digests}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
