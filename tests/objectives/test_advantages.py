"""Advantages: per-prompt statistics that live across epochs and checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from alignlab.data.ranks import ranks
from alignlab.objectives.advantages import COMBINATIONS, PromptStatistics

TRACKER = json.loads((Path(__file__).parents[1] / "stored" / "trl_ddpo.json").read_text())["tracker"]


def test_trl_parity():
    """TRL 0.23.1's PerPromptStatTracker, over two updates that cross min_count and overflow the buffer."""
    statistics = PromptStatistics(buffer_size=TRACKER["buffer_size"], min_count=TRACKER["min_count"])
    for update in TRACKER["updates"]:
        mine = statistics.standardise(update["prompts"], update["rewards"])
        np.testing.assert_allclose(mine, update["advantages"], rtol=2e-5)


def test_by_hand():
    """A plain loop over samples: last `buffer_size` rewards of the prompt, this batch's included; below
    min_count the whole batch."""
    rng, statistics, history = np.random.default_rng(0), PromptStatistics(buffer_size=6, min_count=4), {}
    own = []
    for _ in range(5):
        prompts = rng.choice(["a", "b", "c"], size=7, p=[0.6, 0.3, 0.1]).tolist()
        rewards = rng.normal(3, 2, size=7)
        mine = statistics.standardise(prompts, rewards)
        for prompt, reward in zip(prompts, rewards, strict=True):
            history[prompt] = [*history.get(prompt, []), reward][-6:]
        for prompt, reward, advantage in zip(prompts, rewards, mine, strict=True):
            known = history[prompt] if len(history[prompt]) >= 4 else rewards.tolist()
            mean = sum(known) / len(known)
            std = (sum((r - mean) ** 2 for r in known) / len(known)) ** 0.5
            assert advantage == pytest.approx((reward - mean) / (std + 1e-6), rel=1e-12)
        own.append(sum(len(history[p]) >= 4 for p in prompts) / 7)
        assert statistics.own_share(prompts) == pytest.approx(own[-1])
    assert own[0] < 1 and max(own) > 0.5  # both branches ran


def test_batch_statistics():
    """per_prompt=False standardises over the batch: mean 0, deviation 1, and nothing is remembered."""
    statistics = PromptStatistics(per_prompt=False)
    mine = statistics.standardise(["a", "b", "a"], [1.0, 2.0, 6.0])
    assert (
        mine.mean() == pytest.approx(0)
        and mine.std() == pytest.approx(1, rel=1e-5)
        and not statistics.state_dict()
    )
    assert statistics.own_share(["a", "b"]) == 0


@pytest.mark.parametrize(
    "rewards", [[1, 2, 2, 4], np.array([1, 2, 2, 4]), np.array([1, 2, 2, 4], dtype=np.float32)]
)
def test_integer_rewards_are_not_truncated(rewards):
    """Integer rewards give the float64 advantages of the same numbers."""
    mine = PromptStatistics(min_count=2).standardise(["a"] * 4, rewards)
    assert mine.dtype == np.float64
    np.testing.assert_allclose(
        mine, PromptStatistics(min_count=2).standardise(["a"] * 4, [1.0, 2.0, 2.0, 4.0])
    )
    assert np.abs(mine - mine.round()).max() > 0.1


def test_equal_rewards_give_zero():
    """A batch without reward variance has advantages 0, not nan."""
    assert not PromptStatistics().standardise(["a", "b"], [3.0, 3.0]).any()


def test_persistence():
    """Saved as JSON and loaded, the statistics go on exactly as if nothing had happened, buffer length
    included."""
    rng = np.random.default_rng(0)
    first = PromptStatistics(buffer_size=5, min_count=3)
    for _ in range(3):
        first.standardise(["a", "b", "a"], rng.normal(size=3))
    second = PromptStatistics(buffer_size=5, min_count=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        rewards = rng.normal(size=3)
        assert np.array_equal(
            first.standardise(["a", "b", "a"], rewards), second.standardise(["a", "b", "a"], rewards)
        )
    assert first.state_dict() == second.state_dict() and all(
        len(v) <= 5 for v in second.state_dict().values()
    )


def test_refusal():
    """A buffer that never reaches min_count is refused."""
    with pytest.raises(ValueError, match="buffer_size=8"):
        PromptStatistics(buffer_size=8, min_count=9)


def rollout(rewards: dict[str, np.ndarray], weights: dict[str, float] | None = None) -> SimpleNamespace:
    """What an objective sees of several rewards: each by name, their weights, their sum."""
    weights = weights or dict.fromkeys(rewards, 1.0)
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in rewards.items()}
    return SimpleNamespace(
        rewards=tensors, weights=weights, reward=sum(weights[n] * t for n, t in tensors.items())
    )


GROUPS = ["a"] * 4 + ["b"] * 4
EASY = np.tile([1.0, 1.0, -1.0, -1.0], 2)
HARD = np.tile([1.0, -1.0, 1.0, -1.0], 2)  # orthogonal to EASY within every prompt


def test_an_easy_reward_does_not_starve_a_hard_one():
    """Two orthogonal rewards whose spreads differ by 10^4: gdpo gives both the same influence, A = (e +
    h)/sqrt 2 exactly; of the sum the large one has all."""
    rewards = {"easy": 30 + 100 * EASY, "hard": 0.5 + 0.01 * HARD}
    made = {
        c: PromptStatistics(min_count=4, combine=c).advantages(GROUPS, rollout(rewards)) for c in COMBINATIONS
    }
    for combine in ("gdpo", "zscore"):
        np.testing.assert_allclose(made[combine], (EASY + HARD) / 2**0.5, atol=2e-4)
    np.testing.assert_allclose(made["sum"], EASY + 1e-4 * HARD, atol=2e-6)
    np.testing.assert_allclose(made["rank"], (EASY + HARD) / 2**0.5, atol=2e-5)


def test_gdpo_is_decoupled_within_each_prompt():
    """A prompt on which the easy reward varies 100 times as much as on the other: zscore lets it take that
    prompt over, gdpo does not."""
    rewards = {"easy": np.repeat([1.0, 0.01], 4) * EASY, "hard": np.repeat([0.01, 1.0], 4) * HARD}
    fair, taken = (
        PromptStatistics(min_count=4, combine=c).advantages(GROUPS, rollout(rewards))
        for c in ("gdpo", "zscore")
    )
    np.testing.assert_allclose(fair, (EASY + HARD) / 2**0.5, atol=2e-4)
    np.testing.assert_allclose(taken, np.where(np.arange(8) < 4, EASY, HARD), atol=0.02)


def test_weights_are_the_influence():
    """gdpo with weights 3 and -1: A is proportional to 3e - h, whatever the scales."""
    made = PromptStatistics(min_count=4, combine="gdpo").advantages(
        GROUPS, rollout({"easy": 7 * EASY, "hard": 0.2 * HARD}, {"easy": 3.0, "hard": -1.0})
    )
    np.testing.assert_allclose(made, (3 * EASY - HARD) / 10**0.5, atol=1e-4)


@pytest.mark.parametrize("combine", ["zscore", "rank", "gdpo"])
def test_a_constant_reward_contributes_nothing(combine):
    """Nor a nan, in a value that float32 does not hold exactly; alone it leaves nothing to learn."""
    both = PromptStatistics(min_count=4, combine=combine).advantages(
        GROUPS, rollout({"hard": HARD, "flat": np.full(8, 0.1)})
    )
    np.testing.assert_allclose(both, HARD, atol=1e-5)
    alone = PromptStatistics(min_count=4, combine=combine).advantages(
        GROUPS, rollout({"flat": np.full(8, 0.1), "too": np.full(8, 5.3)})
    )
    np.testing.assert_allclose(alone, 0, atol=1e-6)


def test_one_reward_is_what_it_was():
    """gdpo of one reward, over epochs: bit for bit the advantages of its weighted value, buffers and state
    too."""
    rng, before, now = (
        np.random.default_rng(0),
        PromptStatistics(min_count=3),
        PromptStatistics(min_count=3, combine="gdpo"),
    )
    for _ in range(3):
        data = rollout({"x": rng.normal(size=8)}, {"x": 2.0})
        assert np.array_equal(
            now.advantages(GROUPS, data), before.standardise(GROUPS, data.reward.double().numpy())
        )
    assert now.state_dict() == before.state_dict() and now.own_share(GROUPS) == 1


def test_gdpo_by_hand_and_resumed():
    """Loops over samples with a buffer for each prompt and reward; saved as JSON in the middle, it goes on as
    if nothing had happened."""
    rng, history, statistics = (
        np.random.default_rng(1),
        {},
        PromptStatistics(buffer_size=6, min_count=3, combine="gdpo"),
    )
    weights = {"x": 1.0, "y": 0.5}
    for _ in range(4):
        prompts = rng.choice(["a", "b", "c"], size=7).tolist()
        data = rollout({"x": rng.normal(3, 2, 7), "y": rng.normal(0, 50, 7)}, weights)
        expected = np.zeros(7)
        for name, weight in weights.items():
            values = data.rewards[name].double().numpy()
            for prompt, value in zip(prompts, values, strict=True):
                history[name, prompt] = [*history.get((name, prompt), []), value][-6:]
            for row, prompt in enumerate(prompts):
                known = history[name, prompt] if len(history[name, prompt]) >= 3 else values
                expected[row] += weight * (values[row] - np.mean(known)) / (np.std(known) + 1e-6)
        expected = (expected - expected.mean()) / (expected.std() + 1e-6)
        np.testing.assert_allclose(statistics.advantages(prompts, data), expected, rtol=1e-10)
        saved, statistics = statistics, PromptStatistics(buffer_size=6, min_count=3, combine="gdpo")
        statistics.load_state_dict(json.loads(json.dumps(saved.state_dict())))
        assert statistics.own_share(prompts) == saved.own_share(prompts)


def test_ranks():
    """scipy's, mapped onto [0, 1]; equal values share, and a batch of one stands in the middle."""
    values = np.array([3.0, -1.0, 3.0, 100.0, 0.5])
    np.testing.assert_allclose(ranks(values), (rankdata(values) - 1) / 4)
    assert ranks(np.full(3, 2.0)).tolist() == [0.5] * 3 and ranks(np.array([7.0])).tolist() == [0.5]


def test_unknown_combination():
    """It is named, with the known ones."""
    with pytest.raises(ValueError, match="combine=max is not one of sum, zscore, rank, gdpo"):
        PromptStatistics(combine="max")
