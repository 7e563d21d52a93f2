"""Rewards of the user's own that change what others see, or return something unusual: neither goes
unnoticed."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.config.build import ConfigError, build, node_problems, resolve
from alignlab.rewards import Reward
from alignlab.rewards.aesthetic import Aesthetic
from alignlab.rewards.brightness import Brightness
from alignlab.rewards.clip import ClipScore
from alignlab.rewards.colour import Colour
from alignlab.rewards.compose import NonFinite, RewardError, WeightedSum
from alignlab.rewards.diversity import ClipDiversity
from alignlab.rewards.emoji_rules import TrueAesthetic, TruePreference
from alignlab.rewards.function import Function
from alignlab.rewards.jpeg import JpegSize
from alignlab.rewards.jpeg_differentiable import JpegRate
from alignlab.rewards.preference import Preference
from alignlab.training.evaluation import Measured
from tests.running import command_line, lines, tiny

PROMPTS = ("a cat", "a dog !", "a lion")


def images(side: int = 8) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def function(call: Callable[..., Any], *, differentiable: bool = False, groupwise: bool = False) -> Function:
    return Function(call, differentiable=differentiable, unit="u", groupwise=groupwise)


def scored(call: Callable[..., Any]) -> list[float]:
    """What a function's answer for three images is read as."""
    return WeightedSum({"mine": function(call)}, {"mine": 1.0}).score(images(), PROMPTS)["mine"].tolist()


# -- what is given to a reward


def wiped(x: Tensor, prompts: Sequence[str]) -> Tensor:
    return x.mul_(0).mean((1, 2, 3))


def wiped_by_numpy(x: Tensor, prompts: Sequence[str]) -> list[float]:
    pixels = x.detach().numpy()
    pixels *= 0
    return [0.0] * len(x)


def wiped_by_data(x: Tensor, prompts: Sequence[str]) -> Tensor:
    x.data.view(-1).zero_()
    return x.mean((1, 2, 3))


class Wiper:
    """Wipes what it was given last time, too. Group-wise, or answering later, if it is asked to."""

    differentiable, unit, groupwise = False, "u", False

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        self.kept.append(x)
        for tensor in self.kept:
            tensor.zero_()
        return x.mean((1, 2, 3))


class GroupWiper(Wiper):
    groupwise = True


class LateWiper(Wiper):
    def submit(self, x: Tensor, prompts: Sequence[str]) -> Future[Tensor]:
        future = Future[Tensor]()
        future.set_result(self(x, prompts))
        return future


@pytest.mark.parametrize(
    "make",
    [
        lambda: function(wiped),
        lambda: function(wiped_by_numpy),
        lambda: function(wiped_by_data),
        Wiper,
        GroupWiper,
        LateWiper,
    ],
    ids=["function", "numpy", "data", "class", "groupwise", "later"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_change_of_the_images_stays_the_rewards_own(make: Callable[[], Reward], first: bool) -> None:
    """Whatever the way and the order, the other reward sees the images as they were, and so does all that
    comes after."""
    x, own = images(), make()
    before, fair = x.clone(), Brightness()(x, PROMPTS)
    rewards = (
        {"mine": own, "brightness": Brightness()} if first else {"brightness": Brightness(), "mine": own}
    )
    both = WeightedSum(rewards, dict.fromkeys(rewards, 1.0), group=3)
    for _ in range(2):
        assert torch.equal(both.score(x, PROMPTS)["brightness"], fair) and torch.equal(x, before)


def test_a_change_in_place_keeps_the_gradient() -> None:
    """Of a differentiable reward it is the gradient of what it computes; the other reward's is its own."""

    def doubled(x: Tensor, prompts: Sequence[str]) -> Tensor:
        return x.mul_(2).square().mean((1, 2, 3))

    leaf = images().requires_grad_()
    x = leaf * 1.0
    rewards = {"mine": function(doubled, differentiable=True), "brightness": Brightness()}
    total, _ = WeightedSum(rewards, {"mine": 3.0, "brightness": 1.0})(x, PROMPTS)
    total.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, (24 * leaf.detach() + 1) / 192)


def test_a_change_that_breaks_the_rewards_own_gradient_is_told() -> None:
    """torch's words, with the reward's name, at the first batch."""
    mine = WeightedSum(
        {"mine": function(lambda x, p: x.mul_(x).mean((1, 2, 3)), differentiable=True)}, {"mine": 1.0}
    )
    with pytest.raises(
        RewardError, match=r"reward mine \(.*\) raised RuntimeError: .* modified by an inplace operation"
    ):
        mine(images().requires_grad_() * 1.0, PROMPTS)


def test_alignlabs_own_change_nothing() -> None:
    """They are given the images themselves, without a copy, and leave them, and every setting, as they
    were."""
    x = images(48)
    before = x.clone()
    own: list[Reward] = [
        Aesthetic("emoji_aesthetic"),
        Brightness(),
        ClipDiversity("emoji_clip"),
        ClipScore("emoji_clip"),
        Colour("red"),
        JpegRate(),
        JpegSize(),
        Preference("emoji_preference"),
        TrueAesthetic(),
        TruePreference(),
    ]
    for reward in own:
        assert reward(x, PROMPTS).shape == (3,) and torch.equal(x, before), type(reward).__name__
    seen = []

    class Watched(Brightness):
        def __call__(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.append(x.data_ptr())
            return super().__call__(x, prompts)

    theirs = type("Watched", (Watched,), {"__module__": "alignlab.rewards.brightness"})()
    WeightedSum({"own": theirs}, {"own": 1.0}).score(x, PROMPTS)
    WeightedSum({"mine": Watched()}, {"mine": 1.0}).score(x, PROMPTS)
    assert seen[0] == x.data_ptr() != seen[1]


def test_a_change_of_the_prompts_stays_the_rewards_own() -> None:
    class Emptier:
        differentiable, unit = False, "u"

        def __call__(self, x: Tensor, prompts: list[str]) -> Tensor:
            prompts.clear()
            return torch.zeros(len(x))

    prompts = list(PROMPTS)
    both = WeightedSum(
        {"mine": Emptier(), "later": function(lambda x, p: [float(len(w)) for w in p])},
        {"mine": 1.0, "later": 1.0},
    )
    assert both.score(images(), prompts)["later"].tolist() == [5, 7, 6] and prompts == list(PROMPTS)


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts back what a failing test would leave behind."""
    dtype, threads, home = torch.get_default_dtype(), torch.get_num_threads(), os.getcwd()
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    os.chdir(home)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_the_process_are_set_back(fails: bool, tmp_path: Path) -> None:
    """Gradient mode, default dtype and device, threads, folder; also where the reward raises. The next reward
    keeps its gradient."""

    def meddler(x: Tensor, prompts: Sequence[str]) -> Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(7)
        os.chdir(tmp_path)
        return x[10:].mean(3)[0] if fails else torch.ones(len(x), device="cpu")

    def found() -> tuple[Any, ...]:
        flags = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
        return *flags, torch.get_num_threads(), os.getcwd()

    before, x = found(), images().requires_grad_()
    both = WeightedSum(
        {"mine": function(meddler), "brightness": Brightness()}, {"mine": 1.0, "brightness": 1.0}
    )
    if fails:
        with pytest.raises(RewardError, match="reward mine"):
            both(x, PROMPTS)
    else:
        total, _ = both(x, PROMPTS)
        assert torch.autograd.grad(total.sum(), x)[0].unique().tolist() == pytest.approx([1 / 192])
    assert found() == before


# -- what a reward returns


@pytest.mark.parametrize(
    "answer",
    [
        (torch.tensor([1.0, 2.0, 3.0]), {"k": 1}),
        ([1.0, 2.0, 3.0], {}),
        (np.array([1.0, 2.0, 3.0]), None),
        (torch.tensor([1.0, 2.0, 3.0]), ({}, {}, {})),
        ((1.0, 2.0, 3.0), [{"a": 1}]),
        [np.float64(1), np.float16(2), np.int64(3)],
        [torch.tensor(1.0), 2, np.float32(3)],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3], dtype=np.uint8),
        np.ma.array([1.0, 2.0, 3.0], mask=False),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])),
    ],
    ids=repr,
)
def test_rows_of_numbers_are_taken(answer: Any) -> None:
    """Alone, or with the metadata that TRL and ddpo-pytorch return beside them; of a class as of a function;
    without a graph."""
    assert scored(lambda x, p: answer) == [1, 2, 3]
    kind = type("Mine", (), {"differentiable": False, "unit": "u", "__call__": lambda self, x, p: answer})
    values = WeightedSum({"mine": kind()}, {"mine": 1.0}).score(images(), PROMPTS)["mine"]
    assert values.tolist() == [1, 2, 3] and values.dtype == torch.float32 and not values.requires_grad


def test_two_numbers_are_no_metadata() -> None:
    """A pair of numbers for two images stays a pair of numbers."""
    pair = WeightedSum({"mine": function(lambda x, p: (0.5, 1.5))}, {"mine": 1.0})
    assert pair.score(images()[:2], PROMPTS[:2])["mine"].tolist() == [0.5, 1.5]
    assert scored(lambda x, p: [True, False, True]) == [1, 0, 1]
    assert scored(lambda x, p: torch.tensor([1.0, 0.0, 3.0]).to_sparse()) == [1, 0, 3]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.tensor([1j, 2, 3]), "returned complex numbers, which have no order"),
        (np.array([1j, 2, 3]), "returned complex numbers, which have no order"),
        ([1.0, 2.0, 3j], "returned complex numbers, which have no order"),
        ([1.0, None, 3.0], "returned list that holds NoneType"),
        (["1", "2", "3"], "returned list that holds str"),
        ("123", "returned str for 3 images"),
        (None, "returned NoneType for 3 images"),
        ({"cat": 1.0}, "returned dict for 3 images"),
        ({1.0, 2.0, 3.0}, "returned set for 3 images"),
        ((x for x in (1.0, 2.0, 3.0)), "returned generator for 3 images"),
        ([[1.0], [2.0, 3.0], []], "returned a list that is no row of numbers"),
        ([torch.ones(1), torch.ones(2), torch.ones(3)], "returned a list that is no row of numbers"),
        ([torch.tensor(1.0), None, torch.tensor(1.0)], "returned a list that is no row of numbers"),
        (0.5, r"returned \(\) for 3 images"),
        ([1.0, 2.0], r"returned \(2,\) for 3 images; it must return a tensor of shape \(3,\)"),
        (torch.ones(3, 1), r"returned \(3, 1\) for 3 images"),
        ((torch.ones(3), torch.ones(3)), r"returned \(2, 3\) for 3 images"),
        ((torch.ones(2), {}), r"returned \(2,\) for 3 images"),
        ((1.0, {}), "returned tuple that holds dict"),
        ([1.0, float("nan"), 3.0], "is nan for image 1 of prompt 'a dog !'"),
        ([1.0, 2.0, 1e300], "is inf for image 2 of prompt 'a lion'"),
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), "is nan for image 1 of prompt 'a dog !'"),
        (torch.ones(3, device="meta"), r"raised NotImplementedError"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_row_of_numbers_is_refused(answer: Any, said: str) -> None:
    """In a sentence that says what came and from which reward."""
    with pytest.raises(RewardError, match=rf"^reward mine.* {said}"):
        scored(lambda x, p: answer)


def test_a_buffer_that_is_filled_again() -> None:
    """Earlier values stay what they were."""
    buffer = np.zeros(3)

    def counting(x: Tensor, prompts: Sequence[str]) -> np.ndarray:
        buffer[:] += 1
        return buffer

    mine = WeightedSum(
        {"mine": function(counting), "tensor": function(lambda x, p: torch.from_numpy(buffer).float())},
        {"mine": 1.0, "tensor": 1.0},
    )
    first, second = mine.score(images(), PROMPTS), mine.score(images(), PROMPTS)
    assert first["mine"].tolist() == [1, 1, 1] and second["mine"].tolist() == [2, 2, 2]


def test_a_group_names_the_image_of_the_batch() -> None:
    """An image of the second group that has no finite reward keeps its number in the batch."""
    odd = function(lambda x, p: [float("nan") if w == "a lion" else 1.0 for w in p], groupwise=True)
    with pytest.raises(NonFinite) as caught:
        WeightedSum({"mine": odd}, {"mine": 1.0}, group=2).score(
            torch.rand(4, 3, 8, 8), ["a cat", "a cat", "a dog", "a lion"]
        )
    assert caught.value.rows == (3,)


# -- how a reward ends


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SystemExit(0), r"raised SystemExit: 0 \(test_rewards.py, line \d+\); a reward returns its values"),
        (SystemExit(), r"raised SystemExit \(test_rewards.py, line \d+\); a reward returns its values"),
        (GeneratorExit(), "raised GeneratorExit"),
        (StopIteration("end"), "raised StopIteration: end"),
        (BaseException("odd"), "raised BaseException: odd"),
    ],
    ids=repr,
)
def test_a_reward_does_not_end_the_program(raised: BaseException, said: str) -> None:
    def ends(x: Tensor, prompts: Sequence[str]) -> Tensor:
        raise raised

    class Late:
        differentiable, unit = False, "u"

        def submit(self, x: Tensor, prompts: Sequence[str]) -> Future[Tensor]:
            future = Future[Tensor]()
            future.set_exception(raised)
            return future

        def __call__(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
            raise AssertionError

    with pytest.raises(RewardError, match=said):
        scored(ends)
    with pytest.raises(RewardError, match=said.partition(r" \(")[0]):
        WeightedSum({"mine": Late()}, {"mine": 1.0}).score(images(), PROMPTS)


def test_ctrl_c_is_no_fault_of_a_reward() -> None:
    """It ends the program while a reward computes as it does elsewhere."""

    def interrupted(x: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(interrupted)


MODULE = """
import sys
import torch

def seeds(images, prompts):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    images.zero_()
    return [0.0] * len(images)

def plain(images, prompts):
    return [0.0] * len(images)

def ends(images, prompts):
    sys.exit(0)

def three(images, prompts, metadata):
    return torch.zeros(len(images)), {}

class Meddler:
    differentiable, unit = False, "u"

    def __init__(self):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)

class Ends:
    differentiable, unit = False, "u"

    def __init__(self):
        sys.exit()
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bad_rewards.py").write_text(MODULE)
    (tmp_path / "a_script.py").write_text(
        "import sys\n\ndef score(images, prompts):\n    return [0.0]\n\nsys.exit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("bad_rewards", "a_script"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def mine(name: str, group: str = "reward") -> list[str]:
    keys = {"function": f"bad_rewards.{name}", "differentiable": "false", "unit": "u"}
    return [
        *(f"+{group}.mine.{key}={value}" for key, value in keys.items()),
        "allow_targets=[bad_rewards,a_script]",
    ]


def test_a_run_that_a_reward_ends_has_not_gone_well(desk: Path, tiny_sd: str, monkeypatch, capsys) -> None:
    """Code 2 and a sentence, where sys.exit(0) in a reward once ended it with code 0 and without a model."""
    words = [*tiny(tiny_sd, "algo=ddpo"), *mine("ends"), "output_dir=run"]
    assert command_line(monkeypatch, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "reward mine (bad_rewards.ends) raised SystemExit: 0 (bad_rewards.py, line 15)" in said
    assert not (desk / "run" / "summary.json").exists()


def test_a_held_out_reward_changes_no_number_of_a_run(desk: Path, tiny_sd: str, monkeypatch) -> None:
    """One that wipes the images, seeds torch and sets the default dtype: every number of the run is that of a
    run beside it."""
    words = [w for w in tiny(tiny_sd, "steps=1") if w != "steps=4"]
    found = []
    for name in ("plain", "seeds"):
        assert command_line(monkeypatch, *words, *mine(name, "eval_rewards"), f"output_dir={name}") == 0
        kept = [
            {k: v for k, v in line.items() if "second" not in k and "memory" not in k}
            for line in lines(desk / name)
        ]
        found.append((kept, json.loads((desk / name / "summary.json").read_text())["final"]))
    assert found[0] == found[1]


def test_what_ends_the_program_before_a_run(desk: Path) -> None:
    """A script without a guard, a constructor that exits, a scorer of three arguments: a sentence each, and
    no SystemExit."""
    common = {"differentiable": False, "unit": "u"}
    target = "alignlab.rewards.function.Function"

    def problem(node: dict[str, Any]) -> str:
        (sentence,) = node_problems("reward.mine", node, allowed=["bad_rewards", "a_script"])
        return sentence

    script = problem({"_target_": target, "function": "a_script.score", **common})
    assert (
        "cannot be imported: a_script ends the program (sys.exit(0)); write what is a script under if "
        "__name__" in script
    )
    ends = {"_target_": "bad_rewards.Ends"}
    assert problem(ends) == "bad_rewards.Ends ends the program (sys.exit())"
    with pytest.raises(ConfigError, match="ends the program"):
        build(ends)
    three = problem({"_target_": target, "function": "bad_rewards.three", **common})
    assert (
        "bad_rewards.three takes (images, prompts, metadata) and cannot be called as function(images, "
        "prompts)" in three
    )


@pytest.mark.usefixtures("settings")
def test_a_module_and_a_constructor_change_no_setting(desk: Path) -> None:
    """Scripts that score often begin with torch.set_grad_enabled(False), and are imported before a run
    begins."""
    (desk / "a_script.py").write_text(
        "import torch\n\ntorch.set_grad_enabled(False)\ntorch.set_num_threads(5)\nscore = print\n"
    )
    threads = torch.get_num_threads()
    assert resolve("a_script.score") is print
    build({"_target_": "bad_rewards.Meddler"})
    assert (
        torch.is_grad_enabled()
        and torch.get_num_threads() == threads
        and torch.get_default_dtype() == torch.float32
    )


# -- means


def test_means_are_taken_in_float64() -> None:
    """Large values with a small spread: a float32 sum of a million of them would be off in the fourth
    digit."""
    values = torch.full((2**20,), 16777.216) + torch.arange(2**20) % 2
    seen = Measured(images=torch.rand(1, 3, 2, 2), rewards={"mine": values}, statistics={}, lpips=[])
    numbers = seen.numbers(lambda raw: raw["mine"])
    exact = values.double()
    assert numbers["mine"] == exact.mean().item() and numbers["mine_std"] == exact.std(correction=0).item()
    assert numbers["reward"] == exact.mean().item()


def test_a_normalised_reward_keeps_its_digits() -> None:
    """A mean of ten million and a spread of one: (r - mean)/std is exact, where float32 would round the mean
    by half a spread."""
    base = 10_000_000 + torch.arange(4).float()
    mine = WeightedSum({"mine": function(lambda x, p: base[:3])}, {"mine": 1.0}, {"mine"})
    mine.calibrate({"mine": base})
    expected = (base[:3].double() - base.double().mean()) / base.double().std(correction=0)
    torch.testing.assert_close(mine.combine({"mine": base[:3]}), expected.float(), rtol=1e-6, atol=0)
