"""The model card of a run, RUN/model/README.md, and the way to the Hugging Face hub."""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from alignlab.checks import COUNTED, is_hub_id
from alignlab.lab import Lab
from alignlab.nodes import resolve
from alignlab.runs import NOT_SCIENCE, RunError, write_aside

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
The LoRA's scale, alpha/rank, is multiplied into its weights, and its metadata says alpha = rank. So programs that do not read alpha are
right too: diffusers 0.22 and later. ComfyUI and other interfaces take the file that
`python -m alignlab.export run=RUN to=kohya output=lora.safetensors` writes; of the file in this folder ComfyUI leaves out the attention
layers of a UNet, whose names it does not know.
"""
"""Who reads a LoRA of ours, and from which version on: tried with diffusers 0.22, 0.25, 0.31 and 0.42; ComfyUI by its source."""


def write_card(lab: Lab, c: dict[str, Any], folder: Path, summary: dict[str, Any]) -> None:
    """Writes RUN/model/README.md: what was trained on what, the numbers before and after, and how to use it."""
    from huggingface_hub import ModelCardData

    base, algorithm, full = base_of(c), c["algo"]["_target_"].rpartition(".")[2], lab.policy.full
    licence, name = licence_of(base)
    more: dict[str, Any] = {"license": licence} if licence else {}
    if licence == "other":
        more |= {"license_name": name, "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md"}
    if _on_the_hub(base):
        more |= {"base_model": base, "base_model_relation": "finetune" if full else "adapter"}
    tags = ["text-to-image", "diffusers", "alignlab", "reward-fine-tuning", algorithm.lower(), "full" if full else "lora"]
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **more)
    units = lab.units
    units |= {"reward": summary["reward_unit"], "lpips": f"{summary['diversity_metric']}, between images of a prompt"}
    trained, own = ", ".join(lab.reward.rewards), next((key for key in COUNTED if key in c["algo"]), None)
    aim, what = getattr(lab.objective, "learns_from", trained), own or "images"
    table = [
        f"| {key} | {unit} | {summary['base'][key]:.4g} | {summary['final'][key]:.4g} |"
        for key, unit in units.items()
        if summary["final"].get(key) is not None
    ]
    prompts, start = lab.prompts.prompts, c["init_from"]
    shown = "; ".join(prompts[:12]) + (f"; and {len(prompts) - 12} more" if len(prompts) > 12 else "")
    configuration = yaml.safe_dump({k: v for k, v in c.items() if k not in NOT_SCIENCE}, sort_keys=False)
    text = f"""---
{data.to_yaml()}
---
# {Path(base).name}, tuned on {aim} with {algorithm}

{"Every weight of the network was" if full else "A LoRA of the network was"} tuned with alignlab {
        summary["versions"]["alignlab"]
    }.

- base model: {base}{f", trained on from {start}" if start else ""}
- licence: {(name or licence) if licence else "that of the base model, which its folder does not name"}
- algorithm: {algorithm}, {c["steps"]} epochs of {c["samples_per_step"]} {what}, seed {c["seed"]}
- prompts: {shown}

## Before and after

Means over {len(prompts)} prompts, {c["evaluation"]["final_images"]} images each, the same noises {
        "where training started" if start else "for the base model"
    } and at the end.

| | unit | before | after |
|---|---|---|---|
{chr(10).join(table)}

{
        f"`reward` is what was maximised: {trained}. The others were measured only."
        if own is None
        else f"Trained on {aim} ({Path(c['algo']['data']).name}); all of these were measured only. `reward` is {trained}."
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
    write_aside(folder / "model" / "README.md", text)


def base_of(c: dict[str, Any]) -> str:
    """The base model, as the configuration calls it."""
    return str(c["model"].get("path_or_id") or c["model"]["_target_"])


def usage(c: dict[str, Any], full: bool, prompt: str) -> str:
    """Plain diffusers code that draws a picture with what was learned."""
    model, sampler, base = c["model"], c["eval_sampler"], base_of(c)
    kind = getattr(resolve(model["_target_"]), "pipeline", "DiffusionPipeline")
    about = {
        "num_inference_steps": sampler.get("steps"), "guidance_scale": model.get("embedded_guidance", sampler.get("guidance_scale")),
        "max_sequence_length": model.get("max_sequence_length"), "height": model.get("size"), "width": model.get("size"),
    }  # fmt: skip
    options = ", ".join(f"{key}={value}" for key, value in about.items() if value is not None)
    lines = [f"from diffusers import {kind}", "", HERE]
    if full:
        lines.append(f"pipe = {kind}.from_pretrained(learned)")
    else:
        if Path(base).is_file():
            its = f", config={model['config']!r}" if model.get("config") else ""
            lines.append(f"pipe = {kind}.from_single_file({base!r}{its})")
        elif not _on_the_hub(base) and not Path(base).exists():  # shipped
            lines.insert(0, "from importlib.resources import files\n")
            lines.append(f'pipe = {kind}.from_pretrained(str(files("alignlab") / "assets" / {base!r}))')
        else:
            lines.append(f"pipe = {kind}.from_pretrained({base!r})")
        lines.append("pipe.load_lora_weights(learned)")
    return "\n".join([*lines, f"image = pipe({prompt!r}, {options}).images[0]", 'image.save("image.png")'])


def licence_of(base: str) -> tuple[str | None, str | None]:
    """The base model's licence and its name if it is other: from the card in its folder, or of a known model; else None."""
    from huggingface_hub import ModelCard

    card = Path(base) / "README.md"
    if card.is_file():
        try:
            data = ModelCard.load(card).data
        except ValueError:  # a README that is no card
            return None, None
        return data.get("license"), data.get("license_name")
    return LICENCES.get(base, (None, None))


def push(folder: Path, repository: str | None) -> None:
    """Uploads RUN/model if there is somewhere to; a failure is a warning, for the run is on the disk."""
    if repository is None:
        return
    try:
        print(f"uploaded: {upload(folder / 'model', repository)}")
    except RunError as error:
        again = f"python -m alignlab.export run={folder} to=hub output={repository}"
        print(f"warning: {error}; the run is whole in {folder}; to upload it: {again}", file=sys.stderr)


def upload(model: Path, repository: str) -> str:
    """Creates the repository (private, unless it is there) and uploads the folder; its address. The token is that of huggingface's own
    login or environment. Paths of this machine are left out of the card.

    Raises:
        RunError: whatever the reason.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=model, ignore_patterns=["README.md"], commit_message="Upload with alignlab"
        )
        if (model / "README.md").is_file():
            card = without_paths((model / "README.md").read_text()).replace(HERE, f'learned = "{repository}"')
            api.upload_file(
                repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md", commit_message="Model card"
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
