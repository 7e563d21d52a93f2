"""Learned rewards: the folder they are kept in, published head files, and fitting them to what people
said."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from alignlab.rewards.aesthetic import Aesthetic
from alignlab.rewards.clip import Clip
from alignlab.rewards.heads import Agreement, Mlp, mlp_of, save
from alignlab.rewards.preference import Preference
from alignlab.rewards.train import Fit

CPU = torch.device("cpu")
EPOCHS = 8


class Flat(Dataset):
    """Flat pictures of random colours: rated by their redness, or paired by it. Held in a list, so that
    encoding is the test's."""

    def __init__(self, kind: str, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        colours = torch.rand(n, 2, 3, generator=generator)
        pictures = colours[..., None, None].expand(-1, -1, -1, 48, 48)
        red = colours[..., 0] - colours[..., 1:].mean(-1)
        if kind == "aesthetic":
            self.items = [(pictures[k, 0], 5 + 4 * red[k, 0].item()) for k in range(n)]
        else:
            self.items = [(*pictures[k], "a cat", float(red[k, 0] > red[k, 1])) for k in range(n)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int):
        return self.items[k]


def fitted(kind: str, folder, **options):
    fit = Fit(kind, Clip("emoji_clip"), **options)
    lines: list[dict[str, float]] = []
    numbers = fit.run(
        Flat(kind, 96, 0),
        Flat(kind, 60, 1),
        epochs=EPOCHS,
        lr=4e-3,
        batch_size=16,
        weight_decay=0.0,
        device=CPU,
        tell=lines.append,
    )
    about = {"kind": kind, "clip": "emoji_clip", "relu": True, **numbers}
    save(folder, fit.head, about, {name: weight.data for name, weight in fit.tuned.items()})
    return fit, numbers, lines


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize(("kind", "reward"), [("aesthetic", Aesthetic), ("preference", Preference)])
def test_a_rule_is_learned_and_kept(kind, reward, blocks, tmp_path) -> None:
    """On unseen pictures the fitted reward ranks by the rule; read back from its folder it says what it said,
    to half precision."""
    fit, numbers, lines = fitted(
        kind, tmp_path / "made", blocks=blocks, **({"hidden": (16,)} if kind == "aesthetic" else {})
    )
    assert numbers["held_out/spearman" if kind == "aesthetic" else "held_out/accuracy"] > 0.8
    assert [line["epoch"] for line in lines] == [*range(1, EPOCHS + 1)] and lines[-1]["loss"] < lines[0][
        "loss"
    ]
    assert (tmp_path / "made" / "clip.safetensors").exists() == (blocks > 0)
    images = torch.stack([item[0] for item in Flat(kind, 12, 2)]).requires_grad_()
    made = reward(str(tmp_path / "made"))
    score = made(images, ["a cat"] * 12)
    with torch.no_grad():
        embedding = fit.clip.images(images)
        said = (
            fit.head(embedding)
            if kind == "aesthetic"
            else fit.head(embedding, fit.clip.texts(["a cat"] * 12, CPU))
        )
    torch.testing.assert_close(score.detach(), said, rtol=2e-2, atol=2e-2)
    (slope,) = torch.autograd.grad(score.sum(), images)
    assert made.differentiable and slope.abs().max() > 0
    assert not any(p.requires_grad for p in made.head.parameters())


def test_what_stands_between_the_layers_must_be_said(tmp_path) -> None:
    """The weights do not tell. Of a single layer nothing has to be said."""
    for hidden in ((16,), ()):
        folder = tmp_path / str(len(hidden))
        save(folder, Mlp([96, *hidden, 1], relu=True), {"kind": "aesthetic", "clip": "emoji_clip"}, {})
        if hidden:
            with pytest.raises(
                ValueError, match=rf"^path={folder}: reward.json does not say whether ReLU .*write \"relu\""
            ):
                Aesthetic(str(folder))
        else:
            assert Aesthetic(str(folder)).input_size == 48


def test_only_what_is_trained_moves() -> None:
    """blocks=1 changes the tower's last block, its closing norm and its projection; blocks=0 changes no
    weight of the CLIP."""
    before = Clip("emoji_clip").model.state_dict()
    for blocks in (0, 1):
        fit = Fit("preference", Clip("emoji_clip"), blocks=blocks)
        pairs = Flat("preference", 16, 0)
        fit.run(
            pairs,
            pairs,
            epochs=1,
            lr=3e-3,
            batch_size=8,
            weight_decay=0.0,
            device=CPU,
            tell=lambda line: None,
        )
        moved = {
            name
            for name, value in fit.clip.model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert moved <= {*fit.tuned} and bool(moved) == (blocks > 0)
        last = len(fit.clip.model.visual.transformer.resblocks) - 1
        prefixes = (f"visual.transformer.resblocks.{last}.", "visual.ln_post.", "visual.proj")
        assert all(name.startswith(prefixes) for name in fit.tuned)


def test_bradley_terry_by_hand() -> None:
    """The loss of a batch is -mean [y log s(r0 - r1) + (1 - y) log s(r1 - r0)]; ties count a half for each;
    accuracy leaves them out."""
    fit = Fit("preference", Clip("emoji_clip"))
    score, label = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.5, 0.0])
    s = torch.sigmoid
    by_hand = (
        -(s(score[0]).log() + 0.5 * s(score[1]).log() + 0.5 * s(-score[1]).log() + s(-score[2]).log()) / 3
    )
    torch.testing.assert_close(fit._loss(score, label), by_hand)
    same = [(torch.zeros(3, 48, 48), torch.ones(3, 48, 48), "a cat", y) for y in (1.0, 0.0, 0.5)]
    numbers = fit.measure(fit._encoded(same, 2, CPU), 2, CPU)
    assert numbers["held_out/accuracy"] == 0.5  # two clear pairs of the same pictures with opposite labels


def test_agreement_starts_as_the_cosine() -> None:
    """Before training: exp(logit_scale) times the cosine of the CLIP's own embeddings."""
    image, text = torch.randn(2, 4, 8)
    cosine = nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(Agreement(8)(image, text), 10 * cosine)


def test_laions_file_is_read() -> None:
    """A state dict that counts dropouts (layers.0, 2, 4, 6, 7), in any order, gives the published affine map;
    relu=True does not."""
    theirs = nn.Sequential(
        nn.Linear(12, 9),
        nn.Dropout(0.2),
        nn.Linear(9, 7),
        nn.Dropout(0.2),
        nn.Linear(7, 5),
        nn.Dropout(0.1),
        nn.Linear(5, 4),
        nn.Linear(4, 1),
    ).eval()
    state = {f"layers.{k}": v for k, v in reversed(list(theirs.state_dict().items()))}
    x = torch.randn(6, 12)
    torch.testing.assert_close(mlp_of(state, relu=False)(x), theirs(x)[:, 0])
    assert not torch.allclose(mlp_of(state, relu=True)(x), theirs(x)[:, 0])
    assert [layer.out_features for layer in Mlp([12, 3, 1], relu=True).layers] == [3, 1]


@pytest.mark.parametrize("name", ["emoji_preference", "emoji_aesthetic"])
def test_shipped_rewards(name) -> None:
    """They load by name, and their cards keep the promise: pair accuracy at least 90 %, Spearman at least 0.9
    on held-out data."""
    reward = (Preference if name == "emoji_preference" else Aesthetic)(name)
    card = json.loads(
        (
            __import__("pathlib").Path(__import__("alignlab").__file__).parent
            / "assets"
            / name
            / "reward.json"
        ).read_text()
    )
    assert reward(torch.rand(2, 3, 48, 48), ["a cat", "a dog"]).isfinite().all()
    assert (
        card["held_out/accuracy" if name == "emoji_preference" else "held_out/spearman"] >= 0.9
        and card["items"]["held out"] >= 500
    )


def test_mistakes(tmp_path) -> None:
    """No folder, a file that lacks, another kind, a tower without that many blocks: each is one sentence with
    its mend."""
    with pytest.raises(
        FileNotFoundError, match=r"path=/nowhere: .* make one with python -m alignlab.train_reward"
    ):
        Preference.check("/nowhere")
    (tmp_path / "half").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lacks reward.json and head.safetensors"):
        Preference.check(str(tmp_path / "half"))
    save(tmp_path / "made", Agreement(4), {"kind": "preference", "clip": "emoji_clip"}, {})
    with pytest.raises(
        ValueError, match=r"holds a reward of kind preference, not aesthetic; choose reward=preference"
    ):
        Aesthetic.check(str(tmp_path / "made"))
    with pytest.raises(ValueError, match=r"blocks=9: the image tower has 4 transformer blocks"):
        Fit("preference", Clip("emoji_clip"), blocks=9)
