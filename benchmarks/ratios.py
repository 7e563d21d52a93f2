"""What alternating rounds amount to: ratios with their range, exponents of growth.

A round holds one number for each side and quantity, measured one after the other; a machine's mood changes
slowly, so the ratio within a round is steadier than any of the numbers in it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Round = Mapping[str, Any]
"""{"sides": {side: {quantity: number}}, "busy": whether other processes ran}."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One side over the other, over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def ratio(rounds: Sequence[Round], quantity: str, side: str, other: str) -> Ratio | None:
    """Of each round's own numbers; None if no round has both.

    Args:
        quantity: of both sides, such as "cpu". "whole - part" is a difference of two quantities.
        side, other: the ratio is side / other.
    """
    found = []
    for its in rounds:
        a, b = (_value(its["sides"].get(name, {}), quantity) for name in (side, other))
        if a is not None and b:
            found.append(a / b)
    return (
        Ratio(median=statistics.median(found), low=min(found), high=max(found), rounds=len(found))
        if found
        else None
    )


def median(rounds: Sequence[Round], quantity: str, side: str) -> float | None:
    """Of one side's numbers; None if no round has one."""
    found = [v for v in (_value(its["sides"].get(side, {}), quantity) for its in rounds) if v is not None]
    return statistics.median(found) if found else None


def _value(numbers: Mapping[str, float], quantity: str) -> float | None:
    whole, _, part = quantity.partition(" - ")
    if whole not in numbers or (part and part not in numbers):
        return None
    return numbers[whole] - (numbers[part] if part else 0)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of cost = c size^p: the slope of least squares in log-log.

    Raises:
        ValueError: for fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs two sizes, not {list(sizes)}")
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope
