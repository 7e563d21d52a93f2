"""Trains the embedded world and writes it into alignlab/assets, over what is there (`make emoji-world`; `git
checkout alignlab/assets` brings the shipped one back).

    python scripts/emoji_world/build.py --stages tokenizer vae unet clip judge rewards

Each stage goes on from its checkpoint in --work, so the command can be stopped and repeated. On two CPU cores
the whole takes some two and a half hours; a CUDA GPU is used when there is one.

    tokenizer  byte-level BPE over the captions
    vae        AutoencoderKL, 48x48 -> 12x12x8: L1 + gradient difference + a small KL
    unet       UNet2DConditionModel and CLIPTextModel, trained together on cached latents, epsilon, min-SNR 5,
               half of the noises with a mean (MEAN_NOISE)
    clip       open_clip image and text towers, contrastive, on renderings and their VAE reconstructions
    judge      a classifier of animal and background trained on renderings only; no weights are chosen by it;
               its convolutional features are also the offline perceptual distance
    rewards    a preference model and an aesthetic head on the CLIP, by
               `python -m alignlab.train_reward` on pairs and ratings that follow
               the hidden rules of alignlab/rewards/emoji_rules.py
"""

import argparse
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from alignlab.files.writing import aside_of  # noqa: E402
from emoji_world.fit import fit  # noqa: E402
from emoji_world.judgements import write_pairs, write_ratings  # noqa: E402
from emoji_world.portable import name_tensors_as_before, write_vocabulary  # noqa: E402
from emoji_world.scenes import COLOURS, NAMES, SIZE, World, captions  # noqa: E402
from emoji_world.tokens import MAX_LENGTH, build_tokenizer  # noqa: E402

ASSETS = ROOT / "alignlab" / "assets"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
"""Autocast to bfloat16: a CPU without its instructions emulates them, some fifteen times slower than
float32."""
MEAN_NOISE = 0.5
"""Standard deviation of a mean that half of the U-Net's noises get, for each channel ("offset noise",
Guttenberg 2023). The mean of white noise over 12 x 12 latents has only 1/12, beside which a background's
colour can be read off the noised latents even at the last timestep: the words that name it tell the U-Net
little then, and the text encoder hardly learns them."""
WEIGHTS = {
    **dict.fromkeys(("vae", "unet"), "diffusion_pytorch_model.safetensors"),
    "text_encoder": "model.safetensors",
}


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 96, 160),
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_vae(work: Path, steps: int, start: Path | None) -> AutoencoderKL:
    torch.manual_seed(1)
    vae, world = new_vae().to(DEVICE), World(seed=1)
    begin_from(vae, start and start / "vae" / WEIGHTS["vae"])

    def loss() -> Tensor:
        x = world.draw(32).images.to(DEVICE) * 2 - 1
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        edges = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        return (y - x).abs().mean() + edges + 1e-4 * posterior.kl().float().mean() / (SIZE // 4) ** 2

    fit("vae", vae, loss, steps=steps, lr=1.2e-3, folder=work, bf16=BF16, rng=world.rng)
    return vae


@torch.no_grad()
def cache_latents(work: Path, vae: AutoencoderKL, n: int) -> dict[str, Tensor]:
    """Scenes of the training set: scaled latents [n, 8, 12, 12] float16, reconstructions [n/4] uint8, names,
    colours."""
    weights = (
        parameters_to_vector(vae.parameters()).half().cpu().numpy()
    )  # to which saving the pipeline rounds them
    path = work / f"latents_{n}_{zlib.crc32(weights):08x}.pt"  # another autoencoder's are of no use
    if path.exists():
        return torch.load(path, weights_only=True)
    world, latents, names, colours, rebuilt = World(seed=2), [], [], [], []
    for k in track(range(0, n, 500), "latents"):
        scenes = world.draw(500)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BF16):
            z = vae.encode(scenes.images.to(DEVICE) * 2 - 1).latent_dist.mode()
            if k < n // 4:
                rebuilt.append(
                    ((vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()
                )
        latents.append(z.float().cpu())
        names += scenes.names
        colours += scenes.colours
    z = torch.cat(latents)
    factor = 1 / z.std().item()
    cache = {
        "latents": (z * factor).half(),
        "scaling_factor": torch.tensor(factor),
        "rebuilt": torch.cat(rebuilt),
        "names": torch.tensor(names),
        "colours": torch.tensor(colours),
    }
    with aside_of(path) as aside:
        torch.save(cache, aside)
    return cache


def caption_table(tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids of every caption, [names, colours, captions, 32]."""
    texts = [c for name in NAMES for colour in COLOURS for c in captions(name, colour)]
    ids = tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids.reshape(len(NAMES), len(COLOURS), -1, MAX_LENGTH)


def begin_from(model: nn.Module, old: Path | None) -> None:
    """Gives `model` the weights of a safetensors file, if there is one. A tensor that has grown keeps its new
    rows and columns."""
    if old is None:
        return
    own, weights = model.state_dict(), load_file(old)  # views of the model's own storage
    for key in own:
        own[key][tuple(slice(n) for n in weights[key].shape)] = weights[key].float()


class TextAndImage(nn.Module):
    """The two networks that the diffusion stage trains together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def train_unet(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, scenes: int, start: Path | None
) -> StableDiffusionPipeline:
    torch.manual_seed(3)
    cache, table, rng = cache_latents(work, vae, scenes), caption_table(tokenizer), np.random.default_rng(3)
    vae.register_to_config(scaling_factor=cache["scaling_factor"].item())
    scheduler = DDIMScheduler(  # Stable Diffusion v1's
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    model = TextAndImage(new_text_encoder(tokenizer), new_unet()).to(DEVICE)
    begin_from(model.text_encoder, start and start / "text_encoder" / WEIGHTS["text_encoder"])
    begin_from(model.unet, start and start / "unet" / WEIGHTS["unet"])
    empty = tokenizer([""], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids

    def loss() -> Tensor:
        rows = torch.from_numpy(rng.integers(len(cache["names"]), size=64))
        ids = table[
            cache["names"][rows],
            cache["colours"][rows],
            torch.from_numpy(rng.integers(table.shape[2], size=64)),
        ]
        ids = torch.where(torch.from_numpy(rng.random(64) < 0.1)[:, None], empty, ids).to(DEVICE)
        x0 = cache["latents"][rows].float().to(DEVICE)
        noise, t = torch.randn_like(x0), torch.randint(1000, (64,), device=DEVICE)
        noise[:32] += MEAN_NOISE * torch.randn(32, 8, 1, 1, device=DEVICE)
        out = model.unet(
            scheduler.add_noise(x0, noise, t), t, model.text_encoder(ids).last_hidden_state
        ).sample
        snr = compute_snr(scheduler, t)
        return ((out.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=5.0) / snr).mean()

    fit("unet", model, loss, steps=steps, lr=8e-4, folder=work, bf16=BF16, rng=rng)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_clip(work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, scenes: int) -> None:
    import json

    from open_clip.model import CLIP

    torch.manual_seed(4)
    config = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 160, "head_width": 40, "patch_size": 6},
        "text_cfg": {
            "context_length": MAX_LENGTH,
            "vocab_size": len(tokenizer),
            "width": 96,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "local",
        },
    }
    text_cfg = {k: v for k, v in config["text_cfg"].items() if k != "hf_tokenizer_name"}
    clip, world = CLIP(config["embed_dim"], config["vision_cfg"], text_cfg).to(DEVICE), World(seed=4)
    cache, table, rng = cache_latents(work, vae, scenes), caption_table(tokenizer), world.rng
    n, mean, std = 128, 0.5, 0.5

    def loss() -> Tensor:
        fresh = world.draw(n // 2)
        rows = torch.from_numpy(rng.integers(len(cache["rebuilt"]), size=n // 2))
        names = torch.cat([torch.tensor(fresh.names), cache["names"][rows]])
        colours = torch.cat([torch.tensor(fresh.colours), cache["colours"][rows]])
        images = torch.cat([fresh.images, cache["rebuilt"][rows].float() / 255]).to(DEVICE)
        images = images + torch.randn_like(images) * 0.06 * torch.rand(n, 1, 1, 1, device=DEVICE)
        kind = torch.from_numpy(rng.integers(table.shape[2], size=n))
        ids = table[names, colours, kind].to(DEVICE)
        image, text, scale = clip((images - mean) / std, ids)[:3]
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        # A caption is true of a scene if the animal agrees and the colour agrees or is not named (kinds 0 to
        # 3).
        true = names[:, None] == names[None, :]
        true &= (colours[:, None] == colours[None, :]) | (kind[None, :] < 4)
        target = true.float().to(DEVICE)
        rows_, columns = target / target.sum(1, keepdim=True), target / target.sum(0, keepdim=True)
        return (
            -(rows_ * logits.log_softmax(1)).sum(1).mean() / 2
            - (columns * logits.log_softmax(0)).sum(0).mean() / 2
        )

    fit("clip", clip, loss, steps=steps, lr=1e-3, folder=work, weight_decay=0.05, bf16=BF16, rng=rng)
    out = ASSETS / "emoji_clip"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    write_vocabulary(out)
    save_file(
        {k: v.half().contiguous() for k, v in clip.state_dict().items()}, out / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [mean] * 3, "std": [std] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    )


def train_judge(work: Path, steps: int) -> None:
    from alignlab.models.emoji_judge import Judge

    torch.manual_seed(5)
    judge, world = Judge(len(NAMES), len(COLOURS)).to(DEVICE), World(seed=5, animal_share=0.6)

    def loss() -> Tensor:
        scenes = world.draw(96)
        images = scenes.images.to(DEVICE)
        images = images + torch.randn_like(images) * 0.05 * torch.rand(96, 1, 1, 1, device=DEVICE)
        name, colour = judge(images)
        return (
            F.cross_entropy(name.float(), torch.tensor(scenes.names, device=DEVICE))
            + F.cross_entropy(colour.float(), torch.tensor(scenes.colours, device=DEVICE)) / 2
        )

    fit("judge", judge, loss, steps=steps, lr=2e-3, folder=work, bf16=False, rng=world.rng)
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    save_file(
        state,
        ASSETS / "emoji_judge.safetensors",
        metadata={"names": "|".join(NAMES), "colours": "|".join(COLOURS)},
    )


def train_rewards(work: Path, vae: AutoencoderKL, pairs: int, ratings: int) -> None:
    vae.eval()
    for name, seed, share in (("train", 6, 1.0), ("held_out", 7, 0.1)):
        write_pairs(work / "pairs" / name, vae, int(share * pairs), seed)
        write_ratings(work / "ratings" / name, vae, int(share * ratings), seed)
    for kind, data, options in (
        ("preference", "pairs", ["blocks=2", "epochs=5", "lr=1e-3"]),
        ("aesthetic", "ratings", ["hidden=[64]", "epochs=60", "lr=2e-3"]),
    ):
        made = work / f"emoji_{kind}"
        shutil.rmtree(made, ignore_errors=True)
        words = [
            f"kind={kind}",
            f"data={work / data / 'train'}",
            f"held_out={work / data / 'held_out'}",
            *options,
        ]
        subprocess.run(
            [sys.executable, "-m", "alignlab.train_reward", *words, f"output_dir={made}"],
            cwd=ROOT,
            check=True,
        )
        (ASSETS / made.name).mkdir(exist_ok=True)
        for file in ("reward.json", "head.safetensors", "clip.safetensors"):
            if (made / file).exists():
                shutil.copy(made / file, ASSETS / made.name / file)


def main() -> None:
    stages = ["tokenizer", "vae", "unet", "clip", "judge", "rewards"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "emoji")
    parser.add_argument(
        "--start",
        type=Path,
        help="a pipeline's folder, whose autoencoder, U-Net and text encoder are where training starts",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--unet-steps", type=int, default=10000)
    parser.add_argument("--clip-steps", type=int, default=1350)
    parser.add_argument("--judge-steps", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=60000)
    parser.add_argument("--pairs", type=int, default=10000)
    parser.add_argument("--ratings", type=int, default=5000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    ASSETS.mkdir(parents=True, exist_ok=True)
    folder = args.work / "tokenizer"
    # Merges that are as frequent as each other come in any order, so weights go on with the tokenizer that
    # they began with: the shipped one.
    made = (folder / "tokenizer.json").is_file()
    known = folder if made else ASSETS / "emoji" / "tokenizer"
    tokenizer = (
        build_tokenizer(folder)
        if "tokenizer" in args.stages and not made
        else CLIPTokenizer.from_pretrained(known)
    )
    if "judge" in args.stages:
        train_judge(args.work, args.judge_steps)
    if {"vae", "unet", "clip", "rewards"} & set(args.stages):
        vae = train_vae(args.work, args.vae_steps, args.start)  # returns at once when already trained
        if "unet" in args.stages:
            pipe = train_unet(args.work, vae, tokenizer, args.unet_steps, args.scenes, args.start)
            pipe.to(torch.float16).save_pretrained(ASSETS / "emoji")
            name_tensors_as_before(ASSETS / "emoji" / "text_encoder")
            write_vocabulary(ASSETS / "emoji" / "tokenizer")
            vae.float()
            about = (
                ASSETS / "emoji" / "text_encoder" / "config.json"
            )  # transformers would otherwise compute in the stored precision
            about.write_text(about.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
        if "clip" in args.stages:
            train_clip(args.work, vae, tokenizer, args.clip_steps, args.scenes)
        if "rewards" in args.stages:
            train_rewards(args.work, vae, args.pairs, args.ratings)


if __name__ == "__main__":
    main()
