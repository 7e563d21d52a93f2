"""Every family on a tiny random pipeline of diffusers' own class: our images are the pipeline's, the
invariants of the engine hold, every objective trains, and what is saved is what diffusers loads."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from alignlab.config.build import ConfigError
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import FIRST
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, replay, rollout
from alignlab.fast.frozen_layers import freeze
from alignlab.models.lora import LoRA
from alignlab.train import train
from tests.engine.exact import Noise64, Policy64, pixels
from tests.linear_gaussian import double
from tests.models.sampling import FAMILIES, PROMPTS, SAMPLERS, images_of_diffusers, key, sampler_of
from tests.running import command_line, configured, pairs
from tests.running import tiny as tiny_run

EVERY = pytest.mark.parametrize("name", FAMILIES)


def policy_on(folders: dict[str, Path], name: str, size: float = 0.3) -> Policy:
    """With a random LoRA whose alpha is not its rank."""
    family, options = FAMILIES[name]
    torch.manual_seed(1)
    policy = Policy(family(str(folders[name]), **options), lora=LoRA(rank=4, alpha=2), checkpointing=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, size)
    return policy


@EVERY
@torch.no_grad()
def test_images_are_diffusers_own_with_the_saved_lora(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The base model's images equal the pipeline's, and the policy's those of the pipeline with the LoRA that
    was saved (alpha is not the rank), within 1e-4; the LoRA moves them by more than 100 times that. What is
    read back is the same LoRA."""
    policy = policy_on(folders, name)
    policy.family.pipe.set_progress_bar_config(disable=True)
    sampler, first = sampler_of(policy, name), key().normal(FIRST, policy.latent_shape)
    mine = rollout(policy, sampler, key()).images
    with policy.reference():
        base = rollout(policy, sampler, key()).images
    policy.save(tmp_path)
    pipe: Any = getattr(diffusers, type(policy.family).pipeline).from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(base, images_of_diffusers(pipe, name, first), rtol=0, atol=1e-4)
    pipe.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(mine, images_of_diffusers(pipe, name, first), rtol=0, atol=1e-4)
    assert (mine - base).abs().max() > 0.01
    state, config = policy.family.read_lora(tmp_path)
    assert config["rank"] == 4 and config["alpha"] == 2
    for weight, expected in zip(state.values(), (policy.state_dict()[k] for k in state), strict=True):
        assert torch.equal(weight, expected)


@EVERY
@torch.no_grad()
def test_images_are_encoded_as_they_are_decoded(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of the network's shape from images of `image_size`, those of diffusers' inpainting pipelines
    but for their draw from the posterior; decoding them is the VAE's own way there and back."""
    family = policy_on(folders, name).family
    images = torch.rand(2, 3, *family.image_size)
    latents = family.encode_images(images)
    assert latents.shape[1:] == family.latent_shape and family.decode(latents).shape == images.shape
    vae = family.pipe.vae
    there = vae.encode(2 * images - 1).latent_dist.mean
    torch.testing.assert_close(
        family.decode(latents), (vae.decode(there).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5
    )
    inpainting: Any = getattr(diffusers, type(family).pipeline.replace("Pipeline", "InpaintPipeline"))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    theirs = inpainting(**family.pipe.components)._encode_vae_image(2 * images - 1, generator=None)
    torch.testing.assert_close(latents, theirs, rtol=1e-5, atol=1e-6)


@EVERY
@torch.no_grad()
def test_the_ratio_is_1(name: str, folders: dict[str, Path]) -> None:
    """Replay at the rollout's shape gives its log-probs exactly; shuffled at micro-batch 3 the ratio is 1 to
    float32 round-off."""
    policy = policy_on(folders, name)
    sampler = sampler_of(policy, name, eta=0.7)
    record = rollout(policy, sampler, key())
    scored = sampler.scored.nonzero()[:, 0]
    assert len(scored) >= 3
    for i in scored:
        assert torch.equal(
            replay(policy, record, torch.arange(4), i.expand(4)).log_prob, record.log_probs[:, i]
        )
    rows, steps = torch.cartesian_prod(torch.arange(4), scored)[torch.randperm(4 * len(scored))].unbind(1)
    again = torch.cat(
        [replay(policy, record, rows[k : k + 3], steps[k : k + 3]).log_prob for k in range(0, len(rows), 3)]
    )
    assert ((again - record.log_probs[rows, steps]).exp() - 1).abs().max() <= 2e-5


@EVERY
@torch.no_grad()
def test_the_reference_is_the_base_model(name: str, folders: dict[str, Path]) -> None:
    """As diffusers computes it, and bit for bit with its layers frozen and laid out as a policy's are on a
    CPU; encoding does not depend on the batch."""
    family, options = FAMILIES[name]
    base, policy = family(str(folders[name]), **options), policy_on(folders, name)
    cond = policy.encode(PROMPTS)
    assert all(torch.equal(policy.encode(PROMPTS[1:2]).text[k], v[1:2]) for k, v in cond.text.items())
    x, t = torch.randn(4, *policy.latent_shape), torch.tensor([981.0, 500.0, 20.0, 1.0])
    with policy.reference():
        torch.testing.assert_close(
            policy.branches(x, t, cond, 1.0)[0], base.denoise(x, t, cond.text), rtol=1e-4, atol=1e-4
        )
        torch.nn.Module.to(freeze(base.denoiser), memory_format=torch.channels_last)
        assert torch.equal(policy.branches(x, t, cond, 1.0)[0], base.denoise(x, t, cond.text))
    assert (policy.branches(x, t, cond, 1.0)[0] - base.denoise(x, t, cond.text)).abs().max() > 1e-3


@EVERY
def test_the_gradient_is_that_of_finite_differences(name: str, folders: dict[str, Path]) -> None:
    """Of a reward, through all steps and the VAE, in float64 along random directions of the LoRA."""
    policy: Any = policy_on(folders, name, size=0.05)
    policy.__class__ = Policy64
    for module in (*policy.family.frozen, policy.family.denoiser):
        module.double()
    policy.late = 10**6  # every step is moved
    sampler, noise = double(sampler_of(policy, name)), Noise64(**key().__dict__)
    record = rollout(policy, sampler, noise, gradients=Gradients.last(4, 4), store="image")
    grads = torch.autograd.grad(pixels(record.images).mean(), policy.parameters(), allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, policy.parameters(), strict=True)]
    h, rel = (1e-3, 5e-3) if name == "flux" else (3e-5, 1e-4)  # FLUX calculates places and times in float32
    for seed in range(2):
        torch.manual_seed(seed)
        direction, values = [torch.randn_like(p) for p in policy.parameters()], []
        for sign in (1, -1):
            policy.direction = [sign * h * d for d in direction]
            with torch.no_grad():
                values.append(float(pixels(rollout(policy, sampler, noise, store="image").images).mean()))
        policy.direction = None
        slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
        assert (
            slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=rel, abs=1e-9) and abs(slope) > 1e-6
        )


OBJECTIVES: dict[str, list[str]] = {
    "draft": ["algo=draft", "algo.k=2"],
    "draftp": ["algo=draftp", "algo.k=2"],
    "draft_lv": ["algo=draft", "algo.lv_samples=1"],
    "ddpo_sf": ["algo=ddpo", "algo.estimator=sf"],
    "ddpo_is": ["algo=ddpo", "algo.updates_per_epoch=2"],
    "rwr": ["algo=rwr", "algo.inner_epochs=1"],
    "dpo": ["algo=dpo", "algo.data={pairs}", "algo.beta=100"],
}


@EVERY
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(name: str, objective: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Two steps: finite, the weights move, and the run's model is a LoRA that is read again."""
    words = tiny_run(str(folders[name]), "steps=2", "sampler.steps=3", "lr=0.01", *SAMPLERS[name])
    words += [word.format(pairs=pairs(tmp_path)) if "{" in word else word for word in OBJECTIVES[objective]]
    noisy = ["sampler.eta=0.7"] if objective.startswith("ddpo") else []
    summary = train(configured(*words, *noisy), tmp_path / "run")
    assert all(torch.tensor(summary[who]["reward"]).isfinite() for who in ("base", "final"))
    assert summary["base"]["reward"] != summary["final"]["reward"]
    family, options = FAMILIES[name]
    state, _ = family(str(folders[name]), **options).read_lora(tmp_path / "run" / "model")
    assert any(v.any() for k, v in state.items() if "lora_B" in k)


def test_the_shift_is_applied_once(folders: dict[str, Path]) -> None:
    """Regression sees the noise levels of the sampler: FLUX's dynamic shift at this resolution, SD3's static
    one."""
    for name, tokens in (("flux", 16), ("sd35", None)):
        policy = policy_on(folders, name)
        process, sampler = ForwardProcess.of(policy.family.scheduler), sampler_of(policy, name)
        near = (process.sigma[:, None] - sampler.sigma).abs().amin(0)
        assert near.max() < 2e-3
        if tokens:
            shift = torch.tensor(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)).exp()
            linear = torch.linspace(1, 0.25, 4)
            torch.testing.assert_close(sampler.sigma, shift * linear / (1 + (shift - 1) * linear))


def test_mistakes_are_sentences(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A family's folder under another family, a diffusion sampler for a flow and the reverse, a missing text
    encoder."""
    (part,) = (folders["sdxl"] / "text_encoder_2").glob("*.safetensors")
    for words, sentence in (
        (
            [f"model.path_or_id={folders['sdxl']}"],
            "is a StableDiffusionXLPipeline, and this family loads a StableDiffusionPipeline",
        ),
        (
            ["model=sd35", f"model.path_or_id={folders['sd35']}"],
            "sampler=ddim does not fit this model, which is a rectified flow; set sampler=flow",
        ),
        (
            ["eval_sampler=flow"],
            "eval_sampler=flow does not fit this model, which is a diffusion model; set eval_sampler=ddim",
        ),
    ):
        assert command_line(monkeypatch, *words) == 2
        assert sentence in capsys.readouterr().err
    aside = part.rename(part.with_suffix(".away"))
    try:
        with pytest.raises(ConfigError, match="has no weights in text_encoder_2/"):
            configured("model=sdxl", f"model.path_or_id={folders['sdxl']}")
    finally:
        aside.rename(part)


def test_a_family_is_one_file_and_one_yaml(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Outside of the repository: here SDXL that is told of a crop."""
    (tmp_path / "cropped.py").write_text(
        "from alignlab.models.sdxl import StableDiffusionXL\n\n\nclass Cropped(StableDiffusionXL):\n    def "
        "encode(self, prompts):\n"
        "        text = super().encode(prompts)\n        text['time_ids'] = text['time_ids'] + 4\n        "
        "return text\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "cropped.yaml").write_text(
        f"_target_: cropped.Cropped\npath_or_id: {folders['sdxl']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [
        w for w in tiny_run("", "algo=draft", "steps=2", "model=cropped") if not w.startswith("model.path")
    ]
    typed = [
        "--config-dir",
        str(tmp_path / "conf"),
        *words,
        "allow_targets=[cropped]",
        f"output_dir={tmp_path}/run",
    ]
    assert command_line(monkeypatch, *typed) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()
