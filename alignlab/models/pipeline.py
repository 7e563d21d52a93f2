"""What the families share: a diffusers pipeline is loaded, its LoRA or the whole of it is saved and read, its
latents are decoded."""

import importlib
import importlib.resources
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alignlab.models import kohya, lora_files, lora_keys, unfit, weight_files
from alignlab.models.unfit import Configs

_SHAPES_ONLY = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, families are built on the meta device: of a folder or hub id only the configurations are read,
    and no weight."""
    before = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(before)


class DiffusersPipeline:
    """A `models.Family` around a diffusers pipeline; a subclass says how prompts are encoded and what the
    network is told.

    Args:
        path_or_id: a pipeline folder, the name of a model shipped in alignlab/assets ("emoji"), a hub id, or
            a single .safetensors file that holds a whole model in its original format (LDM, ComfyUI).
        revision: of a hub id.
        variant: of the weight files ("fp16"). Where a part lacks it, the same weights in another precision
            are read. A single file has none.
        config: of a single file: the pipeline folder or hub id whose configuration, scheduler and tokenizers
            it has. None: diffusers guesses it from the file's keys and fetches it from the hub.
        lora_targets: which modules of the network LoRA adapts unless policy.lora.targets says otherwise.

    Raises:
        FileNotFoundError: if a folder-like path holds no pipeline.
        OSError: if it cannot be loaded.
        ValueError: if it is another family's.
    """

    pipeline = "StableDiffusionPipeline"
    """diffusers' class."""
    network = "unet"
    """The part that is tuned."""
    max_sequence_length: int = 512
    """Tokens that an encoder other than CLIP reads."""
    rectified_flow = False
    """Whether it predicts a velocity (sampler=flow) or is a diffusion model (sampler=ddim)."""
    others: tuple[str, ...] = ("text_encoder", "vae")
    """The frozen parts; some may be missing."""
    required: tuple[str, ...] = ("text_encoder", "tokenizer")
    """Of the parts that read prompts, those without which there is no pipeline."""

    @classmethod
    def check(cls, path_or_id: str, config: str | None = None, **_: Any) -> None:
        """Raises before anything is loaded."""
        at = Path(locate(path_or_id))
        if at.is_file():
            try:
                a_lora = lora_keys.resembles(lora_files.header(at))
            except SafetensorError as error:
                raise ValueError(
                    f"path_or_id={path_or_id} cannot be read as .safetensors ({error}); fetch it again"
                ) from None
            if a_lora:
                raise ValueError(
                    f"path_or_id={path_or_id} is a LoRA; give the model that it is for, and the LoRA as "
                    "init_from"
                )
        elif config is not None:
            raise ValueError(
                f"config={config} is of a single file, and path_or_id={path_or_id} is none; set "
                "model.config=null"
            )
        for key, given in {"path_or_id": path_or_id, "config": config}.items():
            folder = Path(locate(given, key=key, weights=key == "path_or_id")) if given else at
            if folder.is_dir():
                try:
                    cls._examine(folder, key, given or path_or_id)
                except Unfit as error:
                    raise ValueError(f"{key}={given or path_or_id}: {error}") from None

    @classmethod
    def _examine(cls, folder: Path, key: str, given: str) -> None:
        """Refuses a folder whose index and configurations are not those of a whole pipeline of this family.

        Args:
            key: what errors call it: "path_or_id", whose parts are looked at too, or "config".
            given: what was typed.

        Raises:
            Unfit: for the first such thing. A ValueError if a file cannot be read.
        """
        index = read_index(folder, key, given)
        kind = index.get("_class_name")
        if kind not in (None, cls.pipeline):
            mend = f"choose {unfit.MODELS[kind]}" if kind in unfit.MODELS else f"give a {cls.pipeline}"
            raise Unfit(f"{folder} is a {kind}, and this family loads a {cls.pipeline}; {mend}")
        if key != "path_or_id":
            return
        for problem in cls.pipeline_problems(index):
            raise Unfit(problem)
        needed = (cls.network, "vae", *cls.required, "scheduler")
        unnamed = [part for part in needed if not (index.get(part) or [None])[0]]
        if unnamed:
            raise Unfit(f"{folder} has no {', no '.join(unnamed)}; give a whole pipeline folder")
        configs: dict[str, Any] = {"pipeline": index}
        for part in (*WEIGHED, "scheduler"):
            if (index.get(part) or [None])[0]:
                file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
                configs[part] = {**read_json(file, f"{key}={given}"), "_class_name": index[part][1]}
        for problem in cls.problems(configs):
            raise Unfit(f"its {problem}")
        # The index names the class that is loaded; a scheduler exchanged in its own file alone is another one
        # all the same.
        own = read_json(folder / "scheduler" / "scheduler_config.json", f"{key}={given}")
        for problem in cls.problems(configs | {"scheduler": {"_class_name": index["scheduler"][1], **own}}):
            raise Unfit(f"its {problem}")

    @classmethod
    def pipeline_problems(cls, index: unfit.Config) -> Iterator[str]:
        """What model_index.json alone says of another model than the family takes it for."""
        yield from ()

    @classmethod
    def problems(cls, configs: Configs) -> Iterator[str]:
        """What makes this another model than the family takes it for; each sentence begins with the part's
        name."""
        network, vae = configs.get(cls.network, {}), configs.get("vae", {})
        yield from unfit.quantised_problems(configs)
        yield from cls.network_problems(configs)
        yield from unfit.vae_problems(vae, cls.latent_channels(network))
        clips = cls.pipeline != "StableDiffusionPipeline"
        scheduler = configs.get("scheduler", {})
        yield from unfit.scheduler_problems(scheduler, rectified_flow=cls.rectified_flow, clips=clips)

    @classmethod
    def network_problems(cls, configs: Configs) -> Iterator[str]:
        """The same of the network alone, and of what it is told."""
        yield from unfit.channel_problems(cls.network, configs.get(cls.network, {}))

    @classmethod
    def latent_channels(cls, network: unfit.Config) -> int | None:
        """The channels of the latents that the network draws; None if its configuration does not say."""
        return network.get("in_channels")

    def __init__(
        self,
        path_or_id: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    ) -> None:
        import diffusers  # slow to import, and the check of a configuration is quick
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for library in (diffusers_logging, transformers_logging):  # a run has a progress bar of its own
            library.set_verbosity_error()
            library.disable_progress_bar()
        kind = getattr(diffusers, self.pipeline)
        unused = _unused(kind)
        at = locate(path_or_id)
        try:
            if _SHAPES_ONLY.get():
                at = _configurations(at, revision, config)
                self.pipe: Any = kind.from_pretrained(at, **unused, **_without_weights(Path(at)))
            elif Path(at).is_file():
                home = locate(config, key="config", weights=False) if config else None
                self.pipe = kind.from_single_file(at, config=home, revision=revision, **unused)
            else:
                folder = Path(at) if Path(at).is_dir() else _fetched(kind, at, revision, variant)
                self._examine(folder, "path_or_id", path_or_id)
                self.pipe = kind.from_pretrained(folder, **unused, **_with_weights(folder, variant))
                self.pipe.register_to_config(
                    _name_or_path=at
                )  # of a hub id, the id: what is saved names no cache
            self._refuse_unfit()
        except (
            Exception
        ) as error:  # of files that are damaged or something else, diffusers and transformers fail in any way
            reason = reason_of(error)
            mend = (
                "it is damaged or of another version; fetch it again" if Path(at).is_dir() else _of_hub(error)
            )
            if Path(at).is_file() and config is None:
                mend = (
                    "without a network, give the pipeline folder that its configuration is of as model.config"
                )
            if Path(at).is_file() and config is not None:
                mend = (
                    f"it must hold every part of a {self.pipeline}, and model.config={config} be of the same "
                    "model"
                )
            if isinstance(error, Unfit):
                raise ValueError(f"model.path_or_id={path_or_id}: {error}") from error
            raise OSError(f"model.path_or_id={path_or_id} cannot be loaded ({reason}); {mend}") from error
        self.lora_targets = tuple(lora_targets)
        self.denoiser: nn.Module = getattr(self.pipe, self.network)
        parts = {name: getattr(self.pipe, name, None) for name in self.others}
        self.frozen: tuple[nn.Module, ...] = tuple(part for part in parts.values() if part is not None)
        self.text_encoders = tuple(part for part in self.frozen if part is not parts["vae"])
        for name, module in {self.network: self.denoiser, **parts}.items():
            if module is not None:
                nn.Module.float(module)  # weights may be stored in half precision
                _refuse_nonfinite(f"model.path_or_id={path_or_id}: {name}", module)
        self.scheduler: Any = self.scheduler_of(self.pipe.scheduler)

    def scheduler_of(self, scheduler: Any) -> Any:
        """The scheduler whose tables sampler and regression read."""
        return scheduler

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config: Any = self.denoiser.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return (config.in_channels, height, width)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        _, height, width = self.latent_shape
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are longer than every tokenizer's limit: their ends are not read, as in the
        pipeline."""
        named = [getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        readers = [
            (t, t.model_max_length if _of_clip(t) else self.max_sequence_length)
            for t in named
            if t is not None
        ]
        longest = max(limit for _, limit in readers)
        too_long = [
            prompt for prompt in prompts if len(prompt.encode()) > longest - 3
        ]  # a token is a byte at least, and ends are marked
        for tokenizer, limit in readers:
            lengths = [
                len(ids)
                for k in range(0, len(too_long), 1000)
                for ids in tokenizer(too_long[k : k + 1000], truncation=False).input_ids
            ]
            too_long = [prompt for prompt, length in zip(too_long, lengths, strict=True) if length > limit]
        return too_long

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [M, C, h, w] to images [M, 3, H, W] in [0, 1]."""
        scale, shift = self._scale_and_shift(x0)
        return (self.pipe.vae.decode(x0 / scale + shift, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [M, 3, H, W] in [0, 1] to latents [M, C, h, w]: the mode of the VAE's posterior, so that
        nothing is drawn."""
        z = self.pipe.vae.encode(2 * images - 1).latent_dist.mode()
        scale, shift = self._scale_and_shift(z)
        return (z - shift) * scale

    def _scale_and_shift(self, like: Tensor) -> tuple[Any, Any]:
        """Between the VAE's latents z and the network's x = (z - shift) scale: numbers, or one for each
        channel."""
        config = self.pipe.vae.config
        if config.get("latents_mean") is None:
            return config.scaling_factor, config.get("shift_factor") or 0.0
        statistics = (config["latents_mean"], config["latents_std"])
        mean, std = (like.new_tensor(list(values)).view(1, -1, 1, 1) for values in statistics)
        return config.scaling_factor / std, mean

    def save(self, folder: Path, lora: dict[str, Tensor] | None, config: Any) -> None:
        """Writes a LoRA in diffusers' format with alpha = rank (lora_files.write), or the whole pipeline when
        lora is None."""
        if lora is None:
            setattr(self.pipe, self.network, self.denoiser)
            self.pipe.save_pretrained(folder)
        else:
            targets = config.target_modules
            lora_files.write(
                folder / lora_files.WEIGHTS_FILE, self.network, lora, config.r, config.lora_alpha, targets
            )

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of a LoRA (ours or another's, a folder or a file), and its rank, alpha and targets
        (lora_files.py)."""
        return lora_files.read(path, self.network, self._shapes(), self.lora_namings())

    def lora_namings(self) -> tuple[kohya.Naming, ...]:
        """The names that layers of the network have in LoRAs of others: diffusers', kohya's and, of a UNet,
        the LDM's."""
        config = self.denoiser.config
        ldm = (lambda module: kohya.ldm(module, config),) if self.network == "unet" else ()
        return kohya.same, self.kohya_layer, *ldm

    def save_kohya(self, file: Path, lora: dict[str, Tensor], alpha: float) -> None:
        """Writes a LoRA as one file for ComfyUI and its like (kohya.py)."""
        kohya.write(file, lora, alpha, self._widths(), self.kohya_layer)

    def kohya_layer(self, module: str) -> kohya.Layer | None:
        """What a module of the network is called there."""
        return kohya.same(module)

    def _shapes(self) -> dict[str, torch.Size]:
        """Of the weights of every module of the network that a LoRA can adapt, adapted or not."""
        weights = {
            key.removesuffix(".weight").removesuffix(".base_layer"): value
            for key, value in self.denoiser.state_dict().items()
            if key.endswith(".weight")
        }
        return {
            name: value.shape for name, value in weights.items() if value.dim() > 1 and ".lora_" not in name
        }

    def _widths(self) -> dict[str, int]:
        """Their outputs."""
        return {name: shape[0] for name, shape in self._shapes().items()}

    def read_full(self, folder: Path) -> dict[str, Tensor]:
        """The network's weights in a pipeline folder, float32."""
        kind: Any = type(self.denoiser)
        try:
            network: nn.Module = kind.from_pretrained(folder, subfolder=self.network)
        except Exception as error:
            raise ValueError(
                f"{folder} holds no {self.network} that can be read: {reason_of(error)}"
            ) from None
        lacks = [key for key, tensor in network.state_dict().items() if tensor.is_meta]
        if lacks:
            raise ValueError(
                f"{folder} holds a {self.network} without {len(lacks)} of its tensors, {lacks[0]} first"
            )
        _refuse_nonfinite(f"the {self.network} in {folder}", nn.Module.float(network))
        return network.state_dict()

    def _refuse_unfit(self) -> None:
        """Refuses what loads without a word and draws nonsense: another model, lacking tensors, a tokenizer
        without words.

        Raises:
            Unfit: for the first such thing.
        """
        configs: dict[str, Any] = {"pipeline": dict(self.pipe.config)}
        for name in (*WEIGHED, "scheduler"):
            part = getattr(self.pipe, name, None)
            if part is not None:
                config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
                configs[name] = {**config, "_class_name": type(part).__name__}
        for problem in self.problems(configs):
            raise Unfit(f"its {problem}")
        if _SHAPES_ONLY.get():
            return
        for name in WEIGHED:
            module = getattr(self.pipe, name, None)
            lacks = (
                [key for key, tensor in module.state_dict().items() if tensor.is_meta]
                if module is not None
                else []
            )
            if lacks:
                raise ValueError(f"the weights in {name} lack {len(lacks)} tensors, {lacks[0]} first")
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipe, name, None)
            if tokenizer is None:
                continue
            if tokenizer("cat", truncation=False).input_ids == tokenizer("dog", truncation=False).input_ids:
                raise ValueError(f"{name} reads every prompt alike, so its vocabulary is missing")
            if _of_clip(tokenizer) and tokenizer.model_max_length > 10**6:
                raise ValueError(f"{name} has no model_max_length, so its tokenizer_config.json is missing")


class Unfit(ValueError):
    """What is whole, and no model that a family can take."""


def locate(path_or_id: str, *, key: str = "path_or_id", weights: bool = True) -> str:
    """A folder or a .safetensors file as it is, a shipped model by name, else a hub id.

    Args:
        key: what errors call it.
        weights: whether the folder must hold the weights of its parts.

    Raises:
        FileNotFoundError: for a folder that holds no pipeline, and for what is neither file nor folder nor
            hub id.
        ValueError: for a file of another kind.
    """
    if Path(path_or_id).is_file():
        if not path_or_id.endswith(".safetensors"):
            raise ValueError(
                f"{key}={path_or_id} is no .safetensors file; convert it, or give a pipeline folder"
            )
        return path_or_id
    shipped = importlib.resources.files("alignlab") / "assets" / path_or_id
    for folder in (Path(path_or_id), Path(str(shipped))):
        if folder.is_dir():
            index = folder / "model_index.json"
            lacks = [] if index.is_file() else ["model_index.json"]
            parts = read_index(folder, key, path_or_id) if index.is_file() else {}
            named = [k for k, v in parts.items() if k in WEIGHED and v[0] is not None]
            for part in (named or ("unet", "vae", "text_encoder")) if weights else ():
                if not any(file.suffix in (".safetensors", ".bin") for file in (folder / part).glob("*")):
                    lacks.append(f"weights in {part}/")
            if lacks:
                mend = (None if index.is_file() else _instead(folder)) or "give a diffusers pipeline folder"
                raise FileNotFoundError(f"{key}={path_or_id}: {folder} has no {', no '.join(lacks)}; {mend}")
            return str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id) or path_or_id.startswith((".", "/", "~")):
        address = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", path_or_id)
        mend = "give a diffusers pipeline folder, a .safetensors file, a hub id like owner/name, or emoji"
        mend = f"of a page of the hub, write {key}={address[1]}" if address else mend
        raise FileNotFoundError(
            f"{key}={path_or_id}: there is no such folder and no such shipped model; {mend}"
        )
    return path_or_id


def _instead(folder: Path) -> str | None:
    """What to give in place of a folder that is no pipeline, if that can be told from what lies in it and
    beside it."""
    lora = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
    if any((folder / name).is_file() for name in lora):
        return "it is a LoRA: give the model that it is for, and the LoRA as init_from"
    if (folder.parent / "model_index.json").is_file():
        return f"it lies in the pipeline folder {folder.parent}: give that"
    trained = next(
        (part for part in ("unet", "transformer") if (folder / part / "config.json").is_file()), None
    )
    if trained:
        return (
            f"it holds {trained}/ alone, as a training script's checkpoint: put that in place of {trained}/ "
            "in a copy of the base model"
        )
    return None


def read_index(folder: Path, key: str, given: str) -> dict[str, Any]:
    """model_index.json, whose parts are classes of known libraries: a folder of somebody else's names no code
    of its own.

    Raises:
        ValueError: if it is broken, or names other libraries.
    """
    where, path = f"{key}={given}", folder / "model_index.json"
    index = read_json(path, where)
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, list):
            continue
        library = (
            part[0] if len(part) == 2 and all(isinstance(word, str | None) for word in part) else f"{part}"
        )
        if library not in LIBRARIES:
            raise ValueError(
                f"{where}: {path} takes {name} from {library}, and only {', '.join(filter(None, LIBRARIES))} "
                "are loaded"
            )
    broken = [name for name in (*WEIGHED, "scheduler") if name in index and not isinstance(index[name], list)]
    if broken or not isinstance(index.get("_class_name"), str | None):
        raise ValueError(
            f"{where}: {path} says of {broken[0] if broken else '_class_name'} what no pipeline does; fetch "
            "it again"
        )
    return index


def _unused(kind: Any) -> dict[str, Any]:
    """Arguments that leave out the components that no image needs, whether the folder has them or not."""
    taken = inspect.signature(kind.__init__).parameters
    idle = ("safety_checker", "feature_extractor", "image_encoder")
    left_out = {name: None for name in idle if name in taken}
    return {**left_out, **({"requires_safety_checker": False} if "requires_safety_checker" in taken else {})}


def _fetched(kind: Any, path_or_id: str, revision: str | None, variant: str | None) -> Path:
    """A repository of the hub as a folder of its cache, with the files of a variant; in another precision if
    it has none."""
    for asked in dict.fromkeys((variant, *reversed(weight_files.PRECISIONS))):
        folder = Path(kind.download(path_or_id, revision=revision, variant=asked, **_unused(kind)))
        index = read_index(folder, "path_or_id", path_or_id)
        parts = [folder / part for part in WEIGHED if (index.get(part) or [None])[0]]
        if all(weight_files.variants(part) for part in parts):
            break
    return folder


def _with_weights(folder: Path, variant: str | None) -> dict[str, nn.Module]:
    """The parts of a pipeline folder by name, each from the files of the variant that `weight_files.chosen`
    finds.

    Raises:
        ValueError: if files lack a tensor that a part has; transformers would fill it in with random numbers.
        Unfit: if files are broken or absent, or hold tensors of a larger network.
    """
    parts: dict[str, nn.Module] = {}
    index: Any = json.loads((folder / "model_index.json").read_text())
    for name in WEIGHED:
        library, kind = index.get(name) or ("", "")
        if library not in ("diffusers", "transformers"):
            continue
        try:
            read_variant, files = weight_files.chosen(folder / name, variant)
        except ValueError as error:
            raise Unfit(str(error)) from None
        for problem in weight_files.broken(folder / name, files):
            raise Unfit(problem)
        safe = files[0].suffix == ".safetensors"
        loader: Any = getattr(importlib.import_module(library), kind)
        options: dict[str, Any] = {
            "variant": read_variant,
            "use_safetensors": safe,
            "output_loading_info": True,
        }
        parts[name], about = loader.from_pretrained(folder / name, **options)
        if any(
            key.startswith(PREFIX) and key.removeprefix(PREFIX) in about["unexpected_keys"]
            for key in about["missing_keys"]
        ):
            # transformers 5.6 left the prefix out of a CLIP text encoder's names, and 4 does not know these
            options["key_mapping"] = {rf"^(?!{re.escape(PREFIX)}|text_projection)": PREFIX}
            parts[name], about = loader.from_pretrained(folder / name, **options)
        lacks = sorted(about["missing_keys"])
        if lacks:
            raise ValueError(f"the weights in {name} lack {len(lacks)} tensors, {lacks[0]} first")
        if library == "diffusers":
            _refuse_larger(name, parts[name], sorted(about["unexpected_keys"]))
    return parts


def _refuse_larger(name: str, module: nn.Module, left_over: list[str]) -> None:
    """Refuses weights of a larger network than its configuration describes; warns of tensors that are no part
    of it."""
    inside = [key for key in left_over if hasattr(module, key.partition(".")[0])]
    if inside:
        raise Unfit(
            f"the weights in {name} have {len(inside)} tensors more than its config.json describes, "
            f"{inside[0]} first; give the config.json that they were saved with"
        )
    if left_over:
        which = f"{len(left_over)} tensors in {name} are no part of the network, and are left out"
        print(f"warning: {which}; the first: {left_over[0]}", file=sys.stderr)


def _refuse_nonfinite(what: str, module: nn.Module) -> None:
    """Raises a ValueError if a weight is not a finite number: every image, and every update, would be none
    either."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{what} holds numbers that are not finite ({key}); it is damaged: fetch it again"
            )


def _of_hub(error: BaseException | None) -> str:
    """What to do about a hub id that did not load."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    while error is not None:
        if isinstance(error, GatedRepoError):
            return "accept its terms on the hub, then hf auth login"
        if isinstance(error, RepositoryNotFoundError):
            return (
                "the hub has no such repository, or hides it: check the name, or hf auth login if it is "
                "private"
            )
        if isinstance(error, RevisionNotFoundError):
            return "it has no such commit: check model.revision"
        if isinstance(error, EntryNotFoundError) and "model_index.json" in str(error):
            return "it is no diffusers pipeline, for it has no model_index.json"
        error = error.__cause__ or error.__context__
    return NO_NETWORK


def _of_clip(tokenizer: Any) -> bool:
    return type(tokenizer).__name__.startswith("CLIP")


def reason_of(error: Exception) -> str:
    """The beginning of what a library says, as a part of a sentence."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said.partition(" (")[0])[:200].rstrip(".:, ")


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object. `where` is what errors begin with.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise ValueError(f"{where}: {path} cannot be read ({reason}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {path} holds no JSON object; fetch it again")
    return value


def _configurations(where: str, revision: str | None, config: str | None) -> str:
    """The folder as it is, or that of a single file's configuration; of a hub id a folder with all but the
    weights."""
    if Path(where).is_file():
        if config is None:
            raise OSError("its configuration is not in the file")
        where = locate(config, key="config", weights=False)
    if Path(where).is_dir():
        return where
    from huggingface_hub import snapshot_download

    return snapshot_download(where, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"])


def _without_weights(folder: Path) -> dict[str, nn.Module]:
    """The parts of a pipeline folder by name, on the meta device, as their configurations describe them."""
    parts: dict[str, nn.Module] = {}
    index: Any = json.loads((folder / "model_index.json").read_text())
    for name in WEIGHED:
        library, kind = index.get(name) or ("", "")
        if library not in ("diffusers", "transformers"):
            continue
        part_class: Any = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            if library == "diffusers":
                parts[name] = part_class.from_config(part_class.load_config(folder / name))
            else:
                parts[name] = part_class(part_class.config_class.from_pretrained(folder / name))
    return parts


WEIGHED = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a pipeline folder that hold weights."""
PREFIX = "text_model."
"""What the tensors of a CLIP text encoder are called under, but for its projection, in most folders."""
LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")
"""Where the parts of a pipeline may come from; the last is diffusers' own safety checker, which is left
out."""
NO_NETWORK = "fetch it where there is a network, or give a folder"
