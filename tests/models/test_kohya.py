"""A LoRA as one kohya file: diffusers' own loader draws the policy's images from it (or, where it reads no
such file, its converter of whole checkpoints does), and what is read back is what was written."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.engine.noise import FIRST
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.models import kohya
from alignlab.models.lora import LoRA
from tests.models.original import sd3_transformer
from tests.models.sampling import EVERY, images_of_diffusers, key, pipe_of, sampler_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {  # everything that the format has a name for, or what diffusers' loader can read of it
    "sd": [
        ATTENTION,
        (
            *ATTENTION,
            "conv1",
            "conv2",
            "conv_shortcut",
            "time_emb_proj",
            "proj_in",
            "ff.net.0.proj",
            "ff.net.2",
        ),
    ],
    "sdxl": [
        ATTENTION,
        (
            *ATTENTION,
            "conv1",
            "conv2",
            "conv_shortcut",
            "time_emb_proj",
            "ff.net.0.proj",
            "downsamplers.0.conv",
            "upsamplers.0.conv",
            "conv_in",
            "conv_out",
            "proj_in",
        ),
    ],
    "sd35": [
        ATTENTION,
        (
            "to_q",
            "to_v",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
            "to_out.0",
            "ff.net.2",
            "ff_context.net.0.proj",
        ),
    ],
    "flux": [
        tuple(
            f"transformer_blocks.0.attn.{part}"
            for part in (*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out")
        )
    ],
}


def policy_on(folder: Path, name: str, targets: tuple[str, ...], size: float = 0.3) -> Policy:
    """With a random LoRA whose alpha is not its rank."""
    family, options = EVERY[name]
    torch.manual_seed(1)
    policy = Policy(
        family(str(folder), **options), lora=LoRA(rank=4, alpha=2, targets=targets), checkpointing=False
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, size)
    return policy


CASES = [(name, targets) for name, several in TARGETS.items() for targets in several]


@pytest.mark.parametrize(("name", "targets"), CASES, ids=lambda v: v if isinstance(v, str) else str(len(v)))
@torch.no_grad()
def test_diffusers_draws_the_policys_images_from_the_file(
    name: str, targets: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    """`pipe.load_lora_weights(FILE)` with alpha = rank/2, to 1e-4; the LoRA moves images by more than 100
    times that. What diffusers has no reader for (SD3) is added to the original checkpoint by its own rule, W
    + alpha/rank up down, and converted by diffusers."""
    policy, file = policy_on(folders[name], name, targets), tmp_path / "lora.safetensors"
    mine = rollout(policy, sampler_of(policy, name), key()).images
    with policy.reference():
        base = rollout(policy, sampler_of(policy, name), key()).images
    policy.family.save_kohya(file, policy.state_dict(), 2)
    pipe = pipe_of(name, folders[name])
    if name == "sd35":
        original = added(sd3_transformer(pipe.transformer.state_dict()), load_file(file))
        pipe.transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(original))
    else:
        pipe.load_lora_weights(str(file))
    first = key().normal(FIRST, policy.latent_shape)
    torch.testing.assert_close(mine, images_of_diffusers(pipe, name, first), rtol=0, atol=1e-4)
    assert (mine - base).abs().max() > 0.01


def added(original: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint with a kohya file added to it; every tensor of the file must have its layer."""
    for name in [name for name in original if name.endswith(".weight")]:
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in lora:
            down, up, alpha = (
                lora.pop(f"{layer}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            original[name] = original[name] + alpha / len(down) * up @ down
    assert not lora
    return original


@pytest.mark.parametrize(
    ("name", "targets"), [*CASES, ("flux", (*ATTENTION, "proj_mlp", "proj_out", "norm.linear"))]
)
def test_round_trip(name: str, targets: tuple[str, ...], folders: dict[str, Path], tmp_path: Path) -> None:
    """What was written is read bit for bit, with its rank and alpha, by a model with or without adapters."""
    if (
        name == "flux"
    ):  # the modules of the whole model that end so cannot all be written: norm_out and proj_out
        targets = tuple(
            f"{room}.0.{part}"
            for room in ("transformer_blocks", "single_transformer_blocks")
            for part in (
                [f"attn.{t}" for t in ATTENTION[: 4 if room[0] == "t" else 3]]
                + ([] if room[0] == "t" else ["proj_mlp", "proj_out"])
            )
        )
    policy, file = policy_on(folders[name], name, targets), tmp_path / "lora.safetensors"
    state = policy.state_dict()
    policy.family.save_kohya(file, state, 2)
    family, options = EVERY[name]
    for reader in (policy.family, family(str(folders[name]), **options)):
        again, about = reader.read_lora(file)
        assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
        assert (about["rank"], about["alpha"]) == (4, 2)
    fresh = Policy(family(str(folders[name]), **options), lora=LoRA(**about))
    assert fresh.state_dict().keys() == state.keys()


def test_flux_at_its_real_width(tmp_path: Path) -> None:
    """diffusers' reader knows the single blocks of FLUX at 3072 channels alone, too many for a model in a
    test; here it reads a file of that width: the updates alpha/rank B A that it finds are those that were
    written, and zero where there was no LoRA."""
    parts = {
        f"transformer_blocks.0.attn.{p}": (3072, 3072)
        for p in (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    parts |= {
        "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
        "transformer_blocks.0.ff_context.net.2": (3072, 12288),
    }
    parts |= {
        "transformer_blocks.0.norm1.linear": (18432, 3072),
        "single_transformer_blocks.0.norm.linear": (9216, 3072),
    }
    parts |= {f"single_transformer_blocks.0.{p}": (3072, 3072) for p in ("attn.to_q", "attn.to_v")}
    parts |= {
        "single_transformer_blocks.1.proj_mlp": (12288, 3072),
        "single_transformer_blocks.1.proj_out": (3072, 15360),
    }
    widths = {k: v[0] for k, v in parts.items()}
    for i in (0, 1):
        widths |= {
            f"single_transformer_blocks.{i}.{p}": 3072 for p in ("attn.to_q", "attn.to_k", "attn.to_v")
        }
        widths[f"single_transformer_blocks.{i}.proj_mlp"] = 12288
    lora = {f"{k}.lora_A.weight": torch.randn(4, v[1]) for k, v in parts.items()}
    lora |= {f"{k}.lora_B.weight": torch.randn(v[0], 4) for k, v in parts.items()}
    kohya.write(
        tmp_path / "flux.safetensors", lora, 2, widths, lambda module: kohya.in_blocks(module, kohya.FLUX)
    )
    theirs = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "flux.safetensors"))
    for module in widths:
        b, a = (theirs[f"transformer.{module}.lora_{side}.weight"] for side in "BA")
        if module in parts:
            at = torch.randn(a.shape[1], 3)
            expected = 0.5 * lora[f"{module}.lora_B.weight"] @ (lora[f"{module}.lora_A.weight"] @ at)
            torch.testing.assert_close(b @ (a @ at), expected, rtol=1e-4, atol=1e-3)
        else:
            assert not b.any()
    assert {k.removeprefix("transformer.").partition(".lora_")[0] for k in theirs} == set(widths)


def test_a_shared_down_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """sd-scripts trains q, k and v of SD3 as one layer: each gets the whole of down, its rows of up, and the
    file's rank and alpha."""
    family, options = EVERY["sd35"]
    down, up = torch.randn(6, 32), torch.randn(96, 6)
    stored = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    save_file(
        {f"lora_unet_joint_blocks_0_x_block_attn_qkv.{k}": v for k, v in stored.items()},
        tmp_path / "file.safetensors",
    )
    state, about = family(str(folders["sd35"]), **options).read_lora(tmp_path / "file.safetensors")
    assert (about["rank"], about["alpha"]) == (6, 3)
    for k, part in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(state[f"transformer_blocks.0.attn.{part}.lora_A.weight"], down)
        assert torch.equal(
            state[f"transformer_blocks.0.attn.{part}.lora_B.weight"], up[32 * k : 32 * (k + 1)]
        )


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """A module without a name there, a text encoder's LoRA, a sentence each."""
    file = tmp_path / "lora.safetensors"
    policy = policy_on(folders["flux"], "flux", ("x_embedder",))
    with pytest.raises(
        ValueError,
        match="kohya's format has no place for a LoRA of x_embedder; use to=diffusers or to=pipeline",
    ):
        policy.family.save_kohya(file, policy.state_dict(), 2)
    policy = policy_on(folders["sd"], "sd", ("to_q",))
    policy.family.save_kohya(file, policy.state_dict(), 2)
    stored = load_file(file)
    save_file(stored | {"lora_te_text_model_q.lora_down.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(
        ValueError, match=r"holds a LoRA of a text encoder \(lora_te_text_model_q\.lora_down\.weight"
    ):
        policy.family.read_lora(file)
