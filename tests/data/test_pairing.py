"""Every rule against a slow reading of its definition, on every small table of scores."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from alignlab.data.pairing import Pair, Pairing

RULES = ("best_worst", "topk_bottomk", "all_pairs", "median", "pareto")


def slow(prompts, scores, rule, k, margin) -> tuple[set[tuple[int, int]], int]:
    """The pairs and ties of un-normalised, unweighted scores, straight from the definitions."""
    s = np.sum(list(scores.values()), 0)
    pairs, ties = set(), 0
    for prompt in set(prompts):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        best_first = sorted(rows, key=lambda i: (-s[i], i))
        if rule == "median":
            asked = [(i, j) for i in rows for j in rows if s[i] >= np.median(s) > s[j]]
        elif rule in ("best_worst", "topk_bottomk"):
            n = 1 if rule == "best_worst" else k
            asked = list(zip(best_first[:n], best_first[::-1][:n], strict=True))[: len(rows) // 2]
        else:
            asked = [(i, j) if s[i] >= s[j] else (j, i) for i, j in combinations(rows, 2)]
        for i, j in asked:
            nowhere_worse = all(values[i] >= values[j] for values in scores.values())
            if s[i] - s[j] > margin and (rule != "pareto" or nowhere_worse):
                pairs.add((i, j))
            else:
                ties += 1
    return pairs, ties


@pytest.mark.parametrize("rule", RULES)
def test_every_small_table(rule: str) -> None:
    """Two prompts, woven into each other; two experts; all tables of the scores 0, 1, 2 for four candidates,
    and all margins and k."""
    prompts = ["a", "b", "a", "a"]
    tables = list(product(range(3), repeat=4))
    for one, other in product(tables, tables[::7]):
        scores = {"x": np.array(one, float), "y": np.array(other, float)}
        for k, margin in ((1, 0.0), (2, 0.0), (1, 1.0)):
            found = Pairing(rule=rule, k=k, margin=margin)(prompts, scores)
            expected, ties = slow(prompts, scores, rule, k, margin)
            assert {(p.winner, p.loser) for p in found.pairs} == expected and len(found.pairs) == len(
                expected
            )
            assert found.ties == ties
            assert all(
                p.margin == found.totals[p.winner] - found.totals[p.loser] > margin for p in found.pairs
            )


@pytest.mark.parametrize("rule", RULES)
def test_ties_are_never_trained_on(rule: str) -> None:
    """All equal: no pair. flow_grpo's argmax and argmin train on an image against itself, or on candidates 0
    and 1."""
    found = Pairing(rule=rule)(["a"] * 4, {"x": [3.0] * 4, "y": [0.1] * 4})
    assert (
        found.pairs == []
        and found.ties == {"best_worst": 1, "topk_bottomk": 1, "all_pairs": 6, "median": 0, "pareto": 6}[rule]
    )


def test_rounding_makes_no_winner() -> None:
    """0.1 + 0.2 is no more than 0.3."""
    found = Pairing()(["a", "a"], {"x": [0.1, 0.3], "y": [0.2, 0.0]})
    assert found.pairs == [] and found.ties == 1


def test_ranks_meet_rank_by_rank() -> None:
    """topk_bottomk: best with worst, second best with second worst; half of the candidates at most, and never
    one with itself."""
    scores = {"x": [5.0, 1.0, 4.0, 2.0, 3.0]}
    found = Pairing(rule="topk_bottomk", k=9)(["a"] * 5, scores)
    assert found.pairs == [Pair(0, 1, 4.0), Pair(2, 3, 2.0)] and found.ties == 0


def test_the_median_is_that_of_all_prompts() -> None:
    """So a prompt whose candidates are all good, or all bad, gives no pair."""
    found = Pairing(rule="median")(["a", "a", "b", "b", "c", "c"], {"x": [9.0, 8.0, 5.0, 1.0, 0.0, 0.5]})
    assert [(p.winner, p.loser) for p in found.pairs] == [(2, 3)]


def test_pareto_wants_agreement() -> None:
    """However large one expert's word, a pair on which two disagree is a tie; a weight of 0 silences one, a
    negative one turns it round."""
    prompts, scores = ["a", "a"], {"x": [100.0, 0.0], "y": [0.0, 0.1]}
    assert (
        Pairing(rule="pareto")(prompts, scores).pairs == []
        and Pairing(rule="pareto")(prompts, scores).ties == 1
    )
    for weights, pair in (
        ({"y": 0.0}, (0, 1)),
        ({"x": 0.0}, (1, 0)),
        ({"y": -1.0}, (0, 1)),
        ({"x": -1.0}, (1, 0)),
    ):
        (found,) = Pairing(rule="pareto", weights=weights)(prompts, scores).pairs
        assert (found.winner, found.loser) == pair and found.margin > 0


@pytest.mark.parametrize(
    ("normalise", "scope", "expected"),
    [
        ("none", "prompt", [0, 1, 2, 4, 7]),
        ("zscore", "prompt", [-(1.5**0.5), 0, 1.5**0.5, -1, 1]),
        ("zscore", "all", (np.array([0, 1, 2, 4, 7]) - 2.8) / np.std([0, 1, 2, 4, 7])),
        ("minmax", "prompt", [0, 0.5, 1, 0, 1]),
        ("minmax", "all", [0, 1 / 7, 2 / 7, 4 / 7, 1]),
        ("rank", "prompt", [0, 0.5, 1, 0, 1]),
        ("rank", "all", [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_normalised_and_weighted(normalise: str, scope: str, expected: list[float]) -> None:
    """Each expert by itself, then weighted; one that gives all the same adds the same to all; one without a
    weight has the weight 1."""
    prompts, x = ["a", "a", "a", "b", "b"], np.array([0.0, 1, 2, 4, 7])
    pairing = Pairing(normalise=normalise, scope=scope, weights={"x": 2.0, "same": 1.0})
    totals = pairing(prompts, {"x": torch.tensor(x, dtype=torch.float32), "same": [5.0] * 5, "y": -x}).totals
    constant = {"none": 5.0, "rank": 0.5}.get(normalise, 0.0)
    mirrored = {"none": lambda v: -v, "zscore": lambda v: -v}.get(normalise, lambda v: 1 - v)
    np.testing.assert_allclose(
        totals, 2 * np.array(expected) + constant + mirrored(np.array(expected, float)), atol=1e-12
    )


def test_the_order_is_no_matter_of_chance() -> None:
    """The order of the experts changes nothing, and pairs come prompt by prompt, the best winner first."""
    draw = np.random.default_rng(0)
    prompts, scores = ["b", "a"] * 6, {name: draw.normal(size=12) for name in "xyz"}
    pairing = Pairing(rule="all_pairs", normalise="zscore")
    found, again = pairing(prompts, scores), pairing(prompts, dict(reversed(scores.items())))
    assert found.pairs == again.pairs and (found.totals == again.totals).all()
    assert [prompts[p.winner] for p in found.pairs] == ["b"] * 15 + ["a"] * 15
    best = [found.totals[p.winner] for p in found.pairs[:15]]
    assert best == sorted(best, reverse=True)


def test_labels() -> None:
    """Good if it won all of its pairs, bad if it lost all; what did both, or neither, has none."""
    scores = {"x": [3.0, 2.0, 1.0, 5.0]}
    assert Pairing(rule="all_pairs")(["a", "a", "a", "b"], scores).labels == {0: True, 2: False}
    assert Pairing(rule="median")(["a", "a", "a", "a"], scores).labels == {
        0: True,
        1: False,
        2: False,
        3: True,
    }


def test_one_candidate_and_none() -> None:
    """Nothing to compare: no pair, and no tie."""
    for rule in RULES:
        assert Pairing(rule=rule)(["a", "b"], {"x": [1.0, 2.0]}).pairs == []
        assert Pairing(rule=rule, scope="all", normalise="rank")([], {"x": []}).ties == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rule": "best"}, "rule=best is not one of best_worst, topk_bottomk"),
        ({"normalise": "std"}, "normalise=std is not one of none, zscore, minmax, rank"),
        ({"scope": "batch"}, "scope=batch is not one of prompt, all"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"margin": -1.0}, "margin=-1.0 must be a finite number"),
        ({"margin": float("nan")}, "margin=nan must be a finite number"),
        ({"weights": {"x": float("inf")}}, "weights.x=inf must be a finite number"),
    ],
)
def test_impossible_rules(words, said) -> None:
    with pytest.raises(ValueError, match=said):
        Pairing(**words)


def test_impossible_scores() -> None:
    """No score, scores that are none, too few, and weights of what is not there: a sentence each."""
    nan = float("nan")
    for scores, weights, said in (
        ({}, None, "there are no scores"),
        ({"x": [1.0, nan]}, None, "reward x is nan for candidate 1, of prompt 'b', and no pair"),
        ({"x": [1.0, float("inf")]}, None, "reward x is inf for candidate 1"),
        ({"x": [1.0]}, None, r"reward x has scores of shape \(1,\) for 2 candidates"),
        ({"x": [1.0, 2.0]}, {"clip": 1.0}, "weights.clip names no reward of these candidates; they have x"),
        ({"x": [1.0, 2.0]}, {"x": 0.0}, "leave no reward to make pairs by"),
    ):
        with pytest.raises(ValueError, match=said):
            Pairing(weights=weights)(["a", "b"], scores)
