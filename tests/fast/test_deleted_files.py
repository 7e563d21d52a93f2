"""Each file of alignlab/fast may be deleted, and only the time of a run changes."""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import alignlab.fast
from tests import warm

FAST = Path(alignlab.fast.__file__).parent
PACKAGE = FAST.parent
TIMES = {"seconds", "images_per_second", "peak_memory_mb"}
RUN = (
    "algo=draftp kl_coeff=0.25 algo.k=2 quick=true samples_per_step=4 micro_batch=2 sampler.steps=3 "
    "eval_sampler.steps=2 prompts.unseen=[] device=cpu prompts.prompts=[cat,dog] prompts.per_prompt=2 "
    "policy.lora.rank=2 evaluation.prompts=1 eval_rewards=emoji_preference optimizer.eps=1e-6 lr=2e-4 "
    "output_dir=run"
).split()
"""Guided, with adapters, a gradient through a frozen reward and the distance to the frozen model. AdamW's eps
is raised and the learning rate lowered: where a gradient is all round-off, a step would follow its sign."""


def trained(folder: Path, without: str | None) -> list[dict[str, Any]]:
    """The lines of metrics of a tiny run in a copy of the package that lacks one file."""
    shutil.copytree(PACKAGE, folder / "alignlab", ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    if not (PACKAGE / "conf").is_dir():
        shutil.copytree(PACKAGE.parent / "conf", folder / "conf")
    if without:
        (folder / "alignlab" / "fast" / without).unlink()
    done = warm.run(
        [sys.executable, "-m", "alignlab.train", *RUN],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trained(tmp_path_factory.mktemp("whole"), None)


@pytest.mark.parametrize("file", sorted(path.name for path in FAST.glob("[!_]*.py")))
def test_a_deleted_file_changes_the_time_only(file: str, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """Every number of the run is the same to 1e-5; a spread to 1e-5 of its mean."""
    lines = trained(tmp_path, without=file)
    assert len(lines) == len(whole) > 1
    for line, expected in zip(lines, whole, strict=True):
        assert line.keys() == expected.keys()
        for key in line.keys() - TIMES:
            value, other = line[key], expected[key]
            numbers = value is not None and other is not None  # without noise there is no trajectory KL
            # A spread is a difference of such numbers, so its round-off is theirs.
            mean = expected.get(key.removesuffix("_std")) or expected.get(key.replace("/std", "/mean")) or 0
            close = 1e-5 * max(1.0, abs(mean))
            same = math.isclose(value, other, rel_tol=1e-5, abs_tol=close) if numbers else value is other
            assert same, f"without {file}: {key} is {line[key]}, not {expected[key]}"
