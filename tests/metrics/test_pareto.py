"""Fronts and areas of few points are known by hand; of many, by brute force."""

import numpy as np
import pytest

from alignlab.metrics.pareto import at_matched_reward, hypervolume, pareto_front


def test_front():
    points = [(1.0, 5.0), (2.0, 4.0), (1.5, 4.0), (3.0, 1.0), (0.5, 5.0), (3.0, 0.5)]
    assert pareto_front(points) == [0, 1, 3]
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]  # nobody beats an equal
    assert pareto_front([]) == []


def test_hypervolume_by_hand():
    """Two rectangles that overlap; a dominated point and one below the reference add nothing."""
    assert hypervolume([(2.0, 1.0), (1.0, 2.0)], (0.0, 0.0)) == 3.0
    assert hypervolume([(2.0, 1.0), (1.0, 2.0), (0.5, 0.5), (-1.0, 9.0)], (0.0, 0.0)) == 3.0
    assert hypervolume([(2.0, 1.0)], (1.5, -1.0)) == 1.0
    assert hypervolume([(1.0, 1.0)], (2.0, 2.0)) == 0.0


def test_hypervolume_by_counting():
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.random((12, 2))]
    seen = rng.random((200_000, 2))
    covered = np.any([(seen[:, 0] < x) & (seen[:, 1] < y) for x, y in points], axis=0).mean()
    assert hypervolume(points, (0.0, 0.0)) == pytest.approx(covered, abs=0.005)


def test_matched_reward():
    """Linear between evaluations, at the first crossing; None where it is never reached."""
    reward, lpips = [1.0, 2.0, 4.0, 3.0, 5.0], [0.9, 0.8, 0.4, 0.3, 0.2]
    assert at_matched_reward(reward, lpips, 3.0) == pytest.approx(0.6)
    assert at_matched_reward(reward, lpips, 0.5) == 0.9
    assert at_matched_reward(reward, lpips, 5.5) is None
