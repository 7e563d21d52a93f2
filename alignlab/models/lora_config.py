"""What a LoRA says of itself: peft's configuration, in diffusers' metadata or in adapter_config.json.

Every entry that changes the effect is applied (rank, alpha, their patterns, rsLoRA) or refused by its name.
Unknown entries that are set to something are refused too: a later peft may give them an effect.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open

from alignlab.models.lora_keys import MERGE

TRAINED_ALPHA = "alignlab_trained_alpha"
"""Our own metadata: the alpha of the training, before the scale was multiplied into B (lora_files.write)."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_WITHOUT_EFFECT = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "peft_type",
    "init_lora_weights",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
"""Entries that are applied, that the tensors tell, or that describe the training and not its result."""
_REFUSED = {
    "use_dora": "it is a DoRA, which also rescales the weights it adapts",
    "lora_bias": "its up projections have biases",
    "bias": "it trained the network's biases too",
    "modules_to_save": "it trained whole modules too",
    "trainable_token_indices": "it trained tokens too",
    "target_parameters": "it adapts parameters and not modules",
    "layer_replication": "it is for a network with repeated layers",
    "megatron_config": "it is for layers that are split over devices",
    "alora_invocation_tokens": "it is switched on by tokens (aLoRA)",
    "arrow_config": "it routes between several LoRAs",
    "use_qalora": "it is a QALoRA, which pools the inputs of quantised layers",
}
_MOST_REPEATS = 5
"""Of one regular expression: matching takes time in proportion to the length of a name to this power."""
_PLAIN_STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
"""`init_lora_weights` that leave the base model's weights as they are."""


@dataclass(frozen=True)
class Stated:
    """The parts of peft's configuration that change what a LoRA does."""

    rank: int
    alpha: float
    ranks: dict[str, int] = field(default_factory=dict)
    """By pattern of a module's name."""
    alphas: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank) (arXiv 2312.03732)."""
    modules: SimpleNamespace = field(default_factory=SimpleNamespace)
    """What peft reads to tell which modules are adapted."""

    @property
    def plain(self) -> bool:
        """Whether one rank and one alpha say it all."""
        return not (self.ranks or self.alphas or self.rslora)

    def of(self, module: str) -> tuple[int, float, float]:
        """Rank, alpha and scale of one module, as peft would set them."""
        from peft.utils.other import get_pattern_key  # slow to import

        rank = self.ranks.get(get_pattern_key(list(self.ranks), module), self.rank)
        alpha = self.alphas.get(get_pattern_key(list(self.alphas), module), self.alpha)
        return rank, alpha, alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapted(self, network: Iterable[str]) -> set[str] | None:
        """The modules of a network that peft would adapt; None if the configuration leaves them open."""
        from peft.tuners.tuners_utils import check_target_module_exists  # slow to import

        if self.modules.target_modules in (None, [], "all-linear"):
            return None
        matches = {name: check_target_module_exists(self.modules, name) for name in network}
        return {
            name for name, match in matches.items() if match and type(match).__name__ != "_ExcludedModule"
        }


def stated(file: Path, network: Iterable[str]) -> tuple[Stated | None, float | None]:
    """What is said of the LoRA in `file`, and the alpha of its training if we wrote it with another.

    Either is None if it is not said.

    Args:
        network: what the network is called in diffusers' metadata ("unet", "transformer").

    Raises:
        ValueError: if it says of an effect that is not applied, or is damaged.
    """
    with safe_open(file, "pt") as opened:
        metadata: dict[str, str] = opened.metadata() or {}
    about = _object(metadata.get("lora_adapter_metadata", "{}"), file)
    prefixes = tuple(f"{name}." for name in network)
    ours = {key.partition(".")[2]: value for key, value in about.items() if key.startswith(prefixes)}
    if not ours and "r" in about:  # without prefixes
        ours = about
    beside = file.parent / PEFT_CONFIG
    if not ours and file.name == PEFT_FILE and not beside.is_file():
        raise ValueError(
            f"{file} needs {PEFT_CONFIG} beside it, which says its rank and alpha; fetch that too"
        )
    if not ours and beside.is_file():
        ours = _beside(beside, file)
    if not ours:
        return None, None
    trained = metadata.get(TRAINED_ALPHA)
    return _checked(ours, file), None if trained is None else _number(trained, TRAINED_ALPHA, file)


def _beside(config: Path, file: Path) -> dict[str, Any]:
    """The configuration in a folder that peft wrote.

    Beside another file than peft's it may say no more than that file does alone.
    """
    try:
        about = _object(config.read_text(encoding="utf-8"), config)
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{config} cannot be read; fetch it again") from None
    said = _checked(about, config)
    if file.name != PEFT_FILE and not (said.plain and said.rank == said.alpha):
        raise ValueError(
            f"{config} scales the LoRA, and programs that read {file.name} do not look at it; "
            f"give {PEFT_FILE}, or take {PEFT_CONFIG} away if it is another LoRA's"
        )
    return about if file.name == PEFT_FILE else {}


def _checked(about: Mapping[str, Any], file: Path) -> Stated:
    """The configuration, of which nothing is left out in silence."""
    kind = str(about.get("peft_type", "LORA")).removeprefix("PeftType.")
    if kind != "LORA":
        raise ValueError(f"{file} is no LoRA but a {kind} of peft, which is not applied; {MERGE}")
    start = str(about.get("init_lora_weights"))
    if start.lower() not in _PLAIN_STARTS:
        raise ValueError(
            f"{file} was trained with init_lora_weights={start}, which changes the base model's weights too, "
            "so that it does not fit the base model; convert it with peft's "
            f"save_pretrained(path_initial_model_for_weight_conversion=...), or {MERGE}"
        )
    defaults = _defaults()
    for key, value in about.items():
        if key in _WITHOUT_EFFECT or not value or value in (defaults.get(key), "none"):
            continue
        why = _REFUSED.get(key, "what that does to the LoRA is unknown here")
        raise ValueError(f"{file} says {key}={str(value)[:80]}: {why}, and that is not applied; {MERGE}")
    if not {"r", "lora_alpha"} <= about.keys():
        raise ValueError(
            f"{file} says nothing of its {'alpha' if 'r' in about else 'rank'}; save it again with its whole "
            "configuration"
        )
    rank, alpha = about["r"], about["lora_alpha"]
    ranks, alphas = (about.get(f"{word}_pattern") or {} for word in ("rank", "alpha"))
    whole = [rank, *ranks.values()] if isinstance(ranks, dict) and isinstance(alphas, dict) else [None]
    if any(type(number) is not int or number < 1 for number in whole):
        raise ValueError(
            f"{file} says rank={rank} and rank_pattern={str(ranks)[:80]}, which are no ranks; it is damaged"
        )
    for name, number in {"alpha": alpha, **alphas}.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(
                f"{file} says alpha={str(number)[:80]} ({name}), which is no number; it is damaged"
            )
    return Stated(rank, alpha, ranks, alphas, bool(about.get("use_rslora")), _modules(about, file))


def _modules(about: Mapping[str, Any], file: Path) -> SimpleNamespace:
    """The entries by which peft chooses modules."""
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = {name: about.get(name) for name in names}
    for name in names:
        given = chosen[name]
        listed = given if isinstance(given, list) else [given]
        kinds: Any = int if name == "layers_to_transform" else str
        if given is not None and not all(isinstance(word, kinds) for word in listed):
            raise ValueError(f"{file} says {name}={str(given)[:80]}, which names no modules; it is damaged")
    patterns = [
        word for word in (about.get("rank_pattern") or {}, about.get("alpha_pattern") or {}) for word in word
    ]
    patterns += [word for word in chosen.values() if isinstance(word, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            raise ValueError(
                f"{file} names modules by {pattern[:80]!r}, which is no regular expression; it is damaged"
            ) from None
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+]|,\}", pattern)) > _MOST_REPEATS:
            raise ValueError(
                f"{file} names modules by {pattern[:80]!r}, a regular expression that may take forever; list "
                "the modules' names instead"
            )
    return SimpleNamespace(**chosen, modules_to_save=None, target_parameters=None)


def _defaults() -> dict[str, Any]:
    """Of the installed peft, whose own entries do nothing unless they are set."""
    from peft import LoraConfig  # slow to import

    return {entry.name: entry.default for entry in fields(LoraConfig)}


def _object(text: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} holds no LoRA that can be read: what it says of its configuration is no JSON object"
        )
    return value


def _number(text: str, key: str, file: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not math.isfinite(number) or number == 0:
        raise ValueError(f"{file} says {key}={text[:80]}, which is no alpha; it is damaged")
    return number
