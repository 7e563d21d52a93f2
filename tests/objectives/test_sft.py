"""Supervised fine-tuning: the model's own training loss, its weights, and the bookkeeping of a run."""

import json

import numpy as np
import pytest
import torch

from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import noise_key
from alignlab.objectives.regression import Examples
from alignlab.objectives.sft import SFT
from alignlab.train import train
from tests.conftest import tiny_policy
from tests.linear_gaussian import D, World
from tests.objectives.updates import SCHEDULERS, distance, exact_policy, updates_of
from tests.running import command_line, configured, lines, pairs, same_weights, stopped_and_resumed, tiny

IMAGES = 9


@pytest.fixture
def shelf(tmp_path) -> str:
    """A folder of captioned pictures: the winners and losers of pairs."""
    table = pairs(tmp_path / "shelf", ties=0)
    rows = [json.loads(line) for line in open(table)]
    told = [
        {"file_name": row[which], "text": f"{row['prompt']}, {which}"}
        for row in rows
        for which in ("winner", "loser")
    ]
    (tmp_path / "shelf" / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    (tmp_path / "shelf" / "pairs.jsonl").unlink()
    return str(tmp_path / "shelf")


@pytest.mark.parametrize("gamma", [None, 0.7, 5.0])
@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_the_loss_is_the_formula(prediction, gamma, shelf) -> None:
    """On the linear world, image by image in float64, for every kind of model. Weighted, it is min(SNR,
    gamma) times the squared error of the x_0 that the prediction stands for."""
    scheduler = SCHEDULERS[prediction]
    world, process = World(scheduler).randomise(0.4), ForwardProcess.of(scheduler)
    latents = torch.randn(1, IMAGES, 1, 1, D, generator=torch.Generator().manual_seed(0))
    key = noise_key([str(k) for k in range(IMAGES)], seed=0, stream="t")
    batch = Examples(process=process, latents=latents, prompts=("",) * IMAGES, noise=key)
    loss, metrics = SFT(data=shelf, min_snr=gamma).loss(world, batch)
    uniform, noise, plain, weighted = key.uniform(-2), key.normal(0, (1, 1, D)).double()[:, 0, 0], [], []
    for m in range(IMAGES):
        row = int(uniform[m] * 1000)
        if prediction == "flow":
            s = 3.0 * (1 - row / 1000) / (1 + 2.0 * (1 - row / 1000))
            alpha, sigma = 1 - s, s
        else:
            abar = float(scheduler.alphas_cumprod[row].double())
            alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        (G,), (b,) = world.exact(process.timesteps[row : row + 1])
        x0, eps = latents[0, m, 0, 0].double(), noise[m]
        x = alpha * x0 + sigma * eps
        out = G @ x + b + world.W[0].detach() @ x + world.omega[0].detach()
        target = {"epsilon": eps, "sample": x0, "flow": eps - x0, "v_prediction": alpha * eps - sigma * x0}[
            prediction
        ]
        plain.append(float((target - out).square().sum() / D))
        said = {
            "epsilon": (x - sigma * out) / alpha,
            "sample": out,
            "flow": x - sigma * out,
            "v_prediction": alpha * x - sigma * out,
        }[prediction]
        weighted.append(min((alpha / sigma) ** 2, gamma or 0) * float((x0 - said).square().sum() / D))
    assert loss.item() == pytest.approx(np.mean(plain if gamma is None else weighted), rel=1e-4)
    assert metrics["sft/error"].item() == pytest.approx(np.mean(plain), rel=1e-4)
    assert world.references == 0 and world.rows == IMAGES  # one branch, and no reference


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_errors_by_noise(prediction, shelf) -> None:
    """Each image counts in one third of the noise levels, the noisiest called high, and the thirds make up
    the whole."""
    world, process = World(SCHEDULERS[prediction]), ForwardProcess.of(SCHEDULERS[prediction])
    key = noise_key(["a"] * 300, seed=0, stream="t")
    batch = Examples(process=process, latents=torch.randn(1, 300, 1, 1, D), prompts=("",) * 300, noise=key)
    _, metrics = SFT(data=shelf).loss(world, batch)
    parts = {name: metrics[f"sft/error_{name}_noise"] for name in ("low", "middle", "high")}
    counted = {name: ~part.isnan() for name, part in parts.items()}
    assert (sum(where.long() for where in counted.values()) == 1).all()
    assert sum(float(part.nansum()) for part in parts.values()) / 300 == pytest.approx(
        metrics["sft/error"].item()
    )
    sigma = process.sigma[batch.levels]
    assert (
        sigma[counted["low"]].max() < sigma[counted["middle"]].min()
        and sigma[counted["middle"]].max() < sigma[counted["high"]].min()
    )


def test_micro_batch_size_does_not_matter(tiny_sd, shelf) -> None:
    """Loss and gradient of every update agree to 1e-9 (float64) for micro-batches of 8 images, 3 and 1; so do
    dropped prompts."""
    policy, options = (
        exact_policy(tiny_sd),
        {"images": 16, "updates_per_epoch": 2, "prompt_dropout": 0.4, "min_snr": 5.0},
    )
    whole = updates_of(policy, SFT(data=shelf, **options), [], 8)
    assert len(whole) == 2
    for size in (3, 1):
        for (loss, grads), (loss_whole, grads_whole) in zip(
            updates_of(policy, SFT(data=shelf, **options), [], size), whole, strict=True
        ):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


def test_passes_and_draws(tiny_sd, shelf) -> None:
    """Every image once before any twice, with its caption; a second turn, or the same caption elsewhere, has
    draws of its own."""
    policy, seen, noises = tiny_policy(tiny_sd, size=0), [], []
    objective = SFT(data=shelf, images=8)
    for epoch in range(3):  # 24 images of 12
        if epoch == 1:
            state, objective = objective.state_dict(), SFT(data=shelf, images=8)
            objective.load_state_dict(state)
        (update,) = objective.updates(policy, iter([]), 3, np.random.default_rng(epoch))
        for _, batch in update.batches:
            seen += [(name, prompt) for name, prompt in zip(batch.noise.prompts, batch.prompts, strict=True)]
            noises += batch.noise.normal(0, ()).tolist()
    assert (
        len({*seen[:12]}) == len({*seen[12:]}) == 12
        and {*seen[:12]} == {*seen[12:]}
        and seen[:12] != seen[12:]
    )
    assert all(prompt.endswith(name.split("_")[0]) for name, prompt in seen) and len({*noises}) == 24
    assert objective.epoch_metrics() == {"sft/images": 12.0, "sft/ties": 0.0}


def test_a_stream_is_not_kept(tiny_sd, tmp_path) -> None:
    """Of a stream no latents stay in memory, and it goes on where it was; of known images each is encoded
    once."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    table = pairs(tmp_path / "pairs")
    pictures = [{"bytes": path.read_bytes()} for path in sorted((tmp_path / "pairs").glob("*.png"))]
    parquet.write_table(
        arrow.table({"image": pictures, "text": [f"image {k}" for k in range(12)]}), tmp_path / "a.parquet"
    )
    policy, count, seen = tiny_policy(tiny_sd, size=0), [], []
    encode = policy.family.encode_images
    policy.family.encode_images = lambda images: count.append(len(images)) or encode(images)
    objective = SFT(data=str(tmp_path / "a.parquet"), streaming=True, shuffle_buffer=4, images=8)
    for epoch in range(3):
        if epoch == 2:
            state, objective = (
                objective.state_dict(),
                SFT(data=str(tmp_path / "a.parquet"), streaming=True, shuffle_buffer=4, images=8),
            )
            objective.load_state_dict(state)
        (update,) = objective.updates(policy, iter([]), 8, np.random.default_rng(epoch))
        seen += [prompt for _, batch in update.batches for prompt in batch.prompts]
    assert len(count) == 24 and sorted(seen[:12]) == sorted(seen[12:]) and objective.epoch_metrics() == {}
    known = SFT(data=table, images=12)
    for epoch in range(2):
        (update,) = known.updates(policy, iter([]), 8, np.random.default_rng(epoch))
        list(update.batches)
    assert len(count) == 24 + 6 and known.epoch_metrics() == {
        "sft/images": 6.0,
        "sft/ties": 1.0,
    }  # winners of pairs


def test_it_learns_the_images(tiny_sd, shelf) -> None:
    """Epochs with draws of their own lower the error of the images on other draws by a fifth."""
    policy = tiny_policy(tiny_sd, full=True)
    (update,) = SFT(data=shelf, images=96).updates(policy, iter([]), 96, np.random.default_rng(99))
    ((_, fresh),) = update.batches
    objective, descent = SFT(data=shelf, images=12), torch.optim.Adam(policy.parameters(), lr=3e-3)

    def error() -> float:
        with torch.no_grad():
            return objective.loss(policy, fresh)[0].item()

    before = error()
    for epoch in range(20):
        (update,) = objective.updates(policy, iter([]), 12, np.random.default_rng(epoch))
        ((_, batch),) = update.batches
        descent.zero_grad()
        objective.loss(policy, batch)[0].backward()
        descent.step()
    assert error() < 0.8 * before


def test_a_run(tiny_sd, shelf, tmp_path) -> None:
    """Nothing is sampled or scored in training; the card says what was learned from."""
    train(configured(*tiny(tiny_sd, "algo=sft", f"algo.data={shelf}", "steps=2")), tmp_path / "run")
    epochs = lines(tmp_path / "run")
    assert all(line["loss"] == line["sft/error"] and line["updates"] == 1 for line in epochs)
    assert all(
        line["reward_queries"] == 0 and "reward/mean" not in line and line["kl"] is None for line in epochs
    )
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert (
        "tuned on captioned images with SFT" in card and "2 epochs of 4 images" in card and "(shelf)" in card
    )


def test_resume_is_exact(tiny_sd, shelf, tmp_path, monkeypatch) -> None:
    """Stopped before its third epoch and resumed, a run ends where the undisturbed one did, bit for bit."""
    words = (
        "algo=sft",
        f"algo.data={shelf}",
        "algo.updates_per_epoch=2",
        "algo.prompt_dropout=0.3",
        "samples_per_step=8",
    )
    c = configured(*tiny(tiny_sd, *words))
    train(c, tmp_path / "one")
    stopped_and_resumed(c, tmp_path / "two", monkeypatch, before=3)
    assert lines(tmp_path / "one") == lines(tmp_path / "two") and same_weights(
        tmp_path / "one", tmp_path / "two"
    )


def test_the_command(tiny_sd, shelf, tmp_path, monkeypatch, capsys) -> None:
    """It trains by the real command, and others go on from what it learned; what cannot be is one
    sentence."""
    words = [*tiny(tiny_sd, "algo=sft", f"algo.data={shelf}"), "steps=1"]
    assert command_line(monkeypatch, *words, f"output_dir={tmp_path / 'run'}") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples_seen"] == 4
    second = [
        *tiny(tiny_sd, "algo=dpo_online"),
        "steps=1",
        "prompts.per_prompt=2",
        f"init_from={tmp_path / 'run'}",
    ]
    assert (
        command_line(monkeypatch, *second, "algo.ref_update_every=9", f"output_dir={tmp_path / 'second'}")
        == 0
    )
    capsys.readouterr()
    for word, said in {
        "algo.images=8": "algo.images=8 is not samples_per_step=4",
        "kl_coeff=0.1": "kl_coeff=0.1: SFT has no KL term",
        "algo.min_snr=0": "algo.min_snr=0 must be positive",
        "algo.shuffle_buffer=0": "algo.shuffle_buffer=0 must be at least 1",
        "algo.streaming=true": "streaming=true is for shards",
        "algo.split=test": "split=test, but there is no folder of that name",
    }.items():
        assert command_line(monkeypatch, *words, word, f"output_dir={tmp_path / 'a'}") == 2
        assert said in capsys.readouterr().err
    for path in (tmp_path / "shelf").glob("*.png"):
        path.write_bytes(b"no image")
    assert command_line(monkeypatch, *words, f"output_dir={tmp_path / 'b'}") == 2
    said = capsys.readouterr().err
    assert "is no image" in said and "Traceback" not in said


def test_other_data_cannot_go_on(shelf, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"algo\.data=.* holds other examples than the run began with"):
        SFT(data=pairs(tmp_path / "other")).load_state_dict(SFT(data=shelf).state_dict())
