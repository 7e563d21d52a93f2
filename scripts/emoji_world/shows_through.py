"""How well can a background's colour be read off the noised latents, without a caption?

    python scripts/emoji_world/shows_through.py

A linear discriminant reads the channels' means of 6,000 scenes' noised latents (4,000 to fit, 2,000 to
count), with white noise and with build.py's MEAN_NOISE. What can be read there, the U-Net need not be told.
"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from emoji_world.build import ASSETS, MEAN_NOISE  # noqa: E402
from emoji_world.scenes import World  # noqa: E402


def read(features: Tensor, labels: Tensor, fit: int) -> float:
    """Share of the rows after the first `fit`, [n, d], whose label a linear discriminant fitted to those
    names."""
    x, y = features[:fit], labels[:fit]
    means = torch.stack([x[y == k].mean(0) for k in y.unique()])
    weights = torch.linalg.solve(torch.cov((x - means[y]).T), means.T)
    scores = features[fit:] @ weights - (means.T * weights).sum(0) / 2
    return (scores.argmax(1) == labels[fit:]).float().mean().item()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    pipe, world = (
        StableDiffusionPipeline.from_pretrained(
            ASSETS / "emoji", torch_dtype=torch.float32, safety_checker=None
        ),
        World(seed=8),
    )
    scenes = [world.draw(500) for _ in range(12)]
    latents = (
        torch.cat([pipe.vae.encode(s.images * 2 - 1).latent_dist.mode() for s in scenes])
        * pipe.vae.config.scaling_factor
    )
    means, colours = latents.mean((2, 3)), torch.tensor([c for s in scenes for c in s.colours])
    white = latents[0, 0].numel() ** -0.5  # the standard deviation of its mean
    print("timestep   white noise   with a mean   (chance 0.083)")
    for t in (999, 900, 700, 500):
        kept = pipe.scheduler.alphas_cumprod[t]
        noised = [
            kept.sqrt() * means + (1 - kept).sqrt() * (white**2 + extra**2) ** 0.5 * torch.randn_like(means)
            for extra in (0, MEAN_NOISE)
        ]
        print(f"{t:8} {read(noised[0], colours, 4000):13.3f} {read(noised[1], colours, 4000):13.3f}")


if __name__ == "__main__":
    main()
