"""Model folders that are not what they seem: each is drawn as it was trained, or refused in one sentence
before a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load, save_file
from torch import Tensor

from alignlab.config.build import ConfigError, build
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.models import weight_files
from alignlab.models.pipeline import DiffusersPipeline, shapes_only
from alignlab.models.sd import StableDiffusion
from alignlab.models.sdxl import StableDiffusionXL
from tests.conftest import SD_SCHEDULE, key
from tests.models.tiny import sdxl
from tests.running import configured

pytestmark = pytest.mark.fault("model folders")

PARTS = ("unet", "vae", "text_encoder")
Change = Callable[[Path], None]


@pytest.fixture
def folder(tiny_sd: str, tmp_path: Path) -> Path:
    """A copy of the tiny Stable Diffusion, to change."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl(tmp_path_factory.mktemp("xl"))


def edit(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `...` removes one."""
    about = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in about.items() if value is not ...}))


def scheduler(folder: Path, kind: str, **changes: Any) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=kind, **changes)


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def loaded(file: Path) -> dict[str, Tensor]:
    """In memory: tensors that are mapped from a file change with it."""
    return load(file.read_bytes())


def changed(folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = weights(folder, part)
    save_file(change(loaded(file)), file, metadata={"format": "pt"})


def family(folder: Path, kind: type[DiffusersPipeline] = StableDiffusion, **options: Any) -> Any:
    """Checked and built, as a command does."""
    kind.check(str(folder), **options)
    return kind(str(folder), **options)


@torch.no_grad()
def images(made: Any) -> Tensor:
    return rollout(
        Policy(made), ddim(made.scheduler, steps=4, eta=0.0, guidance_scale=3.0), key(2), store="image"
    ).images


def refused(folder: Path, kind: type[DiffusersPipeline] = StableDiffusion, **options: Any) -> str:
    """What `check` says, before anything is loaded; the constructor says the same of what a hub gave."""
    with pytest.raises((ValueError, OSError)) as said:
        kind.check(str(folder), **options)
    assert str(said.value).startswith(f"path_or_id={folder}") and "\n" not in str(said.value)
    return str(said.value)


# -- schedulers

FOREIGN: dict[str, tuple[str, str]] = {
    "EDMDPMSolverMultistepScheduler": ("sd", "its noise levels are EDM's"),
    "EDMEulerScheduler": ("xl", "its noise levels are EDM's"),
    "LCMScheduler": ("sd", "a latent consistency model"),
    "TCDScheduler": ("xl", "a consistency model"),
    "CMStochasticIterativeScheduler": ("sd", "a consistency model"),
    "FlowMatchEulerDiscreteScheduler": ("sd", "a rectified flow"),
    "FlowMatchHeunDiscreteScheduler": ("xl", "a rectified flow"),
    "DPMSolverSDEScheduler": ("sd", "torchsde"),
    "ScoreSdeVeScheduler": ("sd", "its noise is not DDPM's"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_noise_process_is_refused_by_name(
    kind: str, folder: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    """EDM, consistency and flow schedulers were read as DDIM with default betas. The constructor refuses them
    too."""
    which, why = FOREIGN[kind]
    if which == "xl":
        folder = Path(shutil.copytree(tiny_xl, tmp_path / "xl"))
    made = {"sd": StableDiffusion, "xl": StableDiffusionXL}[which]
    scheduler(folder, kind)
    said = refused(folder, made)
    assert f"its scheduler is a {kind}" in said and why in said


def test_a_scheduler_that_only_its_own_file_names_is_refused(folder: Path) -> None:
    """Somebody exchanged scheduler_config.json and left the index as it was."""
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    assert "its scheduler is a LCMScheduler" in refused(folder)
    edit(folder / "model_index.json", scheduler="DDIMScheduler")
    assert "says of scheduler what no pipeline does" in refused(folder)


BAD_NOISE: dict[str, dict[str, Any]] = {
    "prediction_type=flow_prediction": {"prediction_type": "flow_prediction"},
    "use_flow_sigmas": {"use_flow_sigmas": True},
    "prediction_type=x0": {"prediction_type": "x0"},
    "prediction_type=None": {"prediction_type": None},
    "beta_schedule=sigmoid": {"beta_schedule": "sigmoid"},
    "beta_start=None": {"beta_start": None},
    "beta_end=nan": {"beta_end": float("nan")},
    "beta_end=2": {"beta_end": 2},
    "trained_betas": {"trained_betas": [0.1, 0.2]},
    "num_train_timesteps=None": {"num_train_timesteps": None},
    "thresholding=true": {"thresholding": True},
}


@pytest.mark.parametrize("words", BAD_NOISE)
def test_noise_that_cannot_be_is_refused(words: str, folder: Path) -> None:
    scheduler(folder, "DDIMScheduler", **BAD_NOISE[words])
    assert words in refused(folder)


KEPT = {
    "PNDMScheduler": PNDMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "HeunDiscreteScheduler": HeunDiscreteScheduler,
    "DDPMScheduler": DDPMScheduler,
}


@pytest.mark.parametrize("kind", KEPT)
def test_the_noise_is_that_of_the_schedulers_class(kind: str, folder: Path) -> None:
    """alphas_cumprod is the named class's own, with all of its keys and with none: Heun's default betas are
    not DDIM's."""
    betas = {name: value for name, value in SD_SCHEDULE.items() if name != "clip_sample"}
    for config in ({**betas, "prediction_type": "v_prediction"}, {}):
        named = {"_class_name": kind, **config}
        edit(folder / "model_index.json", scheduler=["diffusers", kind])
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(named))
        ours = family(folder).scheduler
        assert isinstance(ours, DDIMScheduler) and ours.config.prediction_type == config.get(
            "prediction_type", "epsilon"
        )
        torch.testing.assert_close(ours.alphas_cumprod, KEPT[kind](**config).alphas_cumprod, rtol=0, atol=0)


def test_betas_of_their_own_are_taken(folder: Path) -> None:
    betas = torch.linspace(1e-4, 0.03, 1000).tolist()
    scheduler(folder, "EulerDiscreteScheduler", trained_betas=betas, beta_start=None)
    expected = DDIMScheduler(trained_betas=betas).alphas_cumprod
    torch.testing.assert_close(family(folder).scheduler.alphas_cumprod, expected, rtol=0, atol=0)


def test_a_file_without_clip_sample_is_drawn_as_diffusers_does(tiny_sd: str, folder: Path) -> None:
    """Stable Diffusion's pipeline turns it off, whatever the class's default is."""
    scheduler(folder, "DDIMScheduler", clip_sample=...)
    torch.testing.assert_close(images(family(folder)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)


# -- autoencoders


@pytest.mark.parametrize("part", ["sd", "xl"])
@torch.no_grad()
def test_statistics_of_the_latents_are_applied(
    part: str, folder: Path, tiny_xl: Path, tmp_path: Path
) -> None:
    """z = x std / scaling_factor + mean, as XL's pipeline decodes; encoding is the way back."""
    mean, std, scaling = [-1.6, 1.9, -1.4, 2.5], [8.5, 5.9, 6.5, 5.2], 0.5
    home = folder if part == "sd" else Path(shutil.copytree(tiny_xl, tmp_path / "xl"))
    edit(home / "vae" / "config.json", latents_mean=mean, latents_std=std, scaling_factor=scaling)
    made = family(home, StableDiffusion if part == "sd" else StableDiffusionXL)
    x, pixels = torch.randn(2, *made.latent_shape), torch.rand(2, 3, *made.image_size)
    m, s = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    z = x * s / scaling + m
    torch.testing.assert_close(
        made.decode(x), (made.pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5
    )
    mode = made.pipe.vae.encode(2 * pixels - 1).latent_dist.mode()
    torch.testing.assert_close(made.encode_images(pixels), (mode - m) / s * scaling, rtol=1e-5, atol=1e-6)


BAD_VAE: dict[str, dict[str, Any]] = {
    "vae is a AutoencoderTiny": {"_class_name": "AutoencoderTiny"},
    "vae is a AsymmetricAutoencoderKL": {"_class_name": "AsymmetricAutoencoderKL"},
    "vae is a ConsistencyDecoderVAE": {"_class_name": "ConsistencyDecoderVAE"},
    "vae has scaling_factor=None": {"scaling_factor": None},
    "vae has scaling_factor=0": {"scaling_factor": 0},
    "vae has shift_factor=much": {"shift_factor": "much"},
    "vae has latents_mean=[1.0]": {"latents_mean": [1.0], "latents_std": [1.0] * 4},
    "vae has latents_std=None": {"latents_mean": [1.0] * 4},
    "vae has latents_std=[1, 1, 0, 1]": {"latents_mean": [0.0] * 4, "latents_std": [1, 1, 0, 1]},
    "both latents_mean and shift_factor": {
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
        "shift_factor": 0.1,
    },
    "vae has latent_channels=16": {"latent_channels": 16},
}


@pytest.mark.parametrize("words", BAD_VAE)
def test_another_autoencoder_is_refused(words: str, folder: Path) -> None:
    if "_class_name" in BAD_VAE[words]:
        edit(folder / "model_index.json", vae=["diffusers", BAD_VAE[words]["_class_name"]])
    edit(folder / "vae" / "config.json", **BAD_VAE[words])
    assert words in refused(folder)


# -- networks

BAD_UNET: dict[str, dict[str, Any]] = {
    "in_channels=9 and out_channels=4: it looks at an image beside the noise, as models for inpainting do": {
        "in_channels": 9
    },
    "in_channels=8 and out_channels=4: it looks at an image beside the noise, as models for editing": {
        "in_channels": 8
    },
    "out_channels=8: it predicts a variance too": {"out_channels": 8},
    "in_channels=4 and out_channels=4, which must be whole numbers": {"in_channels": "4"},
    "sample_size=None": {"sample_size": None},
    "sample_size=None, and it must": {"sample_size": ...},
    "sample_size=[8]": {"sample_size": [8]},
    "sample_size=0": {"sample_size": 0},
    "sample_size=[8, '8']": {"sample_size": [8, "8"]},
    "time_cond_proj_dim": {"time_cond_proj_dim": 256},
    "num_class_embeds=10": {"num_class_embeds": 10},
    "class_embed_type=timestep": {"class_embed_type": "timestep"},
    "addition_embed_type=text_time": {"addition_embed_type": "text_time"},
    "encoder_hid_dim_type=ip_image_proj": {"encoder_hid_dim_type": "ip_image_proj"},
    "attention_type=gated": {"attention_type": "gated"},
    "cross_attention_dim=768, and the text encoders give 16": {"cross_attention_dim": 768},
    "unet is quantised (bitsandbytes)": {"quantization_config": {"quant_method": "bitsandbytes"}},
}


@pytest.mark.parametrize("words", BAD_UNET)
def test_another_network_is_refused(words: str, folder: Path) -> None:
    edit(folder / "unet" / "config.json", **BAD_UNET[words])
    assert words in refused(folder)


def test_latents_that_are_not_square(folder: Path, tiny_xl: Path, tmp_path: Path) -> None:
    """sample_size=[height, width] is drawn; XL's network is told height and width in their order."""
    edit(folder / "unet" / "config.json", sample_size=[8, 16])
    made = family(folder)
    assert made.latent_shape == (4, 8, 16) and images(made).shape == (2, 3, 16, 32)
    wide = Path(shutil.copytree(tiny_xl, tmp_path / "xl"))
    edit(wide / "unet" / "config.json", sample_size=[8, 16])
    made = family(wide, StableDiffusionXL)
    assert made.encode(["cat"])["time_ids"].tolist() == [[16, 32, 0, 0, 16, 32]] and images(made).shape == (
        2,
        3,
        16,
        32,
    )


def test_other_text_encoders_are_refused(folder: Path, tiny_xl: Path, tmp_path: Path) -> None:
    """One that gives a single embedding, one that masks, XL's pairs of other widths, and the refiner."""
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    assert "use_attention_mask" in refused(folder)
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    assert "text_encoder is a CLIPTextModelWithProjection" in refused(folder)
    for change, words in (
        (
            {"unet": {"projection_class_embeddings_input_dim": 99}},
            "projection_class_embeddings_input_dim=99, and the text",
        ),
        ({"text_encoder_2": {"hidden_size": 99}}, "cross_attention_dim=40, and the text encoders give 115"),
        (
            {"unet": {"addition_embed_type": None}},
            "addition_embed_type=None, and this family's has text_time",
        ),
    ):
        home = Path(shutil.copytree(tiny_xl, tmp_path / words[:12], dirs_exist_ok=True))
        ((part, values),) = change.items()
        edit(home / part / "config.json", **values)
        assert words in refused(home, StableDiffusionXL)
    home = Path(shutil.copytree(tiny_xl, tmp_path / "refiner"))
    edit(
        home / "model_index.json",
        requires_aesthetics_score=True,
        text_encoder=[None, None],
        tokenizer=[None, None],
    )
    assert "XL's refiner" in refused(home, StableDiffusionXL)


def test_another_familys_folder_names_its_model(folder: Path, tiny_xl: Path) -> None:
    assert (
        "is a StableDiffusionXLPipeline, and this family loads a StableDiffusionPipeline; choose model=sdxl"
        in refused(tiny_xl)
    )
    assert "is a StableDiffusionPipeline" in refused(folder, StableDiffusionXL)
    edit(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    assert "choose model=sd35" in refused(folder)


def test_the_loaded_model_is_judged_too(folder: Path) -> None:
    """The constructor says the same without `check`, of a folder and of a network built from its
    configuration alone."""
    edit(folder / "unet" / "config.json", class_embed_type="timestep")
    said = rf"^model.path_or_id={folder}: its unet has class_embed_type=timestep, so it waits for a class"
    with pytest.raises(ValueError, match=said):
        StableDiffusion(str(folder))
    with shapes_only(), pytest.raises(ValueError, match=said):
        StableDiffusion(str(folder))


# -- components that no image needs


def test_unused_components_may_be_absent(tiny_sd: str, folder: Path) -> None:
    """Named in model_index.json, with no folder: the safety checker, the feature extractor, the image
    encoder."""
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    torch.testing.assert_close(images(family(folder)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)


# -- weights


def as_variant(folder: Path, variant: str, parts: tuple[str, ...] = PARTS, *, keep: bool = False) -> None:
    """Renames the weights of these parts, rounded to half precision, or writes them beside."""
    for part in parts:
        file = weights(folder, part)
        half = {name: t.half() if t.is_floating_point() else t for name, t in loaded(file).items()}
        save_file(half, file.with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
        if not keep:
            file.unlink()


def half_of(module: torch.nn.Module, tiny_sd: str) -> bool:
    """Whether a UNet's weights are those of the tiny one, rounded to half precision."""
    whole = loaded(weights(Path(tiny_sd), "unet"))
    return all(torch.equal(value, whole[name].half().float()) for name, value in module.state_dict().items())


def test_plain_weights_load_under_model_sd15(tiny_sd: str, folder: Path) -> None:
    """README's own example: model=sd15 asks for fp16, and a plain folder is drawn as it is without
    model.variant=null."""
    c = configured("model=sd15", f"model.path_or_id={folder}")
    assert c.model["variant"] == "fp16"
    torch.testing.assert_close(images(build(c.model)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)


def test_half_precision_alone_loads_untyped(tiny_sd: str, folder: Path) -> None:
    """The other way round, in all parts and in one; with both, the one that is asked for is read."""
    as_variant(folder, "fp16", ("unet",))
    assert half_of(family(folder).denoiser, tiny_sd)
    as_variant(folder, "fp16", ("vae", "text_encoder"))
    assert half_of(family(folder).denoiser, tiny_sd) and half_of(
        family(folder, variant="bf16").denoiser, tiny_sd
    )
    both = Path(shutil.copytree(tiny_sd, folder.with_name("both")))
    as_variant(both, "fp16", keep=True)
    assert half_of(family(both, variant="fp16").denoiser, tiny_sd)
    assert not half_of(family(both).denoiser, tiny_sd)


def test_other_weights_are_never_taken_untyped(folder: Path) -> None:
    """non_ema are other weights than the plain ones, and neither stands in for the other."""
    c = configured(f"model.path_or_id={folder}", "+model.variant=non_ema")
    with pytest.raises(
        ConfigError, match=r"unet/ holds only weights without a variant; set model.variant=null$"
    ):
        build(c.model)
    as_variant(folder, "non_ema")
    c = configured(f"model.path_or_id={folder}")
    with pytest.raises(
        ConfigError, match=r"unet/ holds only weights of variant non_ema; set model.variant=non_ema$"
    ):
        build(c.model)
    assert images(StableDiffusion(str(folder), variant="non_ema")).isfinite().all()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(variant: str | None, tiny_sd: str, folder: Path) -> None:
    """A network in two files is read by its index; a file that the index names and that is not there is
    named."""
    if variant:
        as_variant(folder, variant, ("unet",))
    file = weights(folder, "unet")
    state, dot = loaded(file), f".{variant}" if variant else ""
    file.unlink()
    names = [f"diffusion_pytorch_model{dot}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    where = {name: names[k % 2] for k, name in enumerate(state)}
    for name in names:
        some = {key: value for key, value in state.items() if where[key] == name}
        save_file(some, folder / "unet" / name, metadata={"format": "pt"})
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{dot}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    assert torch.equal(family(folder).denoiser.conv_in.weight, state["conv_in.weight"].float())
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(
        ValueError, match=rf"unet/{names[1]} is missing, which {index.name} names; fetch it again$"
    ):
        StableDiffusion(str(folder))
    index.write_text("no")
    with pytest.raises(ValueError, match=rf"unet/{index.name} is no index of weights; fetch it again$"):
        StableDiffusion(str(folder))
    index.unlink()
    with pytest.raises(
        ValueError, match=rf"unet/ holds {names[0]} without its index {index.name}; fetch it again$"
    ):
        StableDiffusion(str(folder))


def test_pickled_weights_alone_load(tiny_sd: str, folder: Path) -> None:
    for part in PARTS:
        file = weights(folder, part)
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(loaded(file), file.with_name(f"{stem}.bin"))
        file.unlink()
    torch.testing.assert_close(images(family(folder)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def scaled(file: Path) -> None:
    save_file({**loaded(file), "conv_in.weight_scale": torch.ones(1)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "is cut off or damaged"),
        (pointer, "is a pointer of Git LFS"),
        (scaled, r"is quantised \(conv_in.weight_scale"),
    ],
)
def test_broken_files_are_named(spoil: Change, said: str, part: str, folder: Path) -> None:
    file = weights(folder, part)
    spoil(file)
    with pytest.raises(ValueError, match=rf"^model.path_or_id={folder}: {part}/{file.name} .*{said}"):
        StableDiffusion(str(folder))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, part: str, folder: Path) -> None:
    """Before a run: one number among them is enough. Of weights to start from, too."""
    one = torch.tensor([0])
    changed(
        folder,
        part,
        lambda state: {k: t.index_fill(0, one, value) if k == max(state) else t for k, t in state.items()},
    )
    with pytest.raises(
        ValueError,
        match=rf"^model.path_or_id={folder}: {part} holds numbers that are not finite \(\S+\); it is",
    ):
        StableDiffusion(str(folder))


def test_weights_to_start_from_are_finite(tiny_sd: str, folder: Path) -> None:
    changed(folder, "unet", lambda state: {k: torch.full_like(t, float("nan")) for k, t in state.items()})
    with pytest.raises(ValueError, match=r"^the unet in \S+ holds numbers that are not finite"):
        StableDiffusion(tiny_sd).read_full(folder)


def test_a_larger_network_than_described_is_refused(
    tiny_sd: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers would be left out. Tensors that are of no module are left out with a line."""
    changed(folder, "unet", lambda state: {**state, "some.extra.weight": torch.zeros(3)})
    torch.testing.assert_close(images(family(folder)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)
    assert "some.extra.weight" in capsys.readouterr().err
    changed(folder, "unet", lambda state: {**state, "down_blocks.0.resnets.1.conv1.weight": torch.zeros(3)})
    with pytest.raises(
        ValueError,
        match=r"the weights in unet have 1 tensors more than its config.json describes, down_blocks",
    ):
        StableDiffusion(str(folder))


NAMES = {
    "diffusion_pytorch_model.safetensors": (None, "safetensors"),
    "diffusion_pytorch_model.fp16.safetensors": ("fp16", "safetensors"),
    "model.fp16-00001-of-00002.safetensors": ("fp16", "safetensors"),
    "model-00001-of-00002.fp16.safetensors": ("fp16", "safetensors"),
    "model-00001-of-00002.safetensors": (None, "safetensors"),
    "pytorch_model.bin": (None, "bin"),
    "diffusion_pytorch_model.non_ema.bin": ("non_ema", "bin"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(name: str, tmp_path: Path) -> None:
    """Of all forms that diffusers and transformers wrote; optimizer.bin and the like are no weights of a
    part."""
    for file in (name, "optimizer.bin", "scheduler.bin", "adapter_model.safetensors", "openvino_model.bin"):
        (tmp_path / file).write_text("")
    assert weight_files.variants(tmp_path) == {NAMES[name][0]: [tmp_path / name]}


# -- what is no pipeline folder


def test_what_is_no_pipeline_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    """A part of a pipeline, a training script's checkpoint, a LoRA's folder, the address of a page."""
    assert f"it lies in the pipeline folder {folder}: give that" in refused(folder / "unet")
    file = weights(folder, "vae").rename(tmp_path / "elsewhere.safetensors")
    assert "has no weights in vae/; give a diffusers pipeline folder" in refused(folder)
    file.rename(folder / "vae" / "diffusion_pytorch_model.safetensors")
    checkpoint = tmp_path / "checkpoint-500"
    shutil.copytree(folder / "unet", checkpoint / "unet")
    (checkpoint / "optimizer.bin").write_text("")
    assert "put that in place of unet/ in a copy of the base model" in refused(checkpoint)
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, lora / "pytorch_lora_weights.safetensors")
    assert "it is a LoRA: give the model that it is for, and the LoRA as init_from" in refused(lora)
    with pytest.raises(FileNotFoundError, match=r"of a page of the hub, write path_or_id=owner/name$"):
        StableDiffusion.check("https://huggingface.co/owner/name/tree/main")


# -- the hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository owner/name: `download` gives the files of a variant or, of a part that has none of it, the
    plain ones."""
    cache = tmp_path / "cache"

    def download(name: str, *, variant: str | None, **_: Any) -> str:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(folder, cache, ignore=shutil.ignore_patterns("*.safetensors"))
        for part in PARTS:
            found = weight_files.variants(folder / part)
            for file in found.get(variant) or found.get(None) or ():
                shutil.copy(file, cache / part)
        return str(cache)

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", download)
    return folder


@pytest.mark.parametrize("stored", [None, "fp16"])
@pytest.mark.parametrize("asked", [None, "fp16", "bf16"])
def test_a_repository_has_the_weights_that_it_has(
    stored: str | None, asked: str | None, hub: Path, tiny_sd: str
) -> None:
    """Whatever variant is asked for, and what is saved names the repository, not the cache."""
    if stored:
        as_variant(hub, stored)
    made = StableDiffusion("owner/name", variant=asked)
    assert (
        half_of(made.denoiser, tiny_sd) == (stored == "fp16")
        and made.pipe.config._name_or_path == "owner/name"
    )


def test_a_repository_is_judged_before_its_weights(hub: Path) -> None:
    scheduler(hub, "LCMScheduler")
    for part in PARTS:
        cut(weights(hub, part))
    with pytest.raises(ValueError, match=r"^model.path_or_id=owner/name: its scheduler is a LCMScheduler"):
        StableDiffusion("owner/name")


ANSWERS = {
    RepositoryNotFoundError: "the hub has no such repository, or hides it: check the name",
    GatedRepoError: "accept its terms on the hub, then hf auth login",
    RevisionNotFoundError: "it has no such commit: check model.revision",
    EntryNotFoundError: "it is no diffusers pipeline, for it has no model_index.json",
    OSError: "fetch it where there is a network, or give a folder",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_the_hub_answers(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name is not told as a lack of network; the answer may be the cause of another error."""
    answer: Any = kind.__new__(kind)
    answer.args = ("404 Client Error. Entry Not Found for model_index.json.",)

    def download(name: str, **_: Any) -> str:
        raise OSError("Cannot load model owner/nmae") from answer

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", download)
    with pytest.raises(
        OSError, match=rf"^model.path_or_id=owner/nmae cannot be loaded \(.*\); {ANSWERS[kind]}"
    ):
        StableDiffusion("owner/nmae")


def test_text_encoders_of_either_naming(tiny_sd: str, folder: Path) -> None:
    """With text_model. before every name, as until transformers 5.6, and without: the same images."""
    named = {
        name.removeprefix("text_model."): t for name, t in loaded(weights(folder, "text_encoder")).items()
    }
    for prefix in ("", "text_model."):
        changed(
            folder, "text_encoder", lambda _, prefix=prefix: {prefix + name: t for name, t in named.items()}
        )
        torch.testing.assert_close(images(family(folder)), images(StableDiffusion(tiny_sd)), rtol=0, atol=0)
