"""Measures the embedded world and writes results/emoji_world: how well the model draws what it is asked for,
and what its reward models and its perceptual distance are worth.

    python scripts/evaluate_emoji_world.py --images 8

The judge was trained on renderings only, and no weights were chosen by it. Needs the Debian package
fonts-noto-color-emoji for the real renderings that everything is measured against.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from emoji_world.distortions import monotone_share  # noqa: E402
from emoji_world.scenes import ANIMALS, COLOURS, NAMES, World, article  # noqa: E402

from alignlab.engine.noise import noise_key  # noqa: E402
from alignlab.engine.policy import Policy  # noqa: E402
from alignlab.engine.rollout import rollout  # noqa: E402
from alignlab.engine.samplers import Sampler, ddim  # noqa: E402
from alignlab.metrics.diversity import EmojiDistance  # noqa: E402
from alignlab.models.emoji_judge import Judge, load_judge  # noqa: E402
from alignlab.models.sd import StableDiffusion  # noqa: E402
from alignlab.rewards.aesthetic import Aesthetic  # noqa: E402
from alignlab.rewards.clip import Clip  # noqa: E402
from alignlab.rewards.emoji_rules import TrueAesthetic, TruePreference  # noqa: E402
from alignlab.rewards.preference import Preference  # noqa: E402
from alignlab.runs.provenance import processor  # noqa: E402

RESULTS = ROOT / "results" / "emoji_world"
ANIMAL_IDS = list(range(len(ANIMALS)))
Numbers = dict[str, float]


def draw(policy: Policy, sampler: Sampler, prompts: list[str]) -> Tensor:
    """One image of each prompt, [n, 3, 48, 48]."""
    key = noise_key(prompts, seed=0, stream="world")
    parts = (key[range(k, min(k + 64, len(prompts)))] for k in range(0, len(prompts), 64))
    return torch.cat([rollout(policy, sampler, part, store="image").images for part in parts])


def share(right: Tensor) -> float:
    return right.float().mean().item()


def drawing(
    policies: dict[str, Policy], sampler: Sampler, stronger: Sampler, judge: Judge, world: World, images: int
) -> tuple[Numbers, Tensor]:
    """What the judge sees in generated images, how diverse they are, and the images of the animals in a row.
    `stronger` has more guidance."""
    names, policy = [k for k in ANIMAL_IDS for _ in range(images)], policies["fp32"]
    pictures, in_bf16 = (
        draw(policies[precision], sampler, [article(NAMES[k]) for k in names])
        for precision in ("fp32", "bf16")
    )
    places = [(k, c) for k in ANIMAL_IDS for c in (k % 12, (k + 5) % 12)]
    asked = [f"{article(NAMES[k])} on {article(COLOURS[c])} background" for k, c in places]
    placed, strongly = judge(draw(policy, sampler, asked)), judge(draw(policy, stronger, asked))
    animals, unasked = judge(pictures)
    seen = unasked.argmax(1).bincount(minlength=len(COLOURS)) / len(names)
    held = [k for k in range(len(ANIMALS), len(NAMES)) for _ in range(2)]
    distance = EmojiDistance()
    mine = [distance.mean_pairwise(group) for group in pictures.split(images)]
    theirs = [distance.mean_pairwise(world.draw(images, names=[k] * images).images) for k in ANIMAL_IDS]
    numbers = {
        "animal top-1": share(animals.argmax(1) == torch.tensor(names)),
        "animal top-1, drawn in bf16": share(judge(in_bf16)[0].argmax(1) == torch.tensor(names)),
        "animal top-1 with a named background": share(
            placed[0].argmax(1) == torch.tensor([k for k, _ in places])
        ),
        "background colour": share(placed[1].argmax(1) == torch.tensor([c for _, c in places])),
        f"animal top-1 with a named background, guidance {stronger.guidance_scale:g}": share(
            strongly[0].argmax(1) == torch.tensor([k for k, _ in places])
        ),
        f"background colour, guidance {stronger.guidance_scale:g}": share(
            strongly[1].argmax(1) == torch.tensor([c for _, c in places])
        ),
        "backgrounds where none is named (of 12; exp of the entropy)": torch.special.entr(seen)
        .sum()
        .exp()
        .item(),
        "black backgrounds where none is named (of renderings: 0.083)": seen[COLOURS.index("black")].item(),
        "held-out glyph top-1": share(
            judge(draw(policy, sampler, [article(NAMES[k]) for k in held]))[0].argmax(1) == torch.tensor(held)
        ),
        "diversity within a prompt / that of renderings (lpips-emoji)": sum(mine) / sum(theirs),
    }
    return numbers, pictures


def speed(policies: dict[str, Policy], guidance: float) -> Numbers:
    """Images a second at 20 steps, decoded, in a batch of 32: the median of 5, the precisions taking
    turns."""
    sampler = ddim(policies["fp32"].family.scheduler, steps=20, eta=0.0, guidance_scale=guidance)
    key = noise_key([article(NAMES[k]) for k in ANIMAL_IDS[:32]], seed=1, stream="world")
    rates: dict[str, list[float]] = {precision: [] for precision in policies}
    for _ in range(6):
        for precision, policy in policies.items():
            began = time.perf_counter()
            rollout(policy, sampler, key, store="image")
            rates[precision].append(32 / (time.perf_counter() - began))
    return {
        f"images/s at 20 steps, guidance on, {precision}": median(rate[1:])
        for precision, rate in rates.items()
    }


def renderings(policy: Policy, judge: Judge, world: World) -> Numbers:
    """Judge, autoencoder, CLIP and perceptual distance on real renderings that none of them was trained
    on."""
    real = world.draw(1024)
    names, images = torch.tensor(real.names), real.images
    vae = policy.family.pipe.vae
    rebuilt = (vae.decode(vae.encode(images[:256] * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
    clip, shown = Clip("emoji_clip"), names < len(ANIMALS)
    similar = (
        clip.images(images[shown]) @ clip.texts([article(NAMES[k]) for k in ANIMAL_IDS], images.device).T
    )
    ordered = monotone_share(EmojiDistance().between, images[:300], torch.Generator().manual_seed(0))
    return {
        "judge's top-1 on renderings": share(judge(images)[0].argmax(1) == names),
        "autoencoder PSNR (dB)": -10
        * (rebuilt - images[:256]).square().mean((1, 2, 3)).log10().mean().item(),
        "CLIP zero-shot animal on renderings": share(similar.argmax(1) == names[shown]),
        "lpips-emoji: triplets in order, all kinds": sum(ordered.values()) / len(ordered),
        **{f"lpips-emoji: triplets in order, {kind}": value for kind, value in ordered.items()},
    }


def rewards(pictures: Tensor, prompts: list[str]) -> Numbers:
    """The learned rewards: held-out data of their own, and agreement with their rules on generated images."""
    numbers: Numbers = {}
    for kind, learned, rule in (
        ("preference", Preference("emoji_preference"), TruePreference()),
        ("aesthetic", Aesthetic("emoji_aesthetic"), TrueAesthetic()),
    ):
        card = json.loads((ROOT / "alignlab" / "assets" / f"emoji_{kind}" / "reward.json").read_text())
        numbers |= {
            f"{kind}, {k.replace('/', ' ').replace('_', '-')}": v
            for k, v in card.items()
            if k.startswith("held_out/")
        }
        agreement = spearmanr(learned(pictures, prompts).numpy(), rule(pictures, prompts).numpy()).statistic
        numbers[f"{kind}, Spearman with its rule on generated images"] = float(agreement)
    return numbers


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8, help="images of each animal")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--guidance",
        type=float,
        nargs=2,
        default=[3.0, 5.0],
        help="of everything; of the named backgrounds again",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)

    judge, _, _ = load_judge()
    policies = {
        precision: Policy(StableDiffusion("emoji"), precision=precision) for precision in ("fp32", "bf16")
    }
    policy, world = policies["fp32"], World(seed=777)
    guidance = args.guidance[0]
    sampler, stronger = (
        ddim(policy.family.scheduler, steps=args.steps, eta=0.0, guidance_scale=w) for w in args.guidance
    )
    numbers, pictures = drawing(policies, sampler, stronger, judge, world, args.images)
    prompts = [article(NAMES[k]) for k in ANIMAL_IDS for _ in range(args.images)]
    numbers |= renderings(policy, judge, world) | rewards(pictures, prompts) | speed(policies, guidance)

    settings = {
        "images per animal": args.images,
        "steps": args.steps,
        "guidance_scale": guidance,
        "threads": args.threads,
        "processor": processor(),
    }
    (RESULTS / "numbers.json").write_text(json.dumps({"settings": settings, **numbers}, indent=2) + "\n")
    page = [
        "# The embedded world, measured",
        "",
        f"    python scripts/evaluate_emoji_world.py --images {args.images} --threads {args.threads}",
        "",
        f"DDIM, {args.steps} steps, guidance {guidance:g} where no other is named, {args.threads} CPU "
        f"thread(s) of {processor()}.",
        "The judge is a classifier trained on renderings only; the renderings here are new in place, size, "
        "turn and background, their glyphs are those that it saw.",
        "A triplet is a scene with a weaker and a stronger distortion of one kind, more than 0.1 apart in "
        "strength (scripts/emoji_world/distortions.py).",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in numbers.items()),
        "",
        "The 45 animals drawn by the model (left), one of each, not chosen, and real renderings (right):",
        "",
        "![drawn and real](animals.png)",
    ]
    (RESULTS / "README.md").write_text("\n".join(page) + "\n")
    real = world.draw(len(ANIMALS), names=ANIMAL_IDS).images
    side_by_side(pictures[:: args.images], real, RESULTS / "animals.png")
    print(json.dumps(numbers, indent=2))


def side_by_side(drawn: Tensor, real: Tensor, path: Path) -> None:
    """Two blocks of nine columns with a white gap between them."""
    both = torch.ones(5, 19, *drawn.shape[1:])
    both[:, :9], both[:, 10:] = drawn.unflatten(0, (5, 9)), real.unflatten(0, (5, 9))
    images = both.flatten(0, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    save_image(images, path, nrow=19, pad_value=1.0)


if __name__ == "__main__":
    main()
