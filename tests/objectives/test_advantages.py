"""Advantages: per-prompt statistics that live across epochs and checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest

from alignlab.objectives.advantages import PromptStatistics

TRACKER = json.loads((Path(__file__).parents[1] / "data" / "trl_ddpo.json").read_text())["tracker"]


def test_trl_parity():
    """TRL 0.23.1's PerPromptStatTracker, over two updates that cross min_count and overflow the buffer."""
    statistics = PromptStatistics(buffer_size=TRACKER["buffer_size"], min_count=TRACKER["min_count"])
    for update in TRACKER["updates"]:
        mine = statistics.standardise(update["prompts"], update["rewards"])
        np.testing.assert_allclose(mine, update["advantages"], rtol=2e-5)


def test_by_hand():
    """A plain loop over samples: last `buffer_size` rewards of the prompt, this batch's included; below min_count the whole batch."""
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
    assert mine.mean() == pytest.approx(0) and mine.std() == pytest.approx(1, rel=1e-5) and not statistics.state_dict()
    assert statistics.own_share(["a", "b"]) == 0


@pytest.mark.parametrize("rewards", [[1, 2, 2, 4], np.array([1, 2, 2, 4]), np.array([1, 2, 2, 4], dtype=np.float32)])
def test_integer_rewards_are_not_truncated(rewards):
    """Integer rewards give the float64 advantages of the same numbers."""
    mine = PromptStatistics(min_count=2).standardise(["a"] * 4, rewards)
    assert mine.dtype == np.float64
    np.testing.assert_allclose(mine, PromptStatistics(min_count=2).standardise(["a"] * 4, [1.0, 2.0, 2.0, 4.0]))
    assert np.abs(mine - mine.round()).max() > 0.1


def test_equal_rewards_give_zero():
    """A batch without reward variance has advantages 0, not nan."""
    assert not PromptStatistics().standardise(["a", "b"], [3.0, 3.0]).any()


def test_persistence():
    """Saved as JSON and loaded, the statistics go on exactly as if nothing had happened, buffer length included."""
    rng = np.random.default_rng(0)
    first = PromptStatistics(buffer_size=5, min_count=3)
    for _ in range(3):
        first.standardise(["a", "b", "a"], rng.normal(size=3))
    second = PromptStatistics(buffer_size=5, min_count=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        rewards = rng.normal(size=3)
        assert np.array_equal(first.standardise(["a", "b", "a"], rewards), second.standardise(["a", "b", "a"], rewards))
    assert first.state_dict() == second.state_dict() and all(len(v) <= 5 for v in second.state_dict().values())


def test_refusal():
    """A buffer that never reaches min_count is refused."""
    with pytest.raises(ValueError, match="buffer_size=8"):
        PromptStatistics(buffer_size=8, min_count=9)
