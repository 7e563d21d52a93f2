"""What the simulated people say: rated scenes and choices between two, by the hidden rules of
alignlab/rewards/emoji_rules.py.

The tables have the form that `python -m alignlab.train_reward` reads. Half of the images are renderings, half
went through the autoencoder, so that a reward also knows what the diffusion model's pictures look like.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import track
from torch import Tensor

from alignlab.rewards.emoji_rules import TrueAesthetic, TruePreference
from emoji_world.scenes import ANIMALS, NAMES, World, article

BATCH = 250


@torch.no_grad()
def write_pairs(folder: Path, vae: AutoencoderKL, n: int, seed: int) -> None:
    """`n` pairs of one caption ("a lion"); a quarter of the images shows another animal. Within 0.1 points
    people see no difference."""
    if (folder / "pairs.csv").exists():
        return
    world, rng, rule, rows = World(seed), np.random.default_rng(seed), TruePreference(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in track(range(0, n, BATCH), f"pairs, {folder.name}"):
        asked = rng.integers(len(ANIMALS), size=BATCH)
        captions, utilities, names = [article(NAMES[a]) for a in asked], [], []
        for side in (0, 1):
            shown = np.where(rng.random(BATCH) < 0.25, rng.integers(len(NAMES), size=BATCH), asked)
            images = half_rebuilt(world.draw(BATCH, names=shown.tolist()).images, vae)
            utilities.append(rule(images, captions))
            names.append(save(folder, images, [f"{k + j:05d}_{side}" for j in range(BATCH)]))
        ahead = utilities[0] - utilities[1]
        labels = torch.where(ahead.abs() < 0.1, 0.5, (ahead > 0).float()).tolist()
        rows += zip(captions, *names, labels, strict=True)
    write(folder / "pairs.csv", ["caption", "jpg_0", "jpg_1", "label_0"], rows)


@torch.no_grad()
def write_ratings(folder: Path, vae: AutoencoderKL, n: int, seed: int) -> None:
    """`n` rated scenes."""
    if (folder / "ratings.csv").exists():
        return
    world, rule, rows = World(seed), TrueAesthetic(), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in track(range(0, n, BATCH), f"ratings, {folder.name}"):
        images = half_rebuilt(world.draw(BATCH).images, vae)
        ratings = [f"{r:.3f}" for r in rule(images, [""] * BATCH).tolist()]
        rows += zip(save(folder, images, [f"{k + j:05d}" for j in range(BATCH)]), ratings, strict=True)
    write(folder / "ratings.csv", ["image", "rating"], rows)


def half_rebuilt(images: Tensor, vae: AutoencoderKL) -> Tensor:
    """Every second image after the autoencoder, [B, 3, 48, 48] in [0, 1]."""
    device = next(vae.parameters()).device
    latents = vae.encode(images[::2].to(device) * 2 - 1).latent_dist.mode()
    images = images.clone()
    images[::2] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()
    return images


def save(folder: Path, images: Tensor, names: list[str]) -> list[str]:
    """Writes PNG files and returns their paths relative to the table."""
    for pixels, name in zip((images * 255).round().byte().permute(0, 2, 3, 1).numpy(), names, strict=True):
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    return [f"images/{name}.png" for name in names]


def write(path: Path, header: list[str], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
