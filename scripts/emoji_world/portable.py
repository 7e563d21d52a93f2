"""Rewrites what transformers 5 saved so that transformers 4 reads it too: the shipped world works with
both."""

import json
from pathlib import Path

from safetensors.torch import load, save_file

PREFIX = "text_model."
"""What every tensor of a CLIP text encoder is called under until transformers 5.6 leaves it out; later
versions read both."""


def name_tensors_as_before(text_encoder: Path) -> None:
    """Puts the prefix before every tensor of the folder's model.safetensors that lacks it; the values stay as
    they are."""
    file = text_encoder / "model.safetensors"
    tensors = load(file.read_bytes())  # not mapped from the file that is written over
    named = {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in tensors.items()}
    save_file(named, file, metadata={"format": "pt"})


def write_vocabulary(tokenizer: Path) -> None:
    """Writes vocab.json and merges.txt beside the folder's tokenizer.json: the older tokenizer classes read
    only those."""
    model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tokenizer / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tokenizer / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
