"""The embedded world as it is shipped: plain diffusers loads it, it draws what it is asked for, it is small,
and the README tells its measured numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import alignlab
from alignlab.engine.noise import FIRST, noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.models.emoji_judge import load_judge
from alignlab.models.sd import StableDiffusion

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(alignlab.__file__).parent / "assets"


def test_diffusers_draws_the_same() -> None:
    """`StableDiffusionPipeline.from_pretrained` on the folder, and our rollout, from the same latents: the
    same images."""
    key = noise_key(["a fox", "a lion on a blue background"], seed=0, stream="test")
    policy = Policy(StableDiffusion("emoji"))
    sampler = ddim(policy.family.scheduler, steps=8, eta=0.0, guidance_scale=3.0)
    with torch.no_grad():
        ours = rollout(policy, sampler, key, store="image").images
    pipe: Any = StableDiffusionPipeline.from_pretrained(str(ASSETS / "emoji"), safety_checker=None)
    settings = {"num_inference_steps": 8, "guidance_scale": 3.0, "eta": 0.0, "output_type": "pt"}
    theirs = pipe(list(key.prompts), latents=key.normal(FIRST, policy.latent_shape), **settings).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)


def test_it_draws_what_it_is_asked_for() -> None:
    """Of twelve animals, each on a named background, the judge names ten or more, and every background."""
    judge, names, colours = load_judge()
    asked = list(
        zip(
            (
                "fox",
                "frog",
                "lion",
                "bear",
                "pig",
                "duck",
                "zebra",
                "rabbit",
                "butterfly",
                "wolf",
                "bee",
                "bat",
            ),
            colours,
            strict=True,
        )
    )
    policy = Policy(StableDiffusion("emoji"))
    sampler = ddim(policy.family.scheduler, steps=15, eta=0.0, guidance_scale=3.0)
    key = noise_key(
        [f"a {animal} on a {colour} background" for animal, colour in asked], seed=0, stream="test"
    )
    with torch.no_grad():
        animal, colour = judge(rollout(policy, sampler, key, store="image").images)
    assert sum(names[k] == a for k, (a, _) in zip(animal.argmax(1).tolist(), asked, strict=True)) >= 10
    assert [colours[k] for k in colour.argmax(1).tolist()] == [c for _, c in asked]


def test_it_is_small() -> None:
    """All weights together: 40 MB at most."""
    assert sum(file.stat().st_size for file in ASSETS.rglob("*.safetensors")) <= 40e6


def test_the_page_tells_the_measured_numbers() -> None:
    """Every number of docs/embedded_world.md's table is that of results/emoji_world/numbers.json, and meets
    its target."""
    n = json.loads((ROOT / "results" / "emoji_world" / "numbers.json").read_text())
    text = " ".join((ROOT / "docs" / "embedded_world.md").read_text().split())
    for name, target, said in (
        ("animal top-1", 0.9, "| animals | the judge names the animal, of 180 generated images | {:.1%} |"),
        ("background colour", 0.95, "| the judge names the background that was asked for | {:.0%} |"),
        ("autoencoder PSNR (dB)", 26, "| autoencoder | PSNR | {:.1f} dB |"),
        (
            "diversity within a prompt / that of renderings (lpips-emoji)",
            0.8,
            "as a share of that of renderings (lpips-emoji) | {:.0%} |",
        ),
        ("CLIP zero-shot animal on renderings", 0.95, "| CLIP | zero-shot accuracy on renderings | {:.1%} |"),
        ("preference, held-out accuracy", 0.9, "agreement with held-out choices | {:.1%} |"),
        ("aesthetic, held-out spearman", 0.9, "| aesthetic head | Spearman with held-out ratings | {:.3f} |"),
    ):
        assert n[name] >= target
        assert said.format(n[name]).replace("%", " %") in text, name
    assert n["lpips-emoji: triplets in order, all kinds"] >= 0.95 and n["judge's top-1 on renderings"] >= 0.98
