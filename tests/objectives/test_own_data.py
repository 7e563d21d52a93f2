"""What objectives with data of their own share: passes, encoded images, an epoch dealt out to processes."""

import numpy as np
import pytest
import torch

from alignlab.distributed import ranks
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import NothingToLearn
from alignlab.objectives import own_data
from alignlab.objectives.own_data import Latents, Passes, dealt, refuse, with_dropout
from alignlab.objectives.regression import Examples
from alignlab.training.guards import _named
from tests.conftest import tiny_policy
from tests.linear_gaussian import World
from tests.objectives.updates import SCHEDULERS


def numbered(n: int) -> list[tuple[str, bool]]:
    return [(f"{k}.png", k % 2 == 0) for k in range(n)]


def test_passes() -> None:
    """Seven examples in draws of three and twenty: each once before any twice, through a checkpoint, and
    other data are refused."""
    passes, seen = Passes(numbered(7), "images"), []
    for epoch, count in enumerate((3, 20, 5)):
        again = Passes(numbered(7), "images")
        again.load_state_dict(passes.state_dict())
        drawn = passes.draw(count, np.random.default_rng(epoch))
        assert again.draw(count, np.random.default_rng(epoch)) == drawn
        seen += drawn
    laps = [seen[k : k + 7] for k in range(0, 28, 7)]
    assert all(sorted(lap) == list(range(7)) for lap in laps) and len({*map(tuple, laps)}) > 1
    with pytest.raises(
        NothingToLearn, match=r"algo\.data holds 8 images, but the run began with 7; give it the same ones"
    ):
        Passes(numbered(8), "images").load_state_dict(passes.state_dict())
    with pytest.raises(
        NothingToLearn, match=r"algo\.data holds other images than the run began with; give it the same ones"
    ):
        Passes([*numbered(6), ("6.png", False)], "images").load_state_dict(passes.state_dict())
    Passes(numbered(7), "images").load_state_dict(
        {k: v for k, v in passes.state_dict().items() if k != "seen"}
    )  # an earlier version's


def test_latents(tiny_sd) -> None:
    """An image is read and encoded once, at the model's size, and kept on the host; or every time; what
    cannot be read is a sentence."""
    policy, read = tiny_policy(tiny_sd, size=0), []

    def image(size):
        read.append(size)
        return torch.full((3, *size), 0.5)

    for keep in (True, False):
        latents = Latents(keep=keep)
        one, again = latents(policy, "a", image), latents(policy, "a", image)
        assert torch.equal(one, again) and one.shape == (1, *policy.latent_shape) and not one.requires_grad
        torch.testing.assert_close(latents(policy, "b", lambda size: (image(size), image(size)))[1], one[0])
    assert read == [(16, 16)] * (1 + 2 + 2 + 2)

    def broken(size):
        raise ValueError("data: image of a row of t.csv is no image; mend or remove the row")

    with pytest.raises(NothingToLearn, match=r"algo\.data: image of a row of t\.csv is no image"):
        Latents()(policy, "c", broken)


@pytest.mark.parametrize("n", [6, 7, 2])
@pytest.mark.parametrize("even", [False, True])
def test_an_epoch_is_dealt_out(n, even, monkeypatch) -> None:
    """Three processes: every example in one update of one process, shares that add up to 1 in each update,
    draws those of one process, whatever n is, and with less examples than updates or processes."""
    world, names = World(SCHEDULERS["epsilon"]), ["a", "b", "a", "c", "a", "d", "e"][:n]
    world.sharded = even

    def epoch(micro_batch):
        rng = np.random.default_rng(0)
        made = dealt(
            world,
            names,
            lambda places, key: (places, key),
            stream="s",
            updates=4,
            micro_batch=micro_batch,
            rng=rng,
        )
        return [list(update.batches) for update in made]

    draws = {}
    for update, batches in enumerate(epoch(2)):
        for _, (places, its) in batches:
            draws |= {
                place: (update, noise)
                for place, noise in zip(places, its.normal(0, ()).tolist(), strict=True)
            }
    assert sorted(draws) == list(range(n)) and len({noise for _, noise in draws.values()}) == n
    seen, slices, shares = [], [], np.zeros(min(4, n))
    for module in (ranks, own_data):
        monkeypatch.setattr(module, "world", lambda: 3)
    for r in range(3):
        monkeypatch.setattr(ranks, "rank", lambda r=r: r)
        updates = epoch(1)
        slices.append([len(batches) for batches in updates])
        for update, batches in enumerate(updates):
            for share, (places, its) in batches:
                shares[update] += share
                if share:
                    assert [(update, *its.normal(0, ()).tolist())] == [draws[place] for place in places]
                    seen += places
    assert sorted(seen) == list(range(n)) and shares == pytest.approx(np.ones(min(4, n)))
    assert not even or slices[0] == slices[1] == slices[2]


def test_dropout_goes_by_key() -> None:
    """A third of the prompts becomes the empty one, the same ones in any slice; none for 0 and all for 1."""
    many = noise_key(["a"] * 3000, seed=0, stream="t")
    kept = with_dropout(["x"] * 3000, many, 1 / 3)
    assert 0.3 < sum(prompt == "" for prompt in kept) / 3000 < 0.37
    assert with_dropout(["x"] * 10, many[range(10)], 1 / 3) == kept[:10]
    assert (
        with_dropout(["x"] * 3, many[range(3)], 0.0) == ("x",) * 3
        and with_dropout(["x"] * 3, many[range(3)], 1.0) == ("",) * 3
    )


def test_a_guard_names_its_images() -> None:
    """What is not finite is told by its prompts, and the examples have nothing that a guard takes for rows of
    a rollout."""
    process, keyed = ForwardProcess.of(SCHEDULERS["epsilon"]), noise_key(["0", "1", "0"], seed=0, stream="t")
    batch = Examples(process=process, latents=torch.zeros(2, 3, 1, 1, 2), prompts=("a", "", "b"), noise=keyed)
    assert _named(batch.named()) == "image 0 of prompt 'a', image 0 of prompt '', image 1 of prompt 'b'"


def test_refusals() -> None:
    """By key, value and mend, with the number of examples where it is known."""
    for words, said in (
        ((1.5, 1, 0.0), r"algo\.prompt_dropout=1\.5 must be in \[0, 1\]"),
        ((0.0, 5, 0.0), r"algo\.updates_per_epoch=5 must be at least 1 and at most algo\.images=4"),
        ((0.0, 1, 0.2), r"kl_coeff=0\.2: SFT has no KL term \(nothing\); leave kl_coeff at 0"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse("SFT", *words, why="nothing", images=4)
    refuse("OnlineDPO", 0.0, 99, 0.0, why="nothing")
    with pytest.raises(ValueError, match=r"algo\.updates_per_epoch=0 must be at least 1$"):
        refuse("OnlineDPO", 0.0, 0, 0.0, why="nothing")
