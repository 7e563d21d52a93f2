"""metrics.jsonl, a JSON object an epoch, and what each checkpoint keeps of it under its checksums."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignlab.files.checksums import MANIFEST, whole
from alignlab.files.safe_folder import RunError
from alignlab.runs.layout import METRICS, numbered
from alignlab.runs.pasted import resume


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; none if it is not there.

    Raises:
        RunError: if one of them was damaged.
    """
    path = run / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if line.strip() and not is_line(line + b"\n"):
            raise RunError(
                f"line {number} of {path} cannot be read; this mends it from a checkpoint: {resume(run)}"
            )
    return [json.loads(line) for line in lines if line.strip()]


def changed_metrics(run: Path) -> tuple[Path, list[bytes]] | None:
    """What the newest checkpoint of a finished run keeps of metrics.jsonl, and where, if the file is not
    that; None if it is, and for runs of earlier versions, whose checkpoints keep nothing."""
    path = run / METRICS
    for checkpoint in reversed(numbered(run / "checkpoints", "step")):
        content = whole(checkpoint, METRICS)
        if content is not None:
            kept = content.splitlines(keepends=True)
            present = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
            return (
                None if [line for line in present if line.strip()] == kept else (checkpoint / METRICS, kept)
            )
    return None


def kept_lines(checkpoint: Path, count: int) -> list[bytes] | None:
    """The lines of metrics.jsonl that a checkpoint keeps; None if it keeps none, or damaged ones."""
    path = checkpoint / METRICS
    if not path.is_file():
        return None
    content = whole(checkpoint, METRICS) if (checkpoint / MANIFEST).is_file() else path.read_bytes()
    lines = [] if content is None else content.splitlines(keepends=True)
    return lines if len(lines) == count and all(map(is_line, lines)) else None


def is_line(text: bytes) -> bool:
    """Whether it is a whole line of metrics.jsonl."""
    try:
        return text.endswith(b"\n") and "step" in dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return False


def evaluated(lines: Iterable[dict[str, Any]], name: str) -> dict[int, float]:
    return {line["step"]: line[f"eval/{name}"] for line in lines if line.get(f"eval/{name}") is not None}


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they are written as null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
