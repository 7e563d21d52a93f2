"""Two goals at once: reward and diversity, both to be large."""

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats in one goal without losing in the other, by rising first
    goal."""
    return sorted(
        (
            k
            for k, p in enumerate(points)
            if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)
        ),
        key=lambda k: points[k],
    )


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The area that the points dominate above the reference point, in the product of the two units. Points
    below it add nothing."""
    above = [p for p in points if p[0] > reference[0] and p[1] > reference[1]]
    area, height = 0.0, reference[1]
    for k in reversed(pareto_front(above)):
        x, y = above[k]
        area += (x - reference[0]) * max(0.0, y - height)
        height = max(height, y)
    return area


def at_matched_reward(reward: Sequence[float], value: Sequence[float], level: float) -> float | None:
    """`value` where the curve of one training run first reaches `level`, linear between evaluations; None if
    it never does.

    Args:
        reward, value: at the run's evaluations, in order of training, the base model first.
    """
    for k, r in enumerate(reward):
        if r >= level:
            if k == 0:
                return value[0]
            return float(np.interp(level, [reward[k - 1], r], [value[k - 1], value[k]]))
    return None
