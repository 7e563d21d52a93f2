"""Every algorithm's tiny run gives the numbers that are stored: to the bit on processors that are known, else
to 1 %."""

import subprocess
from pathlib import Path

import pytest

from tests.golden import ROOT, RUNS, compared, differences, trained


def test_every_algorithm_gives_the_stored_numbers(tmp_path: Path) -> None:
    """Metrics, trained weights and pictures of two epochs."""
    assert list(compared(trained(ROOT, tmp_path, list(RUNS)))) == []


def test_the_net_sees_a_changed_bit() -> None:
    """A metric that moved by its last bit, other weights, and a metric that is gone are told."""
    then = {"a": {"metrics": [{"step": 0, "loss": 0.5}], "digests": {"metrics": "m", "weights": "w"}}}
    moved = {
        "a": {"metrics": [{"step": 0, "loss": 0.5 + 2**-53}], "digests": {"metrics": "n", "weights": "w"}}
    }
    assert list(differences(then, moved, bits=True)) == [
        "a: the metrics have other bits; loss of step 0 is 0.5000000000000001, and was 0.5"
    ]
    assert list(differences(then, moved, bits=False)) == []
    gone = {"a": {"metrics": [{"step": 0}], "digests": {"metrics": "n", "weights": "v"}}}
    assert len(list(differences(then, gone, bits=True))) == 2 and list(differences(then, gone, bits=False))


@pytest.mark.slow
def test_the_commit_before_gives_the_same_bits(tmp_path: Path) -> None:
    """For a change that only moves code: the working tree and the last commit train to the same bits."""
    tree = tmp_path / "tree"
    subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, "HEAD"], cwd=ROOT, check=True)
    try:
        then = trained(tree, tmp_path / "then", list(RUNS))
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    assert list(differences(then, trained(ROOT, tmp_path / "now", list(RUNS)), bits=True)) == []
