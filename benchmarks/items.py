"""The list of measurements. An item is measured in rounds; within a round its sides alternate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Sides = dict[str, dict[str, float]]
"""{side: {quantity: number}} of one round."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how it is measured."""

    peer: Path
    """The folder of the peer's scripts."""
    peer_python: Path
    """The interpreter of the peer's environment."""
    work: Path
    """What is made for the measurements is kept here."""


Measure = Callable[[Setting, int], Sides]
"""A round, by its number."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One measurement.

    `measure` gives a round's numbers. Rounds whose number is odd run their sides in the other order, so that
    what the first one leaves behind (warm caches, a slower clock) falls on either side.
    """

    name: str
    measure: Measure
    rounds: int = 5
    needs_peer: bool = False


def alternated(sides: Mapping[str, Callable[[], dict[str, float]]], number: int) -> Sides:
    """Every side once, forwards in even rounds and backwards in odd ones."""
    order = list(sides) if number % 2 == 0 else list(reversed(sides))
    done = {side: sides[side]() for side in order}
    return {side: done[side] for side in sides}
