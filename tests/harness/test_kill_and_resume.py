"""The harness that kills runs: what it calls equal is, and runs that it killed end where undisturbed ones end
(slow)."""

import json
from pathlib import Path

import pytest
import torch

from tests.harness import kill_and_resume


def test_what_counts_as_equal() -> None:
    """Bit by bit at any depth, but for times."""
    one = {"a": [torch.ones(2), {"wall_seconds": 1.0, "b": (1, "x")}]}
    assert kill_and_resume.equal(one, {"a": [torch.ones(2), {"wall_seconds": 2.0, "b": (1, "x")}]})
    for other in (
        {"a": [torch.ones(2).nextafter(torch.zeros(2)), {"wall_seconds": 1.0, "b": (1, "x")}]},
        {"a": [torch.ones(2).double(), {"wall_seconds": 1.0, "b": (1, "x")}]},
        {"a": [torch.ones(2), {"wall_seconds": 1.0, "b": (1, "y")}]},
        {"a": [torch.ones(2)]},
    ):
        assert not kill_and_resume.equal(one, other)


@pytest.mark.slow
def test_killed_runs_end_where_undisturbed_ones_do(tmp_path: Path) -> None:
    """30 kills of DDPO and of DRaFT+, 8 of each other objective, LoRA and full; every phase met in at least a
    sixth of them."""
    assert kill_and_resume.main(["--work", str(tmp_path / "runs"), "--results", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "kills.json").read_text())["cases"]
    assert len(cases) == 10 and not any(case["different"] for case in cases)
    for case in cases:
        assert len(case["kills"]) >= (30 if case["case"].split()[0] in kill_and_resume.MANY else 8)
