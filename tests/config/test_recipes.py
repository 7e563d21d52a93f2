"""The papers' recipes: each composes to the published numbers, and runs on the tiny pipeline when only its
sizes are shrunk."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignlab.config.build import build
from alignlab.config.compose import CONF
from alignlab.objectives.ddpo import DDPO
from alignlab.train import train
from tests.rewards.published import laion_head, transformers_clip
from tests.running import configured, lines, pairs

ROOT = Path(__file__).resolve().parents[2]
SD14, SD15 = "CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-v1-5"

# ddpo-pytorch, config/base.py and config/dgx.py (compressibility)
DDPO_PYTORCH = {
    "model.path_or_id": SD14,
    "precision": "fp16",
    "policy.full": False,
    "policy.lora.rank": 4,
    "policy.lora.alpha": 4,
    "policy.lora.targets": None,
    "lr": 3e-4,
    "optimizer.lr": 3e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 1e-4,
    "optimizer.eps": 1e-8,
    "max_grad_norm": 1.0,
    "sampler.steps": 50,
    "sampler.eta": 1.0,
    "sampler.guidance_scale": 5.0,
    "steps": 100,
    "samples_per_step": 8 * 8 * 4,
    "algo.estimator": "is",
    "algo.updates_per_epoch": (8 * 4) // (4 * 2),
    "algo.inner_epochs": 1,
    "algo.clip": 1e-4,
    "algo.timestep_fraction": 1.0,
    "algo.advantage_clip": 5.0,
    "kl_coeff": 0.0,
    "algo.statistics.per_prompt": True,
    "algo.statistics.buffer_size": 16,
    "algo.statistics.min_count": 16,
    "prompts.template": "{}",
    "prompts.per_prompt": 1,
}
# the same file's aesthetic()
AESTHETIC = DDPO_PYTORCH | {
    "steps": 200,
    "algo.updates_per_epoch": (8 * 4) // (4 * 4),
    "algo.statistics.buffer_size": 32,
}
# DRaFT, small scale: reproductions that cite the paper (rank, lr, batch, steps, weight decay), 50 DDIM steps
# at guidance 7.5
DRAFT = {
    "model.path_or_id": SD14,
    "policy.full": False,
    "policy.lora.rank": 8,
    "lr": 4e-4,
    "optimizer.lr": 4e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.1,
    "steps": 2000,
    "samples_per_step": 4,
    "sampler.steps": 50,
    "sampler.eta": 0.0,
    "sampler.guidance_scale": 7.5,
    "algo.k": 1,
    "algo.truncation": "fixed",
    "algo.lv_samples": 0,
    "algo.reward_cap": None,
    "kl_coeff": 0.0,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "ddpo_compressibility": DDPO_PYTORCH,
    "ddpo_incompressibility": DDPO_PYTORCH,
    "ddpo_aesthetic": AESTHETIC,
    # prompt_image_alignment(): 6 GPUs sample, 8 x 6 images each
    "ddpo_alignment": AESTHETIC
    | {
        "samples_per_step": 8 * 6 * 6,
        "algo.updates_per_epoch": (8 * 6) // (4 * 6),
        "prompts.template": "{a} {activity}",
        "prompts.fill.activity": ["washing the dishes", "riding a bike", "playing chess"],
    },
    # TRL, examples/scripts/ddpo.py: sample batch 6, 4 batches, train batch 3; the rest are DDPOConfig's
    # defaults
    "trl_ddpo": AESTHETIC
    | {
        "model.path_or_id": SD15,
        "samples_per_step": 6 * 4,
        "algo.updates_per_epoch": 6 * 4 // 3,
        "micro_batch": 3,
    },
    "draft": DRAFT,
    "draft_lv": DRAFT | {"algo.lv_samples": 2, "algo.lv_reduction": "sum"},
    # NeMo-Aligner, examples/mm/stable_diffusion/conf/draftp_sd.yaml; weight and epochs: NVIDIA's blog
    "draftp": {
        "model.path_or_id": SD15,
        "precision": "bf16",
        "policy.lora.rank": 32,
        "policy.lora.alpha": 32,
        "lr": 1e-4,
        "optimizer.lr": 1e-4,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.0,
        "max_grad_norm": 10.0,
        "samples_per_step": 4,
        "steps": 200 * (45 // 4),
        "lr_warmup": 10,
        "sampler.steps": 50,
        "sampler.eta": 0.0,
        "sampler.guidance_scale": 7.5,
        "algo.k": 1,
        "kl_coeff": 0.25,
        "algo.kl_coeff": 0.25,
        "algo.kl": "eps_guided",
        "algo.reward_on": "pred_x0",
        "algo.ref_grad": "none",
        "algo.truncation": "fixed",
    },
    # AlignProp a831a5f, config/align_prop.py: general() and aesthetic(). Its loss is 0.01 |r - 10|, so its
    # clip 5.0 and eps 1e-8 are 500 and 1e-6 of ours
    "alignprop": {
        "model.path_or_id": SD15,
        "precision": "fp16",
        "policy.lora.rank": 4,
        "policy.lora.alpha": 4,
        "policy.checkpointing": True,
        "lr": 1e-3,
        "optimizer.lr": 1e-3,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.1,
        "optimizer.eps": 1e-6,
        "max_grad_norm": 500.0,
        "samples_per_step": 128,
        "steps": 7 * (256 // 128),
        "micro_batch": 4,
        "sampler.steps": 50,
        "sampler.eta": 0.0,
        "sampler.guidance_scale": 7.5,
        "algo.truncation": "per_step",
        "algo.reward_cap": 10.0,
        "kl_coeff": 0.0,
        "reward.laion_aesthetic.interpolation": "bilinear",  # torchvision.transforms.Resize's default
        "prompts.unseen": ["snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus"],
    },
    # DiffusionDPO 5233e75, launchers/sd15.sh and train.py's defaults: 1e-8 with --scale_lr, 16 GPUs x 128
    # accumulated x 1
    "diffusion_dpo": {
        "model.path_or_id": SD15,
        "precision": "fp16",
        "policy.full": True,
        "policy.checkpointing": True,
        "lr": 1e-8 * 16 * 128,
        "optimizer.lr": 1e-8 * 16 * 128,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 1e-2,
        "optimizer.eps": 1e-8,
        "max_grad_norm": 1.0,
        "lr_schedule": "constant",
        "lr_warmup": 500,
        "steps": 2000,
        "samples_per_step": 16 * 128,
        "algo.pairs": 16 * 128,
        "algo.updates_per_epoch": 1,
        "algo.loss": "sigmoid",
        "algo.beta": 5000,
        "algo.mse_reduction": "mean",
        "algo.prompt_dropout": 0.2,
        "kl_coeff": 0.0,
    },
}
REWARDS = {
    "ddpo_compressibility": "jpeg_compressibility",
    "ddpo_incompressibility": "jpeg_incompressibility",
    "ddpo_alignment": "vlm_description",
    "draftp": "pickscore",
    "diffusion_dpo": "pickscore",
    **dict.fromkeys(("ddpo_aesthetic", "trl_ddpo", "draft", "draft_lv", "alignprop"), "laion_aesthetic"),
}
PROMPTS = {"ddpo_compressibility": 398, "ddpo_incompressibility": 398, "ddpo_alignment": 135, "trl_ddpo": 27}
"""How many are trained on; 45 elsewhere."""
recipes = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny weights in the published formats, and a few pairs."""
    folder = tmp_path_factory.mktemp("small")
    laion_head(folder / "head.pth")
    transformers_clip(folder / "pickscore")
    pairs(folder)
    return folder


def filled(name: str, small: Path) -> list[str]:
    """The pairs that a user fills in, and tiny weights in place of the published ones."""
    stand_in = {
        "laion_aesthetic": [
            f"reward.laion_aesthetic.path={small}/head.pth",
            "reward.laion_aesthetic.clip=emoji_clip",
        ],
        "pickscore": [f"reward.pickscore.{key}={small}/pickscore" for key in ("path", "processor")],
    }
    return [*data(name, small), *stand_in.get(REWARDS[name], [])]


def data(name: str, small: Path) -> list[str]:
    return [f"algo.data={small}/pairs.jsonl"] if name == "diffusion_dpo" else []


def value(c: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        c = c[part]
    return c


def test_every_recipe_is_in_the_table() -> None:
    assert {*PUBLISHED} == {path.stem for path in (CONF / "experiment" / "paper").glob("*.yaml")}


@recipes
def test_the_published_numbers(name: str, small: Path) -> None:
    """The composed configuration holds them, with the published reward and number of prompts; nothing is to
    be filled in but the pairs."""
    c = configured(f"experiment=paper/{name}", *data(name, small))
    found = {key: value(asdict(c), key) for key in PUBLISHED[name]}
    assert found == PUBLISHED[name]
    assert [*c.reward] == [REWARDS[name]] and len(build(c.prompts).prompts) == PROMPTS.get(name, 45)
    assert c.eval_sampler["steps"] == 50 and c.eval_sampler["guidance_scale"] == c.sampler["guidance_scale"]


def test_the_clip_is_the_published_one_at_512_px() -> None:
    """D = 16384 is where it was chosen, so that the recipes' scaling changes nothing."""
    objective = build(configured("experiment=paper/ddpo_compressibility").algo)
    assert isinstance(objective, DDPO) and objective.clip_bound(4 * 64 * 64) == 1e-4


@recipes
def test_it_runs(name: str, small: Path, tiny_sd: str, tmp_path: Path) -> None:
    """Two epochs in the recipe's own precision, with its reward's form: as many updates as published, finite,
    the weights move. (DPO takes twelve: beta = 5000 on a random network overflows fp16 until the scaler has
    come down.)"""
    ours, steps = PUBLISHED[name], 12 if name == "diffusion_dpo" else 2
    updates = ours.get("algo.updates_per_epoch", 1)
    prompts = "prompts.imagenet_animals=2" if PROMPTS.get(name) == 398 else "prompts.prompts=[cat,dog]"
    variant = "model.variant=null" if ours["model.path_or_id"] == SD15 else ""
    words = f"""experiment=paper/{name} model.path_or_id={tiny_sd} {variant} steps={steps}
        samples_per_step={max(updates, 4)} micro_batch=4 sampler.steps=2 eval_sampler.steps=2
        eval_every={steps} evaluation.prompts=1 evaluation.images=2 evaluation.final_images=1 lr_warmup=0
        device=cpu {prompts} {" ".join(filled(name, small))}""".split()
    words += (
        ["reward=clip"] if name == "ddpo_alignment" else []
    )  # a description moves too little in two epochs of a random model
    summary = train(configured(*words), tmp_path / "run")
    epochs = lines(tmp_path / "run")
    made = [
        line["updates"] + line["skipped_updates"] for line in epochs
    ]  # in fp16 the scaler skips some, not all
    assert made == [updates] * steps
    assert all((line["loss"] is None) == (line["updates"] == 0) for line in epochs) and any(
        line["updates"] for line in epochs
    )
    assert all(np.isfinite([line.get("reward/mean", 0.0), line["loss"] or 0.0]).all() for line in epochs)
    assert summary["base"]["reward"] != summary["final"]["reward"]


@recipes
def test_the_page_names_it(name: str) -> None:
    """docs/recipes.md has a row and the command of the file's first line."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    command = next(
        line
        for line in (CONF / "experiment" / "paper" / f"{name}.yaml").read_text().splitlines()
        if line.startswith("# python")
    )
    assert re.search(rf"^\| `paper/{name}` \|", page, re.MULTILINE) and command.removeprefix("# ") in page
