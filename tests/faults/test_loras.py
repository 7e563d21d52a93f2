"""LoRAs of others: what is read has the effect that plain diffusers or peft give it, and everything else is
refused by its name."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab import evaluate, sample
from alignlab.config.build import ConfigError
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.models.lora import LoRA
from alignlab.models.sd import StableDiffusion
from alignlab.models.sdxl import StableDiffusionXL
from alignlab.training.setup import Lab
from tests.conftest import key
from tests.models import tiny as models
from tests.running import command_line, configured, tiny

State = dict[str, Tensor]
FILE = "pytorch_lora_weights.safetensors"


def updates(lora: State, config: dict[str, Any]) -> State:
    """By module, what a LoRA adds to the weight, as a matrix: alpha/rank B A."""
    modules = {name.partition(".lora_")[0] for name in lora}
    both = {
        name: [lora[f"{name}.lora_{side}.weight"].flatten(1).double() for side in "BA"] for name in modules
    }
    return {name: config["alpha"] / config["rank"] * b @ a for name, (b, a) in both.items()}


def of_diffusers(pipe: Any, path: Path) -> State:
    """The same, as plain diffusers loads it."""
    pipe.load_lora_weights(str(path))
    layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {
        name: layer.get_delta_weight(layer.active_adapters[0]).detach().flatten(1).double()
        for name, layer in layers.items()
    }


def same(ours: State, theirs: State) -> None:
    """Equal to float32's rounding, and not nothing."""
    theirs = {name: value for name, value in theirs.items() if value.any()}
    assert ours.keys() == theirs.keys() and theirs
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()))


def with_peft(model: str, **options: Any) -> tuple[State, LoraConfig]:
    """A LoRA that does something, made by peft on the UNet of a pipeline folder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "to_out.0", "conv1"], **options}
    )
    unet.add_adapter(config)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn_like(weight))
    return get_peft_model_state_dict(unet), config


def in_diffusers_format(folder: Path, state: State, config: LoraConfig | None) -> Path:
    about = {"unet_lora_adapter_metadata": config.to_dict()} if config else {}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, **about)
    return folder


def changed(path: Path, change: Callable[[State], State], metadata: dict[str, str] | None = None) -> Path:
    """The tensors of a file or a folder changed, its metadata replaced."""
    file = path / FILE if path.is_dir() else path
    save_file(
        {k: v.contiguous().clone() for k, v in change(load_file(file)).items()}, file, metadata=metadata
    )
    return path


def kohya(state: State, alphas: Callable[[str], float | None], dtype: torch.dtype = torch.float32) -> State:
    """In kohya's names, with the alpha of every layer."""
    out: State = {}
    for name, value in state.items():
        module, _, side = name.partition(".lora_")
        layer = f"lora_unet_{module.replace('.', '_')}"
        out[f"{layer}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value.to(dtype)
        if (alpha := alphas(module)) is not None:
            out[f"{layer}.alpha"] = torch.tensor(float(alpha))
    return {k: v.contiguous().clone() for k, v in out.items()}


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 2},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"attn2.to_q": 16, "conv1": 1}},
    "rank_pattern": {"rank_pattern": {"attn1.to_q": 8, "conv1": 2}},
    "all of them": {
        "rank_pattern": {"to_q": 8},
        "alpha_pattern": {"to_q": 3, "up_blocks.*to_v": 20},
        "use_rslora": True,
        "lora_alpha": 7,
    },
    "a regular expression": {"target_modules": r".*attn[12]\.to_[qk]"},
    "some layers": {
        "target_modules": ["to_q"],
        "layers_to_transform": [1],
        "layers_pattern": ["up_blocks", "down_blocks"],
    },
    "without some": {"exclude_modules": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]},
    "fan_in_fan_out, which does nothing to these layers": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_the_configuration_says_is_applied(name: str, tiny_sd: str, tmp_path: Path, capsys) -> None:
    """peft's alpha, rank and their patterns, rsLoRA, and the choice of modules: the weights move as in plain
    diffusers."""
    state, config = with_peft(tiny_sd, **PATTERNS[name])
    path = in_diffusers_format(tmp_path / "lora", state, config)
    ours = updates(*StableDiffusion(tiny_sd).read_lora(path))
    same(ours, of_diffusers(StableDiffusionPipeline.from_pretrained(tiny_sd), path))
    folded = name in ("rslora", "alpha_pattern", "rank_pattern", "all of them")
    assert ("the scale is multiplied into B" in capsys.readouterr().out) == folded


def old(state: State) -> State:
    """diffusers' names before peft: `unet.X.attn1.processor.to_q_lora.down.weight`."""
    names = {"to_out.0": "to_out_lora", **{f"to_{letter}": f"to_{letter}_lora" for letter in "qkv"}}
    out = {}
    for name, value in state.items():
        module, _, side = name.partition(".lora_")
        parent, end = next(
            (module.removesuffix(end), new) for end, new in names.items() if module.endswith(f".{end}")
        )
        out[f"{parent}processor.{end}.{'down' if side[0] == 'A' else 'up'}.weight"] = value
    return out


FORMS: dict[str, Callable[[State], State]] = {
    "without metadata": lambda s: {f"unet.{k}": v for k, v in s.items()},
    "lora.down": lambda s: {
        f"unet.{k}".replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in s.items()
    },
    "bf16": lambda s: {f"unet.{k}": v.bfloat16() for k, v in s.items()},
    "fp8": lambda s: {f"unet.{k}": v.to(torch.float8_e4m3fn) for k, v in s.items()},
    "kohya": lambda s: kohya(s, lambda module: 2.5),
    "kohya without alpha": lambda s: kohya(s, lambda module: None),
    "kohya, fp16": lambda s: kohya(s, lambda module: 4, torch.float16),
    "kohya, negative": lambda s: kohya(s, lambda module: -4),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_diffusers_reads(name: str, tiny_sd: str, tmp_path: Path, capsys) -> None:
    """The effect is that of plain diffusers, and a line says where alpha is not in the file (TRL's,
    diffusers' before 0.35)."""
    state, _ = with_peft(tiny_sd)
    file = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in FORMS[name](state).items()}, file)
    ours = updates(*StableDiffusion(tiny_sd).read_lora(file))
    theirs = of_diffusers(StableDiffusionPipeline.from_pretrained(tiny_sd), file)
    same(ours, theirs)
    silent = "kohya" not in name or name == "kohya without alpha"
    assert (
        "does not say its alpha; it is taken as the rank (4), as diffusers" in capsys.readouterr().out
    ) == silent


def test_ranks_of_a_kohya_file_may_differ(tiny_sd: str, tmp_path: Path) -> None:
    """Ranks 1 to 4 in one file, as resizing tools write them: each layer has its own effect."""
    state, _ = with_peft(tiny_sd)
    sizes = {module: 1 + k % 4 for k, module in enumerate(sorted({k.partition(".lora_")[0] for k in state}))}
    cut = {
        k: v[: sizes[k.partition(".lora_")[0]]] if "lora_A" in k else v[:, : sizes[k.partition(".lora_")[0]]]
        for k, v in state.items()
    }
    file = tmp_path / "lora.safetensors"
    save_file(kohya(cut, lambda module: 3), file)
    lora, config = StableDiffusion(tiny_sd).read_lora(file)
    assert (config["rank"], config["alpha"]) == (4, 4)
    same(updates(lora, config), of_diffusers(StableDiffusionPipeline.from_pretrained(tiny_sd), file))


@pytest.mark.parametrize("zero", [False, True])
def test_each_layer_of_a_kohya_file_has_its_own_alpha(zero: bool, tiny_sd: str, tmp_path: Path) -> None:
    """By the format's own rule, alpha/rank up down for each layer, as sd-scripts and ComfyUI do. diffusers
    (0.42) is right for convolutions alone: the alphas of attention layers are left out, with a warning."""

    def alpha(module: str) -> float:
        return 4.0 * module.endswith("to_q") if zero else 1.0 + len(module) % 5

    state, _ = with_peft(tiny_sd)
    file = tmp_path / "lora.safetensors"
    save_file(kohya(state, alpha), file)
    lora, config = StableDiffusion(tiny_sd).read_lora(file)
    assert (config["rank"], config["alpha"]) == (4, 4)
    expected = {
        name: alpha(name) / 4 * value for name, value in updates(state, {"rank": 4, "alpha": 4}).items()
    }
    same({name: value for name, value in updates(lora, config).items() if value.any()}, expected)
    theirs = of_diffusers(StableDiffusionPipeline.from_pretrained(tiny_sd), file)
    for name in (name for name in expected if name.endswith("conv1") and not zero):
        torch.testing.assert_close(theirs[name], expected[name], rtol=1e-4, atol=1e-6)


ELSEWHERE: dict[str, Callable[[State], State]] = {
    "ComfyUI": lambda s: {f"diffusion_model.{k}": v for k, v in s.items()},
    "peft in a file": lambda s: {f"base_model.model.{k}": v for k, v in s.items()},
    "both prefixes": lambda s: {f"unet.base_model.model.{k}": v for k, v in s.items()},
    "the adapter's name": lambda s: {k.replace(".weight", ".default.weight"): v for k, v in s.items()},
    "no prefix, no ending": lambda s: {k.removesuffix(".weight"): v for k, v in s.items()},
    "OneTrainer": lambda s: {
        k.replace("lora_unet_", "lora_transformer_"): v for k, v in kohya(s, lambda m: 4).items()
    },
    "SimpleTuner": lambda s: {
        k.replace("lora_unet_", "lycoris_"): v for k, v in kohya(s, lambda m: 4).items()
    },
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_forms_that_others_read(name: str, tiny_sd: str, tmp_path: Path) -> None:
    """Prefixes and names of ComfyUI, peft and trainers, scale 1: B A itself."""
    state, _ = with_peft(tiny_sd)
    file = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in ELSEWHERE[name](state).items()}, file)
    ours = updates(*StableDiffusion(tiny_sd).read_lora(file))
    same(ours, updates(state, {"rank": 4, "alpha": 4}))


def test_attention_processors_of_the_first_diffusers(tiny_sd: str, tmp_path: Path) -> None:
    """`attn1.processor.to_q_lora.down.weight`, with and without `unet.`."""
    state, _ = with_peft(tiny_sd, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    for prefix in ("unet.", ""):
        file = tmp_path / "lora.safetensors"
        save_file({f"{prefix}{k}": v.contiguous() for k, v in old(state).items()}, file)
        same(updates(*StableDiffusion(tiny_sd).read_lora(file)), updates(state, {"rank": 4, "alpha": 4}))


@pytest.mark.parametrize("dotted", [False, True])
def test_xl_in_the_names_of_its_blocks(dotted: bool, tmp_path: Path) -> None:
    """`input_blocks_4_1_...` (kohya) and `diffusion_model.input_blocks.4.1...` (ComfyUI), with an alpha for
    each layer."""
    model = str(models.sdxl(tmp_path))
    state, _ = with_peft(
        model, target_modules=["to_q", "to_out.0", "conv1", "proj_in", "downsamplers.0.conv"]
    )
    family = StableDiffusionXL(model)

    def alpha(module: str) -> float:  # diffusers reads one for all attention layers
        return 1.0 + len(module) % 3 if dotted else 2.0

    out: State = {}
    for name, value in state.items():
        module, _, side = name.partition(".lora_")
        layer = family.kohya_layer(module)
        assert layer is not None
        at = f"diffusion_model.{layer.name}" if dotted else f"lora_unet_{layer.name.replace('.', '_')}"
        out[
            f"{at}.lora_{dict(A='A', B='B')[side[0]] if dotted else dict(A='down', B='up')[side[0]]}.weight"
        ] = value
        out[f"{at}.alpha"] = torch.tensor(alpha(module))
    file = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in out.items()}, file)
    theirs = {
        name: alpha(name) / 4 * value for name, value in updates(state, {"rank": 4, "alpha": 4}).items()
    }
    same(updates(*family.read_lora(file)), theirs)
    if not dotted:
        same(theirs, of_diffusers(StableDiffusionXLPipeline.from_pretrained(model), file))


def peft_folder(folder: Path, state: State, config: LoraConfig, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in state.items()},
        folder / "adapter_model.safetensors",
    )
    about = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "peft_type": "LORA", **more}))
    return folder


def test_a_folder_of_peft(tiny_sd: str, tmp_path: Path) -> None:
    """Its adapter_config.json is read, of the folder and of the file in it; without it neither is."""
    state, config = with_peft(tiny_sd, **PATTERNS["all of them"])
    same_as = of_diffusers(
        StableDiffusionPipeline.from_pretrained(tiny_sd), in_diffusers_format(tmp_path / "as", state, config)
    )
    folder = peft_folder(tmp_path / "peft", state, config)
    for path in (folder, folder / "adapter_model.safetensors"):
        same(updates(*StableDiffusion(tiny_sd).read_lora(path)), same_as)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"needs adapter_config\.json beside it, which says its rank and alpha"
    ):
        StableDiffusion(tiny_sd).read_lora(folder)


def test_a_configuration_that_readers_of_the_file_leave_out(tiny_sd: str, tmp_path: Path) -> None:
    """An adapter_config.json with another scale beside diffusers' own file, which diffusers does not look
    at."""
    state, config = with_peft(tiny_sd, lora_alpha=16)
    folder = in_diffusers_format(peft_folder(tmp_path / "both", state, config), state, None)
    with pytest.raises(
        ValueError, match=r"adapter_config\.json scales the LoRA, and programs that read pytorch_lora_weights"
    ):
        StableDiffusion(tiny_sd).read_lora(folder)


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora": ({"use_dora": True}, "use_dora=True: it is a DoRA, which also rescales"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True: its up projections have biases"),
    "bias": ({"bias": "all"}, "bias=all: it trained the network's biases too"),
    "bias of LoRA": ({"bias": "lora_only"}, "bias=lora_only: it trained the network's biases"),
    "modules_to_save": (
        {"modules_to_save": ["conv_in"]},
        r"modules_to_save=\['conv_in'\]: it trained whole modules too",
    ),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]: it trained tokens"),
    "parameters": ({"target_parameters": ["a.b"]}, "it adapts parameters and not modules"),
    "replication": ({"layer_replication": [[0, 2]]}, "it is for a network with repeated layers"),
    "megatron": ({"megatron_config": {"x": 1}}, "layers that are split over devices"),
    "alora": ({"alora_invocation_tokens": [1]}, "switched on by tokens"),
    "arrow": ({"arrow_config": {"x": 1}}, "routes between several LoRAs"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "unknown": ({"from_the_future": 3}, "from_the_future=3: what that does to the LoRA is unknown"),
    "pissa": (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights=pissa_niter_4, which changes the base model's weights",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, "changes the base model's weights"),
    "olora": ({"init_lora_weights": "olora"}, "changes the base model's weights"),
    "corda": ({"init_lora_weights": "corda"}, "changes the base model's weights"),
    "of another kind": ({"peft_type": "LOHA"}, "is no LoRA but a LOHA of peft"),
    "no alpha": ({"lora_alpha": ...}, "says nothing of its alpha"),
    "alpha is no number": ({"lora_alpha": math.nan}, r"alpha=nan \(alpha\), which is no number"),
    "alpha of a pattern": ({"alpha_pattern": {"to_q": math.inf}}, r"alpha=inf \(to_q\), which is no number"),
    "alpha is 0": ({"lora_alpha": 0}, "has alpha 0, so that it does nothing"),
    "rank": ({"r": 8}, r"says rank=8 and alpha=4, and its tensors have rank 4 \("),
    "rank of a pattern": ({"rank_pattern": {"to_q": 8}}, "says rank=8"),
    "rank is a word": ({"r": "4"}, "which are no ranks"),
    "a broken expression": ({"alpha_pattern": {"to_q(": 3}}, r"'to_q\(', which is no regular expression"),
    "an expression without an end": (
        {"target_modules": r"(\w+\.?)+!"},
        "a regular expression that may take forever",
    ),
    "a slow expression": (
        {"rank_pattern": {".*.*.*.*.*.*!": 4}},
        "a regular expression that may take forever",
    ),
    "other modules": ({"target_modules": ["to_q"]}, "is among its weights and not among its target_modules"),
    "more modules": (
        {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1"]},
        "is among its target_modules and not among its weights",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_configuration_with_an_effect_that_is_not_applied(name: str, tiny_sd: str, tmp_path: Path) -> None:
    """In diffusers' metadata and in peft's folder: one sentence that says what it is."""
    state, config = with_peft(tiny_sd)
    more, sentence = SAID[name]
    folder = peft_folder(tmp_path / "peft", state, config, **{k: v for k, v in more.items() if v is not ...})
    about = json.loads((folder / "adapter_config.json").read_text())
    about = {k: v for k, v in about.items() if more.get(k) is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    other = in_diffusers_format(tmp_path / "lora", state, None)
    changed(
        other, lambda s: s, {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in about.items()})}
    )
    for path in (folder, other):
        with pytest.raises(ValueError, match=sentence) as refused:
            StableDiffusion(tiny_sd).read_lora(path)
        assert len(str(refused.value).splitlines()) == 1 and str(path) in str(refused.value)


def extra(*names: str) -> Callable[[State], State]:
    """With more tensors of such names after the first layer's."""

    def more(state: State) -> State:
        out = kohya(state, lambda module: 4)
        layer = next(iter(out)).partition(".")[0]
        return out | {name.format(layer=layer): torch.rand(4, 4) for name in names}

    return more


def peft_extra(*names: str) -> Callable[[State], State]:
    def more(state: State) -> State:
        layer = next(iter(state)).partition(".lora_")[0]
        return {f"unet.{k}": v for k, v in state.items()} | {
            name.format(layer=layer): torch.rand(4, 4) for name in names
        }

    return more


def one_of(change: Callable[[Tensor], Tensor], end: str = "lora_down.weight") -> Callable[[State], State]:
    """One tensor of a kohya file changed."""

    def more(state: State) -> State:
        out = kohya(state, lambda module: 4)
        name = next(name for name in out if name.endswith(end))
        return out | {name: change(out[name])}

    return more


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "DoRA": (extra("{layer}.dora_scale"), "holds a DoRA, which also rescales"),
    "DoRA of peft": (peft_extra("unet.{layer}.lora_magnitude_vector"), "holds a DoRA"),
    "DoRA of new peft": (peft_extra("unet.{layer}.lora_magnitude_vector.weight"), "holds a DoRA"),
    "LoHa": (extra("{layer}x.hada_w1_a", "{layer}x.hada_w1_b"), r"holds a LoHa, .* one of 2\)"),
    "LoHa of peft": (peft_extra("base_model.model.{layer}.hada_w1_a"), "holds a LoHa"),
    "LoKr": (extra("{layer}x.lokr_w1"), "holds a LoKr, a Kronecker product"),
    "Tucker": (extra("{layer}.lora_mid.weight"), "holds a LoCon in Tucker form"),
    "OFT": (extra("{layer}x.oft_blocks"), "holds an OFT or BOFT"),
    "BOFT": (peft_extra("base_model.model.{layer}.boft_R"), "holds an OFT or BOFT"),
    "IA3": (extra("{layer}x.weight", "{layer}x.on_input"), "whole weights|IA3"),
    "IA3 of peft": (peft_extra("base_model.model.{layer}.ia3_l"), "holds an IA3"),
    "VeRA": (peft_extra("base_model.model.{layer}.vera_lambda_b"), "VeRA"),
    "AdaLoRA": (peft_extra("base_model.model.{layer}.lora_E"), "holds an AdaLoRA"),
    "GLoRA": (extra("{layer}x.a1.weight"), "holds a GLoRA"),
    "differences": (extra("{layer}x.diff"), "holds whole differences of weights"),
    "bias differences": (extra("{layer}.diff_b"), "holds whole differences of weights"),
    "norms": (extra("{layer}x.w_norm", "{layer}x.b_norm"), r"holds trained norms .* one of 2\)"),
    "scalar": (extra("{layer}.scalar"), "trained scalars"),
    "lora_bias": (peft_extra("unet.{layer}.lora_B.bias"), r"holds a LoRA with a bias \(lora_bias\)"),
    "biases": (peft_extra("unet.{layer}.bias"), "holds trained biases"),
    "modules_to_save": (
        peft_extra("base_model.model.conv_in.modules_to_save.default.weight"),
        "holds whole modules that were trained",
    ),
    "whole weights": (peft_extra("unet.conv_in.weight"), "holds whole weights"),
    "an embedding": (
        peft_extra("base_model.model.{layer}.lora_embedding_A"),
        "holds a LoRA of an embedding table",
    ),
    "set_weight": (extra("diffusion_model.conv_in.set_weight"), "weights that replace"),
    "textual inversion": (extra("bundle_emb.word.string_to_param.*"), "holds embeddings of new words"),
    "text encoder, kohya": (
        extra("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
        "holds a LoRA of a text encoder",
    ),
    "first of two": (
        extra("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"),
        "holds a LoRA of a text encoder",
    ),
    "second of two": (
        extra("lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"),
        "holds a LoRA of a text encoder",
    ),
    "text encoder": (
        peft_extra("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        "holds a LoRA of a text encoder",
    ),
    "the second": (
        peft_extra("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        "holds a LoRA of a text encoder",
    ),
    "in diffusers' old form": (
        peft_extra("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight"),
        "holds a LoRA of a text encoder",
    ),
    "ComfyUI's": (
        peft_extra("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        "holds a LoRA of a text encoder",
    ),
    "peft's": (
        peft_extra("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
        "holds a LoRA of a text encoder",
    ),
    "Cascade": (
        extra("lora_prior_unet_down_blocks_0.lora_down.weight"),
        "another network than the one that is tuned",
    ),
    "VAE": (peft_extra("vae.encoder.conv_in.lora_A.weight"), "holds a LoRA of the VAE"),
    "XLabs": (peft_extra("double_blocks.0.processor.qkv_lora1.down.weight"), "XLabs"),
    "another place": (
        extra("lora_unet_down_blocks_9_resnets_0_conv1.lora_down.weight"),
        "it holds lora_unet_down_blocks_9_resnets_0_conv1",
    ),
    "nonsense": (extra("whatever"), "holds no weights of a LoRA .whatever"),
    "two adapters": (peft_extra("unet.{layer}.lora_A.second.weight"), "holds two LoRAs of one layer"),
    "one side": (extra("lora_unet_conv_in.lora_down.weight"), r"has conv_in without its lora_B \(up\)"),
    "alpha alone": (extra("lora_unet_conv_in.alpha"), r"has conv_in without its lora_A \(down\), lora_B"),
    "not a number": (one_of(lambda v: v.clone().fill_(math.nan)), "holds numbers that are not finite"),
    "infinite": (one_of(lambda v: v.half().fill_(math.inf)), "holds numbers that are not finite"),
    "alpha not a number": (
        one_of(lambda v: torch.tensor(math.nan), "alpha"),
        "holds numbers that are not finite .*alpha",
    ),
    "several alphas": (
        one_of(lambda v: torch.ones(2), "alpha"),
        r"the alpha of .* is \[2\] and not one number",
    ),
    "alpha 0": (lambda s: kohya(s, lambda module: 0), "has alpha 0, so that it does nothing"),
    "integers": (one_of(lambda v: v.to(torch.int8)), "in int8, not in floating point; it is quantised"),
    "booleans": (one_of(lambda v: v > 0), "in bool, not in floating point"),
    "complex": (one_of(lambda v: v.to(torch.complex64)), "in complex64, not in floating point"),
    "another width": (one_of(lambda v: torch.cat([v, v], 1)), "is of another model: its LoRA of"),
    "no rank": (
        lambda s: {
            k: v[:0] if "lora_down" in k else v[:, :0] if "lora_up" in k else v
            for k, v in kohya(s, lambda m: 4).items()
        },
        "is of another model",
    ),
    "zeros": (lambda s: {k: 0 * v for k, v in kohya(s, lambda m: 4).items()}, "nothing but zeros"),
    "nothing": (lambda s: {"x": torch.ones(1)}, "holds no weights of a LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_are_not_applied(name: str, tiny_sd: str, tmp_path: Path) -> None:
    """One sentence that names the tensor and says what it is; diffusers leaves most of these out with a
    warning at best."""
    state, _ = with_peft(tiny_sd)
    change, sentence = REFUSED[name]
    file = tmp_path / "lora.safetensors"
    save_file({k: v.contiguous().clone() for k, v in change(state).items()}, file)
    with pytest.raises(ValueError, match=sentence) as refused:
        StableDiffusion(tiny_sd).read_lora(file)
    assert len(str(refused.value).splitlines()) == 1 and str(file) in str(refused.value)


def test_alpha_in_two_places(tiny_sd: str, tmp_path: Path) -> None:
    """The configuration and the layers may both say alpha, but not differently."""
    state, config = with_peft(tiny_sd, lora_alpha=2)
    folder = in_diffusers_format(tmp_path / "lora", state, config)
    expected = updates(state, {"rank": 4, "alpha": 2})
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    for alpha, agrees in ((2.0, True), (4.0, False)):
        alphas = {f"unet.{k.partition('.lora_')[0]}.alpha": torch.tensor(alpha) for k in state}
        changed(folder, lambda s, alphas=alphas: s | alphas, about)  # type: ignore[misc]
        if agrees:
            same(updates(*StableDiffusion(tiny_sd).read_lora(folder)), expected)
        else:
            with pytest.raises(ValueError, match="says alpha=2 in its configuration and 4 in its weights"):
                StableDiffusion(tiny_sd).read_lora(folder)


def test_which_file_of_a_folder(tiny_sd: str, tmp_path: Path) -> None:
    """diffusers' name, then peft's, then the only one; pickles are never opened."""
    state, config = with_peft(tiny_sd)
    folder = in_diffusers_format(tmp_path / "lora", state, config)
    family = StableDiffusion(tiny_sd)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    assert family.read_lora(folder)[1]["rank"] == 4
    (folder / FILE).rename(folder / "mine.safetensors")
    with pytest.raises(
        ValueError,
        match=r"holds 2 \.safetensors files \(mine\.safetensors, other\.safetensors\); give one of them",
    ):
        family.read_lora(folder)
    (folder / "other.safetensors").unlink()
    assert family.read_lora(folder)[1]["rank"] == 4
    (folder / "mine.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"code")
    for path, name in (
        (folder, "adapter_model.bin may hold code"),
        (folder / "adapter_model.bin", "it is no .safetensors file"),
    ):
        with pytest.raises(ValueError, match=f"{name}; convert it to .safetensors where you trust it"):
            family.read_lora(path)


def test_ranks_that_would_fill_the_memory(tiny_sd: str, tmp_path: Path) -> None:
    """One layer of an enormous rank is not filled up in all the others."""
    state, _ = with_peft(tiny_sd)
    name = next(k.partition(".lora_")[0] for k in state)
    state |= {
        f"{name}.lora_{side}.weight": state[f"{name}.lora_{side}.weight"].repeat_interleave(
            1000, "BA".index(side) ^ 1
        )
        for side in "AB"
    }
    file = tmp_path / "lora.safetensors"
    save_file(kohya(state, lambda module: 4), file)
    with pytest.raises(ValueError, match="has ranks from 4 to 4000, too unequal to be read as one rank"):
        StableDiffusion(tiny_sd).read_lora(file)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rslora", "all of them"])
def test_training_goes_on_from_it(name: str, tiny_sd: str, tmp_path: Path) -> None:
    """init_from= a LoRA with a scale for each layer: the first images are diffusers' own, with the rank and
    alpha of the printed line."""
    state, config = with_peft(tiny_sd, **{"target_modules": ["to_q", "to_v"], **PATTERNS[name]})
    path = in_diffusers_format(tmp_path / "lora", state, config)
    rank = max(len(v) for k, v in state.items() if "lora_A" in k)
    words = [
        f"policy.lora.rank={rank}",
        f"policy.lora.alpha={rank}",
        "policy.lora.targets=[to_q,to_v]",
        f"init_from={path}",
    ]
    lab = Lab.from_config(configured(*tiny(tiny_sd, *words)))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 100])
    text = lab.policy.family.encode(["a lion", "cat"])
    base = pipe.unet(x, t, text["prompt_embeds"]).sample
    pipe.load_lora_weights(str(path))
    theirs = pipe.unet(x, t, text["prompt_embeds"]).sample
    torch.testing.assert_close(lab.policy.family.denoise(x, t, text), theirs, rtol=0, atol=1e-5)
    assert (theirs - base).abs().max() > 0.01
    full = Lab.from_config(configured(*tiny(tiny_sd, "policy.full=true", f"init_from={path}")))
    torch.testing.assert_close(full.policy.family.denoise(x, t, text), theirs, rtol=0, atol=1e-5)


def test_commands_say_it_in_one_sentence(
    tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """train init_from=, sample lora= and evaluate lora= end with exit code 2, and no run folder is made."""
    state, config = with_peft(tiny_sd)
    dora = in_diffusers_format(tmp_path / "dora", state, config)
    text = {"text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(4, 16)}
    changed(dora, lambda s: s | text, {})
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").write_bytes(b"code")
    for path, said in (
        (dora, "holds a LoRA of a text encoder"),
        (tmp_path / "pickle", "pytorch_lora_weights.bin may hold code"),
    ):
        run, drawn = tmp_path / "run", [f"model.path_or_id={tiny_sd}", f"lora={path}", "device=cpu"]
        commands = (
            (
                None,
                tiny(
                    tiny_sd,
                    f"init_from={path}",
                    f"output_dir={run}",
                    "policy.lora.rank=4",
                    "policy.lora.alpha=4",
                ),
            ),
            (sample, [*drawn, "n=1"]),
            (evaluate, [*drawn, "prompts.prompts=[cat]", "reward=brightness"]),
        )
        for command, words in commands:
            assert command_line(monkeypatch, *words, **({"command": command} if command else {})) == 2
            err = capsys.readouterr().err
            assert said in err.splitlines()[-1] and "Traceback" not in err and not run.exists()


def test_alpha_of_0_is_refused_in_a_configuration() -> None:
    """A LoRA that is scaled by 0 does not learn."""
    with pytest.raises(ConfigError, match=r"policy\.lora\.alpha=0 must be a number other than 0"):
        configured("policy.lora.alpha=0")


@torch.no_grad()
def test_a_module_whose_name_ends_anothers(tiny_sd: str, tmp_path: Path) -> None:
    """peft adapts every module whose name ends in an adapted one's; those that the LoRA leaves alone stay as
    they are."""
    family = StableDiffusion(tiny_sd)
    family.denoiser.add_module("conv1", torch.nn.Conv2d(4, 4, 3))
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            "unet.conv1.lora_A.weight": torch.randn(4, 4, 3, 3),
            "unet.conv1.lora_B.weight": torch.randn(4, 4, 1, 1),
        },
        file,
    )
    state, config = family.read_lora(file)
    policy = Policy(family, lora=LoRA(**config))
    policy.load_state_dict(state)
    assert policy.state_dict().keys() == state.keys() and len(state) > 2
    with policy.reference():
        base = rollout(policy, Lab.from_config(configured(*tiny(tiny_sd))).eval_sampler, key()).images
    tuned = rollout(policy, Lab.from_config(configured(*tiny(tiny_sd))).eval_sampler, key()).images
    assert torch.equal(tuned, base)
