"""Which candidate beats which: pairs of winner and loser from the scores of several images of each prompt.

The experts' scores are first one number a candidate: each expert's normalised, weighted, and summed,

    s_i = sum_e w_e f(r_e,i)

    f: none    r
       zscore  (r - mean) / std
       minmax  (r - min) / (max - min)
       rank    from 0, the lowest, to 1; equal scores share the mean of their ranks

with mean, std, min, max and ranks taken within the prompt (`scope="prompt"`) or over all candidates ("all").
Within each prompt, then:

    best_worst      the best against the worst; flow_grpo's online DPO
    topk_bottomk    the best against the worst, the second best against the second worst, ... k pairs, or half
                    of the candidates; ADHMR
    all_pairs       the better against the worse, for every two
    median          each with s at or above the median of all prompts' candidates against each below it;
                    FashionDPO
    pareto          for every two, the one that is nowhere worse and somewhere better, expert by expert:
                    normalisation is then nothing, a weight of 0 leaves an expert out, a negative one turns it
                    round; D3PO (arXiv 2311.13231), `compare`

A winner must beat the loser by more than `margin` in s. What does not is a tie: dropped, and counted.
(flow_grpo trains on candidates 0 and 1 where all are equal; Flow-Factory on one image as winner and loser,
whose gradient is zero.)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignlab.data.ranks import ranks

Values = NDArray[np.float64]
SCOPES = ("prompt", "all")
ROUNDING = 1e-9
"""Sums that differ by less than this share of the largest are equal: their terms were rounded."""


@dataclass(frozen=True)
class Pair:
    """Two rows of the candidates."""

    winner: int
    loser: int
    margin: float
    """s_winner - s_loser, in the unit of s."""


@dataclass(frozen=True)
class Paired:
    """What a rule made of the candidates."""

    pairs: list[Pair]
    """Prompts in the order in which they first occur, and the best winner first within each."""
    ties: int
    """Pairs of the rule that were dropped: equal, within the margin, or (pareto) neither dominates."""
    totals: Values
    """[B] s."""

    @property
    def labels(self) -> dict[int, bool]:
        """Rows that won each of their pairs, and rows that lost each of theirs: what KTO trains on. Rows of
        both kinds have none."""
        won, lost = {pair.winner for pair in self.pairs}, {pair.loser for pair in self.pairs}
        return {row: row in won for row in sorted(won ^ lost)}


@runtime_checkable
class Weighs(Protocol):
    """A rule with weights of its own, which come before those of the rewards."""

    weights: dict[str, float]
    """By reward; one that is not named keeps its own."""


class Pairing:
    """A rule that makes pairs of scored candidates.

    Args:
        rule: best_worst, topk_bottomk, all_pairs, median or pareto.
        k: pairs of each prompt, at most, for topk_bottomk. [pairs]
        margin: by which a winner must beat the loser in s; 0 drops only ties.
            [that of the normalised reward]
        normalise: each expert's scores: none, zscore, minmax or rank. Equal scores of all say nothing: 0
            (rank: 1/2) for each.
        scope: of the normalisation: prompt, or all.
        weights: by expert; one that is not named has the weight 1.

    Raises:
        ValueError: for a value that is none of these.
    """

    def __init__(
        self,
        *,
        rule: Literal["best_worst", "topk_bottomk", "all_pairs", "median", "pareto"] = "best_worst",
        k: int = 1,
        margin: float = 0.0,
        normalise: Literal["none", "zscore", "minmax", "rank"] = "none",
        scope: Literal["prompt", "all"] = "prompt",
        weights: dict[str, float] | None = None,
    ) -> None:
        known: Sequence[str]
        for key, value, known in (
            ("rule", rule, [*RULES]),
            ("normalise", normalise, [*NORMALISED]),
            ("scope", scope, SCOPES),
        ):
            if value not in known:
                raise ValueError(f"{key}={value} is not one of {', '.join(known)}")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"margin={margin} must be a finite number, 0 or more")
        for name, weight in (weights or {}).items():
            if not math.isfinite(weight):
                raise ValueError(f"weights.{name}={weight} must be a finite number")
        self.rule, self.k, self.margin, self.normalise, self.scope = rule, k, margin, normalise, scope
        self.weights = dict(weights or {})

    def __call__(self, prompts: Sequence[str], scores: Mapping[str, Any]) -> Paired:
        """The pairs of B candidates, a pure function of what is given.

        Args:
            prompts: [B]; candidates of one prompt may stand anywhere.
            scores: by expert, [B] numbers, larger is better.

        Raises:
            ValueError: if there is no expert, a weight names none, a score is infinite or no number, or there
                are not B of them.
        """
        raw = self._read(prompts, scores)
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        totals = self._totals(raw, list(groups.values()))
        facing = np.stack([np.sign(self.weights.get(name, 1.0)) * values for name, values in raw.items()])
        median = float(np.median(totals)) if len(totals) else 0.0
        least = max(self.margin, ROUNDING * float(np.abs(totals).max(initial=0)))
        pairs, ties = [], 0
        for rows in groups.values():
            order = sorted(rows, key=lambda row: -totals[row])
            for better, worse in RULES[self.rule](order, totals, median, self.k):
                if self.rule == "pareto" and dominates(
                    facing[:, worse], facing[:, better]
                ):  # rounding alone can order them so
                    better, worse = worse, better
                beyond = float(totals[better] - totals[worse])
                won = beyond > least
                if self.rule == "pareto":
                    won = dominates(facing[:, better], facing[:, worse]) and (won or self.margin == 0)
                if won:
                    pairs.append(Pair(better, worse, beyond))
                else:
                    ties += 1
        return Paired(pairs, ties, totals)

    def _read(self, prompts: Sequence[str], scores: Mapping[str, Any]) -> dict[str, Values]:
        """Each expert's scores, [B] float64.

        Raises:
            ValueError: as above.
        """
        if not scores:
            raise ValueError("there are no scores to make pairs by; give one reward at least")
        unknown = [name for name in self.weights if name not in scores]
        if unknown:
            raise ValueError(
                f"weights.{unknown[0]} names no reward of these candidates; they have {', '.join(scores)}"
            )
        if not any(self.weights.get(name, 1.0) for name in scores):
            raise ValueError(f"weights={self.weights} leave no reward to make pairs by; give one a weight")
        raw = {name: _float64(values) for name, values in scores.items()}
        for name, values in raw.items():
            if values.shape != (len(prompts),):
                raise ValueError(
                    f"reward {name} has scores of shape {values.shape} for {len(prompts)} candidates; give "
                    "one each"
                )
            for row in np.flatnonzero(~np.isfinite(values))[:1]:
                raise ValueError(
                    f"reward {name} is {values[row]} for candidate {row}, of prompt {prompts[row]!r}, and no "
                    "pair can be made of that; score it again, or leave it out"
                )
        return raw

    def _totals(self, raw: Mapping[str, Values], groups: Sequence[Sequence[int]]) -> Values:
        """[B] s, each sum rounded once, so that it does not depend on the experts' order."""
        parts = (
            [np.asarray(rows) for rows in groups]
            if self.scope == "prompt"
            else [np.arange(len(next(iter(raw.values()))))]
        )
        terms = []
        for name, values in raw.items():
            normalised = np.empty_like(values)
            for rows in parts:
                if len(rows):
                    normalised[rows] = NORMALISED[self.normalise](values[rows])
            terms.append(self.weights.get(name, 1.0) * normalised)
        return np.array([math.fsum(column) for column in zip(*terms, strict=True)])


def _float64(values: Any) -> Values:
    return (
        values.detach().double().cpu().numpy()
        if isinstance(values, Tensor)
        else np.asarray(values, dtype=np.float64)
    )


def dominates(one: Values, other: Values) -> bool:
    """Whether it is nowhere worse and somewhere better, [experts] each."""
    return bool((one >= other).all() and (one > other).any())


# -- scores of one expert, [n], n >= 1


def _zscore(values: Values) -> Values:
    spread = values.std()
    out: Values = (
        (values - values.mean()) / spread if np.ptp(values) > 0 and spread > 0 else np.zeros_like(values)
    )
    return out


def _minmax(values: Values) -> Values:
    span = np.ptp(values)
    out: Values = (values - values.min()) / span if span > 0 else np.zeros_like(values)
    return out


NORMALISED: dict[str, Callable[[Values], Values]] = {
    "none": lambda values: values,
    "zscore": _zscore,
    "minmax": _minmax,
    "rank": ranks,
}


# -- pairs (better, worse) that a rule looks at, of one prompt's rows, best first

Looked = Iterator[tuple[int, int]]


def _topk_bottomk(order: Sequence[int], totals: Values, median: float, k: int) -> Looked:
    return ((order[i], order[-1 - i]) for i in range(min(k, len(order) // 2)))


def _every_two(order: Sequence[int], totals: Values, median: float, k: int) -> Looked:
    return combinations(order, 2)


def _median(order: Sequence[int], totals: Values, median: float, k: int) -> Looked:
    above = [row for row in order if totals[row] >= median]
    return product(above, order[len(above) :])


RULES: dict[str, Callable[[Sequence[int], Values, float, int], Looked]] = {
    "best_worst": lambda order, totals, median, k: _topk_bottomk(order, totals, median, 1),
    "topk_bottomk": _topk_bottomk,
    "all_pairs": _every_two,
    "median": _median,
    "pareto": _every_two,
}
