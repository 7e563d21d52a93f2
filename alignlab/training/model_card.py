"""The model card of a run, RUN/model/README.md, and the way to the Hugging Face hub."""

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from alignlab.config.build import resolve
from alignlab.config.checks import is_hub_id
from alignlab.config.compose import typed
from alignlab.config.schema import TrainConfig
from alignlab.config.train_rules import COUNTED
from alignlab.distributed.ranks import rank
from alignlab.files.bounded_yaml import front_matter
from alignlab.files.safe_folder import RunError, refuse_links
from alignlab.files.writing import write_aside
from alignlab.models import OfPipeline
from alignlab.runs.folder import Run
from alignlab.runs.pasted import line, word
from alignlab.runs.stored_config import NOT_SCIENCE
from alignlab.training.setup import Lab

LICENCES: dict[str, tuple[str, str | None]] = {
    "CompVis/stable-diffusion-v1-4": ("creativeml-openrail-m", None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None),
    "stabilityai/stable-diffusion-2-1": ("openrail++", None),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", None),
    "emoji": ("apache-2.0", None),
}
"""Of base models, as the hub writes them: a licence, and its name if it is other."""
HERE = 'learned = "."  # this folder'

READERS = """
The LoRA's scale, alpha/rank, is multiplied into its weights, and its metadata says alpha = rank. So programs
that do not read alpha are right too: diffusers 0.22 and later. ComfyUI and other interfaces take the file
that `python -m alignlab.export run=RUN to=kohya output=lora.safetensors` writes; of the file in this folder
ComfyUI leaves out the attention layers of a UNet, whose names it does not know.
"""
"""Who reads a LoRA of ours, and from which version on: tried with diffusers 0.22, 0.25, 0.31 and 0.42;
ComfyUI by its source."""


def look_ahead(c: TrainConfig) -> None:
    """Looks at what the end of a run needs, before it begins: a token for push_to_hub, and the base model's
    licence for the card. A card without a licence is no reason not to train, so a README that cannot be read
    is told in a line.

    Raises:
        RunError: if there is no token.
    """
    from huggingface_hub import get_token

    if c.push_to_hub is not None and not get_token():
        raise RunError(
            f"push_to_hub={c.push_to_hub} needs a token of the Hugging Face hub, and none is found here; "
            "type hf auth login or set HF_TOKEN, or leave push_to_hub out and upload the finished run with "
            "python -m alignlab.export to=hub"
        )
    reason = _read_card(base_of(c))[1]
    if reason and rank() == 0:
        readme = Path(base_of(c)) / "README.md"
        print(
            f"warning: {readme} cannot be read ({reason}), so the model card will name no licence",
            file=sys.stderr,
        )


def write_card(lab: Lab, c: TrainConfig, run: Run, summary: dict[str, Any]) -> None:
    """Writes RUN/model/README.md: what was trained on what, the numbers before and after, and how to use
    it."""
    base, algorithm, full = base_of(c), c.algo["_target_"].rpartition(".")[2], lab.policy.full
    licence, name = licence_of(base)
    units = lab.units
    units |= {
        "reward": summary["reward_unit"],
        "lpips": f"{summary['diversity_metric']}, between images of a prompt",
    }
    trained, own = ", ".join(lab.reward.rewards), next((key for key in COUNTED if key in c.algo), None)
    aim, what = lab.objective.learns_from or trained, own or "images"
    table = [
        f"| {key} | {unit} | {summary['base'][key]:.4g} | {summary['final'][key]:.4g} |"
        for key, unit in units.items()
        if summary["final"].get(key) is not None
    ]
    prompts, start = lab.prompts.prompts, c.init_from
    shown = "; ".join(prompts[:12]) + (f"; and {len(prompts) - 12} more" if len(prompts) > 12 else "")
    science = {key: value for key, value in asdict(c).items() if key not in NOT_SCIENCE}
    configuration = yaml.safe_dump(science, sort_keys=False)
    text = f"""---
{_metadata(c, full).to_yaml()}
---
# {Path(base).name}, tuned on {aim} with {algorithm}

{"Every weight of the network was" if full else "A LoRA of the network was"} tuned with alignlab {
        summary["versions"]["alignlab"]
    }.

- base model: {base}{f", trained on from {start}" if start else ""}
- licence: {(name or licence) if licence else "that of the base model, which its folder does not name"}
- algorithm: {algorithm}, {c.steps} epochs of {c.samples_per_step} {what}, seed {c.seed}
- prompts: {shown}

## Before and after

Means over {len(prompts)} prompts, {c.evaluation.final_images} images each, the same noises {
        "where training started" if start else "for the base model"
    } and at the end.

| | unit | before | after |
|---|---|---|---|
{chr(10).join(table)}

{
        f"`reward` is what was maximised: {trained}. The others were measured only."
        if own is None
        else f"Trained on {aim} ({Path(c.algo['data']).name}); all of these were measured only. "
        f"`reward` is {trained}."
    }

## Use

```python
{usage(c, full, prompts[0])}
```
{"" if full else READERS}
## Configuration

```yaml
{configuration}```
"""
    with run.room_for("model/README.md"):
        write_aside(run.folder / "model" / "README.md", text)


def _metadata(c: TrainConfig, full: bool) -> Any:
    """What the hub reads of a card."""
    from huggingface_hub import ModelCardData

    base, (licence, name) = base_of(c), licence_of(base_of(c))
    more: dict[str, Any] = {"license": licence} if licence else {}
    if licence == "other":
        more |= {"license_name": name, "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md"}
    if _on_the_hub(base):
        more |= {"base_model": base, "base_model_relation": "finetune" if full else "adapter"}
    algorithm, trained = c.algo["_target_"].rpartition(".")[2].lower(), "full" if full else "lora"
    tags = ["text-to-image", "diffusers", "alignlab", "reward-fine-tuning", algorithm, trained]
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **more)


def base_of(c: TrainConfig) -> str:
    """The base model, as the configuration calls it."""
    return str(c.model.get("path_or_id") or c.model["_target_"])


def usage(c: TrainConfig, full: bool, prompt: str) -> str:
    """Plain diffusers code that draws a picture with what was learned."""
    model, sampler, base = c.model, c.eval_sampler, base_of(c)
    family = resolve(model["_target_"])
    kind = family.pipeline if isinstance(family, OfPipeline) else "DiffusionPipeline"
    about = {
        "num_inference_steps": sampler.get("steps"),
        "guidance_scale": model.get("embedded_guidance", sampler.get("guidance_scale")),
        "max_sequence_length": model.get("max_sequence_length"),
        "height": model.get("size"),
        "width": model.get("size"),
    }
    options = ", ".join(f"{key}={value}" for key, value in about.items() if value is not None)
    lines = [f"from diffusers import {kind}", "", HERE]
    if full:
        lines.append(f"pipe = {kind}.from_pretrained(learned)")
    else:
        if Path(base).is_file():
            config = f", config={model['config']!r}" if model.get("config") else ""
            lines.append(f"pipe = {kind}.from_single_file({base!r}{config})")
        elif not _on_the_hub(base) and not Path(base).exists():  # shipped
            lines.insert(0, "from importlib.resources import files\n")
            lines.append(f'pipe = {kind}.from_pretrained(str(files("alignlab") / "assets" / {base!r}))')
        else:
            lines.append(f"pipe = {kind}.from_pretrained({base!r})")
        lines.append("pipe.load_lora_weights(learned)")
    return "\n".join([*lines, f"image = pipe({prompt!r}, {options}).images[0]", 'image.save("image.png")'])


def licence_of(base: str) -> tuple[str | None, str | None]:
    """The base model's licence and its name if it is other: from the card in its folder, or of a known model;
    else None."""
    data, _ = _read_card(base)
    if data is None:
        return LICENCES.get(base, (None, None))
    licence, name = (
        value if isinstance(value := data.get(key), str) else None for key in ("license", "license_name")
    )
    return licence, name


def _read_card(base: str) -> tuple[dict[str, Any] | None, str]:
    """What the card in the base model's folder says of it, None if there is no card; and why it cannot be
    read, "" if it can."""
    card = Path(base) / "README.md"
    if not card.is_file():
        return None, ""
    try:
        return front_matter(card), ""
    except ValueError as error:
        return {}, str(error)


def push(folder: Path, repository: str | None) -> None:
    """Uploads RUN/model if there is somewhere to; a failure is a warning, for the run is on the disk.

    A repository that is there already is written over only if the user typed its name: the folder of a
    resumed run may be somebody else's, and name a repository of the user's own.
    """
    if repository is None:
        return
    try:
        print(f"uploaded: {upload(folder / 'model', repository, over=typed('push_to_hub'))}")
    except RunError as error:
        again = line("export", word("run", folder), "to=hub", word("output", repository))
        print(f"warning: {error}; the run is whole in {folder}; to upload it: {again}", file=sys.stderr)


def upload(model: Path, repository: str, *, over: bool = True) -> str:
    """Creates the repository (private, unless it is there) and uploads the folder; its address. The token is
    that of huggingface's own login or environment. Paths of this machine are left out of the card.

    Args:
        over: whether the repository may be there already.

    Raises:
        RunError: whatever the reason.
    """
    from huggingface_hub import HfApi

    refuse_links(model.parent, model.name)  # what they lead to would be given away
    try:
        api = HfApi()
        if not over and api.repo_exists(repository):
            raise FileExistsError("it is there already, and only a file names it")
        address = api.create_repo(repository, private=True, exist_ok=over)
        api.upload_folder(
            repo_id=repository,
            folder_path=model,
            ignore_patterns=["README.md"],
            commit_message="Upload with alignlab",
        )
        if (model / "README.md").is_file():
            card = without_paths((model / "README.md").read_text()).replace(HERE, f'learned = "{repository}"')
            api.upload_file(
                repo_id=repository,
                path_or_fileobj=card.encode(),
                path_in_repo="README.md",
                commit_message="Model card",
            )
    except Exception as error:  # the network's, the hub's, the token's: none of them may lose a run
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__
        raise RunError(f"{model} was not uploaded to {repository} ({reason})") from error
    return str(address)


def without_paths(text: str) -> str:
    """The text with the last part alone of every path from the root or the home."""
    return re.sub(r"(?<![\w./:>-])(?:~|/)(?:[\w.@+-]+/|/)*([\w.@+-]+)", r"\1", text)


def _on_the_hub(base: str) -> bool:
    return is_hub_id(base) and not Path(base).exists()
