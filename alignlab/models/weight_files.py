"""The files with the weights of one part of a pipeline folder: which variants, which one is read, what is
broken."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<new>\w+))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<old>(?!safetensors|bin)\w+))?\.(?P<kind>safetensors|bin)"
)
"""A file of weights; its variant stands before the shard's number, or after it as it once did."""
PRECISIONS = ("fp32", "bf16", "fp16")
"""Variants that are the same weights, rounded: any of them stands in for the plain ones, and they for it."""
SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|weight_scale_inv|absmax|quant_map)(\.|$)")
"""Tensors of files whose other numbers are codes: their products are the weights."""


def variants(folder: Path) -> dict[str | None, list[Path]]:
    """The files by variant; None is the plain one. Where one has both forms, the .safetensors."""
    by_variant: dict[str | None, dict[str, list[Path]]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = FILE.fullmatch(file.name)
        if match:
            by_variant.setdefault(match["new"] or match["old"], {}).setdefault(match["kind"], []).append(file)
    return {variant: kinds.get("safetensors") or kinds["bin"] for variant, kinds in by_variant.items()}


def chosen(folder: Path, variant: str | None) -> tuple[str | None, list[Path]]:
    """The variant that is read, and its files: the one asked for, else the same weights in another precision.

    Raises:
        ValueError: if there are only other weights (non_ema), or none.
    """
    available = variants(folder)
    alike = (variant, None, *reversed(PRECISIONS)) if variant is None or variant in PRECISIONS else (variant,)
    for candidate in alike:
        if candidate in available:
            return candidate, available[candidate]
    if not available:
        raise ValueError(f"there are no weights in {folder.name}/")
    others = sorted(str(candidate) for candidate in available if candidate)
    mend = f"set model.variant={others[0]}" if others else "set model.variant=null"
    kind = f"of variant {', '.join(others)}" if others else "without a variant"
    raise ValueError(f"{folder.name}/ holds only weights {kind}; {mend}")


def broken(folder: Path, files: list[Path]) -> Iterator[str]:
    """What the headers and the index of these files say is wrong, a sentence each; no tensor is read."""
    yield from _absent(folder, files)
    for file in files:
        where = f"{folder.name}/{file.name}"
        with file.open("rb") as opened:
            start = opened.read(40)
        if start.startswith(b"version https://git-lfs"):
            yield f"{where} is a pointer of Git LFS, and not the weights; git lfs pull fetches them"
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as header:
                    scales = [key for key in header.keys() if SCALES.search(key)]
            except (OSError, SafetensorError) as error:
                yield f"{where} cannot be read ({str(error)[:120]}); it is cut off or damaged: fetch it again"
                continue
            if scales:
                yield f"{where} is quantised ({scales[0]} scales it); give the model whose weights are not"


def _absent(folder: Path, files: list[Path]) -> Iterator[str]:
    """Shards that the index of these files names and that are not there."""
    match = FILE.fullmatch(files[0].name)
    if match is None:
        return
    variant = match["new"] or match["old"]
    index = folder / f"{match['stem']}.{match['kind']}.index{f'.{variant}' if variant else ''}.json"
    if not index.is_file():
        sharded = [file.name for file in files if re.search(r"-\d+-of-\d+", file.name)]
        if sharded:
            yield f"{folder.name}/ holds {sharded[0]} without its index {index.name}; fetch it again"
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lost = sorted(name for name in named if not (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield f"{folder.name}/{index.name} is no index of weights; fetch it again"
        return
    if lost:
        yield f"{folder.name}/{lost[0]} is missing, which {index.name} names; fetch it again"
