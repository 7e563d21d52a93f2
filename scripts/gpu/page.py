"""The measurements of one device as a page."""

from collections.abc import Iterator
from typing import Any

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense 16-bit matrix products with float32 accumulation, from the vendor's data sheets; the first name that
the device's name holds counts."""


def peak_tflops(device: str) -> float | None:
    """TFLOP/s by the device's name; None for one that is not in the table."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device), None)


def page(results: dict[str, Any]) -> str:
    """Markdown of the file that gpu_check.py keeps."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    peak, items = results["peak_tflops"], results["items"]
    yield from (f"# {results['device']}", "", f"    {results['command']}", "")
    versions = sorted(
        {
            f"torch {item['torch']}, alignlab {(item['commit'] or 'without git')[:12]}"
            for item in items.values()
        }
    )
    known = f"{peak:g} TFLOP/s" if peak else "not known"
    yield (
        f"{'; '.join(versions)}; {results['precision']}, memory of the device "
        f"{_number(results['memory_gb'], 1)} GiB, its dense peak in 16 bits {known}. "
        "Random weights of the real architectures, at their own resolution; the reward is the embedded CLIP, "
        "so a larger one comes on top."
    )
    for size in dict.fromkeys(key.partition("/")[0] for key in items):
        its = {key.partition("/")[2]: item for key, item in items.items() if key.startswith(f"{size}/")}
        yield from ("", f"## {size}", "")
        yield from _speed({name: item for name, item in its.items() if not name.startswith("memory/")}, peak)
        yield from _rollout(its)
        memory = {
            name.removeprefix("memory/"): item for name, item in its.items() if name.startswith("memory/")
        }
        if memory:
            yield from _memory(memory)
    yield from (
        "",
        "images/s: of sampling, scoring and training together (rollout: of sampling and decoding). "
        "updates/s: optimiser steps. passes: of single latents "
        "through the U-Net (a guided prediction is two, a checkpoint's recomputation counts). in the U-Net: "
        "share of the device's time, forward and backward. "
        "utilisation: the U-Net's operations in these passes over what the peak could do in the whole time; "
        "other parts' operations are not counted.",
    )


def _speed(items: dict[str, dict[str, Any]], peak: float | None) -> Iterator[str]:
    yield (
        "| | images | micro-batch | steps | w | seconds | images/s | updates/s | passes forward, backward | "
        "in the U-Net | utilisation | peak GiB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, item in items.items():
        if item["status"] != "measured":
            yield f"| {name} | {item['status']} |" + " |" * 10
            continue
        used = None if peak is None else item["unet_tflop"] / item["seconds"] / peak
        cells = [
            name,
            item["images"],
            item["micro_batch"],
            item["steps"],
            f"{item['guidance_scale']:g}",
            _number(item["seconds"]),
            _number(item["images_per_second"], 3),
            _number(item["updates_per_second"], 3),
            f"{item['passes']['forward']}, {item['passes']['backward']}",
            _percent(item["unet_fraction"]),
            _percent(used),
            _number(_gib(item), 1),
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def _rollout(items: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Its target, and what compiling gains."""
    eager = items.get("rollout", {})
    if eager.get("status") == "measured":
        held = "reached" if eager["unet_fraction"] >= 0.9 else "not reached"
        yield from (
            "",
            f"A rollout's share of time inside the U-Net: {_percent(eager['unet_fraction'])}, target ≥ 90 %: "
            f"{held}.",
        )
    for name, item in items.items():
        before = items.get(name.removesuffix(", compiled"), {})
        if name.endswith(", compiled") and item["status"] == before.get("status") == "measured":
            yield from ("", f"{name}: {item['seconds'] / before['seconds']:.2f} of its time without.")


def _memory(items: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One row a K."""
    yield from (
        "",
        "Memory of DRaFT-K, one image: peak in GiB (seconds).",
        "",
        "| K | kept | recomputed |",
        "|---|---|---|",
    )
    for k in dict.fromkeys(name.partition(",")[0] for name in items):
        both = [items.get(f"{k},checkpointing={kept}") for kept in ("false", "true")]
        yield f"| {k.removeprefix('k=')} | " + " | ".join(_footprint(item) for item in both) + " |"


def _footprint(item: dict[str, Any] | None) -> str:
    if item is None or item["status"] != "measured":
        return item["status"] if item else "not measured yet"
    return f"{_number(_gib(item), 1)} ({_number(item['seconds'])})"


def _gib(item: dict[str, Any]) -> float | None:
    return None if item["peak_memory_mb"] is None else item["peak_memory_mb"] / 1024


def _number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"
