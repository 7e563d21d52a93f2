"""What the keys of a LoRA file mean: which side of which layer a tensor is, or what it is instead.

Forms that are read: peft (`lora_A`, `lora_B`, with or without an adapter's name), kohya (`lora_down`,
`lora_up`, `alpha`) and those of diffusers (`lora.down`, `to_q_lora.down`, `lora_linear_layer.down`,
`.processor.`), under the prefixes of diffusers, peft and ComfyUI.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Side(NamedTuple):
    """A tensor of a LoRA."""

    layer: str
    """The layer without prefixes: dotted, or after `lora_unet_` with underscores."""
    flat: bool
    """Whether the layer is written with underscores."""
    side: str
    """`A` (down, the inputs), `B` (up, the outputs) or `alpha`."""


MERGE = (
    "merge it into the model with a program that reads it (diffusers' fuse_lora, ComfyUI, sd-scripts) "
    "and give the result as model.path_or_id"
)
"""How a user gets what cannot be applied here."""

_PREFIX = re.compile(r"(?:base_model\.model|model\.diffusion_model|diffusion_model|unet|transformer)\.")
_FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_")
_WEIGHT = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_(?P<peft>[AB])(?:(?:\.[\w-]+)?\.weight)?"
    r"|(?:_|\.|_linear_layer\.)(?P<arrow>down|up)\.weight)"
)
_ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora)?\.(?:lora_|network_)?alpha")
_ELSEWHERE = {
    r"(lora_)?(te|text_?encoders?)(_?\d)?[._]|text_model\.|lora_prior_te|clip_[lgh][._]|t5xxl[._]"
    r"|cond(itioner|_stage_model)[._]": "a LoRA of a text encoder",
    r"lora_prior_|lora_refiner_|refiner[._]|transformer_2\.|unet_2\.": "a LoRA of another network than the "
    "one that is tuned",
    r"vae[._]|first_stage_model\.|lora_vae": "a LoRA of the VAE",
    r"controlnet|lora_controlnet": "a ControlNet's LoRA",
    r"bundle_emb|emb_params|string_to_param|clip_[lgh]$|t5$": "embeddings of new words",
}
_OTHER_FORMS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA, which also rescales the weights it adapts",
    r"hada_": "a LoHa, a Hadamard product of two low-rank updates",
    r"lokr_": "a LoKr, a Kronecker product",
    r"lora_mid": "a LoCon in Tucker form, whose convolutions have a third factor",
    r"boft_|oft_|hra_u": "an OFT or BOFT, which rotates the weights",
    r"ia3|on_input": "an IA3, which scales activations",
    r"vera_|fourierft|randlora|waveft": "an adapter of another kind (VeRA or its like)",
    r"\.lora_E|ranknum": "an AdaLoRA, whose ranks have a third factor",
    r"lora_embedding_[AB]": "a LoRA of an embedding table",
    r"[._]lora[._](A|B|up|down)(\.[\w-]+)?\.bias": "a LoRA with a bias (lora_bias)",
    r"\.(w_norm|b_norm)$": "trained norms",
    r"\.diff(_b)?$": "whole differences of weights beside or instead of low-rank ones",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.scalar$": "a LyCORIS adapter with trained scalars",
    r"modules_to_save": "whole modules that were trained (modules_to_save)",
    r"(qkv|proj)_lora[12]\.": "a LoRA in XLabs' form, which replaces attention processors",
    r"set_weight|reshape_weight|\.scale$": "weights that replace the network's own",
    r"trainable_tokens": "trained tokens",
    r"\.bias$": "trained biases",
    r"\.weight$": "whole weights, not low-rank ones",
}


def side(key: str) -> Side | None:
    """The tensor's place in a LoRA of the network; None if it has none."""
    if elsewhere(key):
        return None
    name, flat = key, _FLAT.match(key)
    while (prefix := _PREFIX.match(name)) and not flat:
        name = name[prefix.end() :]
    if elsewhere(name):
        return None
    name = name[flat.end() :] if flat else name
    match = _WEIGHT.fullmatch(name)
    if match:
        letter = match["peft"] or {"down": "A", "up": "B"}[match["arrow"]]
        return Side(match["layer"].replace(".processor", ""), bool(flat), letter)
    alpha = _ALPHA.fullmatch(name)
    return Side(alpha["layer"].replace(".processor", ""), bool(flat), "alpha") if alpha else None


def elsewhere(key: str) -> str | None:
    """What a tensor outside the network belongs to, in words."""
    return next((what for pattern, what in _ELSEWHERE.items() if re.match(pattern, key)), None)


def unlike_a_lora(key: str) -> str:
    """What a tensor that has no place in a LoRA of the network is, in words."""
    bare = key
    while prefix := _PREFIX.match(bare):
        bare = bare[prefix.end() :]
    outside = elsewhere(key) or elsewhere(bare)
    return outside or next(
        (what for pattern, what in _OTHER_FORMS.items() if re.search(pattern, key)), "no weights of a LoRA"
    )


def resembles(keys: Iterable[str]) -> bool:
    """Whether a file of such keys is a LoRA, or another adapter that is refused by its name."""
    forms = (
        r"[._]lora(_[ABE]|_down|_up|_mid|_magnitude|_embedding|_linear_layer|\.down|\.up)"
        r"|^lora_|^lycoris_|hada_w|lokr_w|oft_"
    )
    return any(re.search(forms, key) for key in keys)
