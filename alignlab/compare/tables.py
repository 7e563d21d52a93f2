"""How numbers are written for people and for spreadsheets."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.metrics.statistics import Interval


def interval_text(interval: Interval | None, form: str = ".3f") -> str:
    if interval is None:
        return "–"
    if not np.isfinite(interval.low):
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        table.writeheader()
        table.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
