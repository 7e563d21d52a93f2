"""Measures the embedded world and writes results/emoji_world: how well the model draws what it is asked for.

    python scripts/evaluate_emoji_world.py --images 8

The judge was trained on renderings only and never used for tuning. Needs the Debian package fonts-noto-color-emoji for
the real renderings that it is measured against.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from emoji_world.scenes import ANIMALS, COLOURS, NAMES, World, article  # noqa: E402

from alignlab.metrics.diversity import PerceptualDistance  # noqa: E402
from alignlab.metrics.judge import load_judge  # noqa: E402
from alignlab.models.sd import StableDiffusion  # noqa: E402
from alignlab.noise import noise_key  # noqa: E402
from alignlab.policy import Policy  # noqa: E402
from alignlab.rewards.clip import ClipScore  # noqa: E402
from alignlab.rollout import rollout  # noqa: E402
from alignlab.samplers import ddim  # noqa: E402

RESULTS = ROOT / "results" / "emoji_world"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images of each animal")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)

    judge, _, _ = load_judge()
    distance = PerceptualDistance(judge.features)
    policy = Policy(StableDiffusion("emoji"))
    sampler = ddim(policy.family.scheduler, steps=args.steps, eta=0.0, guidance_scale=args.guidance)
    world = World(seed=777)
    animals = list(range(len(ANIMALS)))

    def generate(prompts: list[str]) -> torch.Tensor:
        key = noise_key(prompts, seed=0, stream="world")
        parts = [
            rollout(policy, sampler, key[range(k, min(k + 64, len(prompts)))], store="image").images
            for k in range(0, len(prompts), 64)
        ]
        return torch.cat(parts)

    # Animals, and the same on named backgrounds.
    names = [k for k in animals for _ in range(args.images)]
    pictures = generate([article(NAMES[k]) for k in names])
    correct = judge(pictures)[0].argmax(1) == torch.tensor(names)
    places = [(k, c) for k in animals for c in (k % 12, (k + 5) % 12)]
    placed = generate([f"{article(NAMES[k])} on {article(COLOURS[c])} background" for k, c in places])
    on_place, colours = judge(placed)
    held = [k for k in range(len(ANIMALS), len(NAMES)) for _ in range(2)]
    held_right = judge(generate([article(NAMES[k]) for k in held]))[0].argmax(1) == torch.tensor(held)

    # Real renderings: the judge's own accuracy, autoencoder quality, and how diverse scenes of one animal are.
    real = world.draw(1024)
    judged = judge(real.images)
    latents = policy.family.pipe.vae.encode(real.images[:256] * 2 - 1).latent_dist.mode()
    rebuilt = (policy.family.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (rebuilt - real.images[:256]).square().mean((1, 2, 3)).log10()
    mine = [distance.mean_pairwise(group) for group in pictures.split(args.images)]
    theirs = [distance.mean_pairwise(world.draw(args.images, names=[k] * args.images).images) for k in animals]

    clip = ClipScore("emoji_clip")
    texts = [article(NAMES[k]) for k in animals]
    features = clip.model.encode_image(clip.preprocess(real.images))
    words = clip.model.encode_text(clip.tokenizer(texts))
    similar = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(words, dim=-1).T
    shown = torch.tensor([n < len(ANIMALS) for n in real.names])
    zero_shot = similar[shown].argmax(1) == torch.tensor(real.names)[shown]

    speed = ddim(policy.family.scheduler, steps=20, eta=0.0, guidance_scale=args.guidance)
    key = noise_key([article(NAMES[k]) for k in animals[:32]], seed=1, stream="world")
    rollout(policy, speed, key, store="image")
    began = time.perf_counter()
    rollout(policy, speed, key, store="image")
    rate = 32 / (time.perf_counter() - began)

    numbers = {
        "animal top-1": correct.float().mean().item(),
        "animal top-1 with a named background": (on_place.argmax(1) == torch.tensor([k for k, _ in places]))
        .float()
        .mean()
        .item(),
        "background colour": (colours.argmax(1) == torch.tensor([c for _, c in places])).float().mean().item(),
        "held-out glyph top-1": held_right.float().mean().item(),
        "autoencoder PSNR (dB)": psnr.mean().item(),
        "diversity within a prompt / that of renderings": sum(mine) / sum(theirs),
        "judge's top-1 on renderings": (judged[0].argmax(1) == torch.tensor(real.names)).float().mean().item(),
        "CLIP zero-shot animal on renderings": zero_shot.float().mean().item(),
        "images/s at 20 steps, guidance on": rate,
    }
    settings = {"images per animal": args.images, "steps": args.steps, "guidance_scale": args.guidance, "threads": args.threads}
    (RESULTS / "numbers.json").write_text(json.dumps({"settings": settings, **numbers}, indent=2) + "\n")
    rows = [f"| {name} | {value:.3f} |" for name, value in numbers.items()]
    page = [
        "# The embedded world, measured", "", f"    python scripts/evaluate_emoji_world.py --images {args.images}", "",
        f"DDIM, {args.steps} steps, guidance {args.guidance:g}, {args.threads} CPU threads. The judge is a classifier trained on renderings only.", "",
        "| measure | value |", "|---|---|", *rows, "",
        "Above: the 45 animals drawn by the model, one of each, not chosen. Below: real renderings.", "",
        "![generated](generated.png)", "", "![renderings](renderings.png)",
    ]  # fmt: skip
    (RESULTS / "README.md").write_text("\n".join(page) + "\n")
    for name, images in (("generated", pictures[:: args.images]), ("renderings", world.draw(len(animals), names=animals).images)):
        save_image(images.repeat_interleave(2, 2).repeat_interleave(2, 3), RESULTS / f"{name}.png", nrow=15)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
