"""The measurements as a page: every number on it is computed from the rounds."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.ratios import Ratio, exponent, median, ratio

BUSY = 0.2
"""Cores that other processes used during a round, from which on it counts as measured on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio and its target."""

    item: str
    what: str
    cpu: str
    """The quantity in CPU seconds (or another, such as megabytes)."""
    wall: str | None
    """The same by the wall."""
    side: str
    other: str
    target: float | None


PEER = tuple(
    Row(
        item=f"peer/{name}, {threads}",
        what=f"{what}, {threads}",
        cpu=cpu,
        wall=f"{cpu}_wall",
        side=side,
        other="TRL",
        target=target,
    )
    for threads in ("1 thread", "2 threads")
    for name, what, cpu, side, target in (
        ("ddpo", "DDPO, rollout", "rollout", "alignlab", 0.75),
        ("ddpo", "— its bare passes", "rollout", "bare", None),
        ("ddpo", "— the same bare passes a second time: the noise", "rollout", "bare, its micro-batch", None),
        ("ddpo", "DDPO, training, TRL's micro-batch (4)", "train", "alignlab, its micro-batch", 0.85),
        ("ddpo", "— its bare passes", "train", "bare, its micro-batch", None),
        ("ddpo", "DDPO, training, our micro-batch (16)", "train", "alignlab", 0.6),
        ("ddpo", "— its bare passes", "train", "bare", None),
        ("draft1", "DRaFT-1, both checkpoint", "both", "alignlab, checkpointing", 0.6),
        ("draft1", "DRaFT-1, our default", "both", "alignlab", 0.6),
        ("draft1", "— its bare passes, without decoder", "both", "bare", None),
        ("draftN", "DRaFT-N, both checkpoint", "both", "alignlab, checkpointing", 0.8),
        ("draftN", "DRaFT-N, our default", "both", "alignlab", 0.8),
        ("draftN", "— its bare passes, without decoder", "both", "bare", None),
    )
) + tuple(
    Row(
        item=f"peer/{name}, 1 thread",
        what=f"memory, {what}",
        cpu="growth_mb",
        wall=None,
        side=side,
        other="TRL",
        target=None if side.startswith("bare") else 0.6,
    )
    for name, what, side in (
        ("ddpo", "DDPO, TRL's micro-batch", "alignlab, its micro-batch"),
        ("ddpo", "— its bare passes", "bare, its micro-batch"),
        ("ddpo", "DDPO, our micro-batch", "alignlab"),
        ("ddpo", "— its bare passes", "bare"),
        ("draft1", "DRaFT-1, both checkpoint", "alignlab, checkpointing"),
        ("draft1", "DRaFT-1, our default", "alignlab"),
        ("draft1", "— its bare passes", "bare"),
        ("draftN", "DRaFT-N, both checkpoint", "alignlab, checkpointing"),
        ("draftN", "DRaFT-N, our default", "alignlab"),
        ("draftN", "— its bare passes", "bare"),
    )
)
LIMIT = tuple(
    Row(
        item=f"limit/{name}, {threads}",
        what=f"{what}, {threads}",
        cpu=f"cpu{part}",
        wall=f"wall{part.replace('cpu', 'wall')}",
        side="alignlab",
        other="bare",
        target=target,
    )
    for threads in ("1 thread", "2 threads")
    for name, what, part, target in (
        ("rollout", "rollout", "", 1.05),
        ("ddpo", "DDPO, training", "", 1.10),
        ("draft1", "DRaFT-1, decoder and reward apart", " - decoder_cpu", 1.10),
        ("draft1", "DRaFT-1, all", "", 1.10),
    )
)
AXES = {
    "images": "images (4 to 400)",
    "steps": "steps (2 to 200)",
    "prompts": "prompts of a file that is read and split (10,000 to 1,000,000)",
}


def page(results: Mapping[str, Any]) -> str:
    """Markdown of what bench.py keeps; prose is wrapped, tables and headings are not."""
    return "\n".join(_wrapped(line) for line in _lines(results)) + "\n"


def _wrapped(line: str) -> str:
    if line.startswith(("|", "#", "    ")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    items: dict[str, Sequence[Any]] = {
        name: item["rounds"] for name, item in results["items"].items() if item["rounds"]
    }
    busy = sum(its["others"] > BUSY for rounds in items.values() for its in rounds)
    count = sum(map(len, items.values()))
    yield from ("# Benchmarks", "", "    make bench", "")
    yield from (
        f"{_machines(results['items'])}.",
        "",
        "- A cell is a ratio of CPU seconds, the median of the rounds, with their range. The two sides "
        "alternate.",
        f"- *busy* counts the rounds during which other processes used more than {BUSY:g} cores; here "
        f"{busy} of {count}.",
        "- One thread is judged by CPU seconds. Two threads are judged by the wall's, because threads that "
        "wait for each other spin, which counts as CPU.",
        "- [docs/benchmarks.md](../docs/benchmarks.md) says what is measured, and what differs between the "
        "sides.",
    )
    yield from ("", "## Against TRL 0.23.1", "")
    if any(name.startswith("peer/") for name in items):
        yield from (
            f"Versions: {results.get('versions', 'unknown')}.",
            "",
            "*Bare passes* are our U-Net with its layers alone, run as often as the work needs, over the "
            "peer's time.",
            "",
        )
        yield from _table(PEER, items)
    else:
        yield "Not measured: the peer was not at hand."
    yield from _learning(items)
    yield from (
        "",
        "## Against the limit",
        "",
        "Over the bare passes through the U-Net (with the same LoRA), in a loop on ready tensors.",
        "",
    )
    yield from _table(LIMIT, items)
    yield from _parts(items)
    yield from ("", "## Growth", "")
    yield from _growth(items)
    yield from _beside(items.get("beside/draftp", ()))
    if {"ideas/ddpo", "ideas/learning"} & set(items):
        yield from ("", "## Ideas")
    if "ideas/ddpo" in items:
        yield from (
            "",
            "An epoch of DDPO with each, over one without it.",
            "",
            "| idea | CPU | wall | rounds (busy) |",
            "|---|---|---|---|",
        )
        rounds = items["ideas/ddpo"]
        for name in rounds[0]["sides"]:
            if name != "without":
                yield (
                    f"| {name} | {_range(ratio(rounds, 'cpu', name, 'without'))} | "
                    f"{_range(ratio(rounds, 'wall', name, 'without'))} | {_rounds(rounds)} |"
                )
    if "ideas/learning" in items:
        yield from (
            "",
            "Brightness that DDPO gains on 8 prompts that it trains on. Each prompt has 4 images, drawn by "
            "20 steps of DDIM. All rows take as many passes through the denoiser, up to an epoch more. A "
            "cell is the mean over seeds, with their range.",
            "",
            "| | epochs | gain | seeds |",
            "|---|---|---|---|",
        )
        rounds = items["ideas/learning"]
        for name in rounds[0]["sides"]:
            gains = [its["sides"][name]["gain"] for its in rounds]
            epochs = median(rounds, "epochs", name) or 0.0
            yield (
                f"| {name} | {epochs:.0f} | {sum(gains) / len(gains):+.3f} ({min(gains):+.3f} to "
                f"{max(gains):+.3f}) | {len(gains)} |"
            )


def _machines(items: Mapping[str, Any]) -> str:
    """Where the items were measured; one machine without their names."""
    where: dict[str, list[str]] = {}
    for name, item in items.items():
        where.setdefault(item["about"], []).append(name)
    (most, _), *others = sorted(where.items(), key=lambda kv: -len(kv[1]))
    return "; ".join((most, *(f"but {', '.join(names)}: {about}" for about, names in others)))


def _table(rows: Sequence[Row], items: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    yield from ("| | CPU | wall | target | reached | rounds (busy) |", "|---|---|---|---|---|---|")
    for row in rows:
        rounds = items.get(row.item, ())
        found = ratio(rounds, row.cpu, row.side, row.other)
        if found is None:
            yield f"| {row.what} | not measured | | {_target(row)} | | |"
            continue
        wall = ratio(rounds, row.wall, row.side, row.other) if row.wall else None
        judged = wall if wall and row.item.endswith("2 threads") else found
        yield (
            f"| {row.what} | {_range(found)} | {_range(wall)} | {_target(row)} | "
            f"{_reached(judged.median, row.target)} | {_rounds(rounds)} |"
        )


def _learning(items: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    found = {name.partition("/")[2]: rounds for name, rounds in items.items() if name.startswith("learning/")}
    if not found:
        return
    yield from (
        "",
        "Brightness gained at equal settings. The gain is the mean reward of the last quarter of epochs less "
        "that of the base model, which is the mean of the first epochs of both sides. A cell is the mean "
        "over seeds, with each seed; the rates are for 100 CPU seconds of sampling and training.",
        "",
    )
    yield from (
        "| | seeds (busy) | alignlab | TRL | alignlab / 100 s | TRL / 100 s | ratio (of each seed) | target "
        "| reached |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for name, rounds in found.items():
        parts = {side: [its["sides"][side] for its in rounds] for side in ("alignlab", "TRL")}
        base = sum(part["first"] for its in parts.values() for part in its) / (2 * len(rounds))
        gains = {side: [part["late"] - base for part in its] for side, its in parts.items()}
        rates = {
            side: 100 * sum(gains[side]) / sum(part["cpu"] for part in its) for side, its in parts.items()
        }
        told = {
            side: f"{sum(its) / len(its):+.4f} ({', '.join(f'{gain:+.4f}' for gain in its)})"
            for side, its in gains.items()
        }
        # a peer that gains nothing has no ratio
        quotient = rates["alignlab"] / rates["TRL"] if rates["TRL"] > 0 else None
        each = ", ".join(_quotients(gains, parts))
        yield (
            f"| {name} | {_rounds(rounds)} | {told['alignlab']} | {told['TRL']} | {rates['alignlab']:+.4f} | "
            f"{rates['TRL']:+.4f} | "
            f"{'n/a' if quotient is None else f'{quotient:.2f}'} ({each}) | ≥ 2 | "
            f"{'n/a' if quotient is None else _yes(quotient >= 2)} |"
        )


def _quotients(
    gains: Mapping[str, Sequence[float]], parts: Mapping[str, Sequence[Mapping[str, float]]]
) -> Iterator[str]:
    """Of the gains per CPU second, seed by seed."""
    for ours, its, other, others in zip(
        gains["alignlab"], parts["alignlab"], gains["TRL"], parts["TRL"], strict=True
    ):
        yield f"{ours / its['cpu'] / (other / others['cpu']):.2f}" if other > 0 else "n/a"


PASSES = ("U-Net forward", "backward", "decoder", "reward")
"""Parts that the bare side has too."""


def _parts(items: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Where the time of our side goes, over the bare side's."""
    measured = [name for name in items if name.startswith("limit/") and name.endswith("1 thread")]
    if measured:
        yield from (
            "",
            "Where the time goes: the same passes within alignlab, over the bare ones, and what is beside "
            "them.",
            "",
            "| | passes | beside them |",
            "|---|---|---|",
        )
    for name in measured:
        rounds = items[name]
        bare = median(rounds, "cpu", "bare") or 1.0
        parts = {part: (median(rounds, part, "parts") or 0.0) / bare for part in rounds[-1]["sides"]["parts"]}
        own = sum(parts.pop(part, 0.0) for part in PASSES)
        beside = [
            f"{part} {100 * v:.1f} %" for part, v in sorted(parts.items(), key=lambda kv: -kv[1]) if v >= 5e-4
        ]
        yield f"| {name.removeprefix('limit/')} | {own:.2f} | {', '.join(beside)} |"


def _growth(items: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    yield from ("| | measured | target | reached | rounds (busy) |", "|---|---|---|---|---|")
    for axis, what in AXES.items():
        rounds = items.get(f"growth/{axis}")
        if rounds:
            sizes = [int(size) for size in rounds[0]["sides"]]
            cost = "read" if axis == "prompts" else "cpu"
            p = exponent(sizes, [median(rounds, cost, str(size)) or 0.0 for size in sizes])
            yield (
                f"| time over {what}: exponent | {p:.3f} | 1.00 ± 0.05 | {_yes(abs(p - 1) <= 0.05)} | "
                f"{_rounds(rounds)} |"
            )
    if rounds := items.get("growth/prompts"):
        cpu, wall, mb = (median(rounds, quantity, "10") or 0.0 for quantity in ("cpu", "wall", "mb"))
        yield (
            f"| 100,000 prompts: read, split, 64 drawn | {cpu:.2f} CPU s, {wall:.2f} s, {mb:.0f} MiB | < 1 "
            f"s, < 200 MB | {_yes(cpu < 1 and mb < 190)} | {_rounds(rounds)} |"
        )
    if rounds := items.get("growth/memory"):
        stacks = rounds[-1]["sides"]["stacks"]
        yield (
            f"| latents alive at the peak of training, in stacks of N+1 | {stacks['training']:.2f} | 1 | "
            f"{_yes(stacks['training'] < 1.05)} | {_rounds(rounds)} |"
        )
        for key, what in (
            ("sampling", "while sampling, an epoch in one micro-batch"),
            ("parts", "while sampling, an epoch in four"),
        ):
            yield (
                f"| the same, {what} | {stacks[key]:.2f} | 1 | {_yes(stacks[key] < 1.05)} | "
                f"{_rounds(rounds)} |"
            )
        flat = {side: numbers["mb"] for side, numbers in rounds[-1]["sides"].items() if side.startswith("K=")}
        worst = max(flat.values()) / flat["K=1"]
        said = ", ".join(f"{side}: {mb:.0f} MiB" for side, mb in flat.items())
        yield (
            f"| DRaFT-K with checkpointing, peak beyond the weights ({said}), over K=1 | {worst:.2f} | ≤ "
            f"1.15 | {_yes(worst <= 1.15)} | {_rounds(rounds)} |"
        )
    for name, side, what, most in (
        ("start", "alignlab", "import, configuration and its check, up to a mistake's refusal", 4),
        (
            "start",
            "with the models' libraries",
            "the same with diffusers, peft and transformers, without a mistake",
            4,
        ),
        ("report", "alignlab", "report of 100 runs", 30),
    ):
        if rounds := items.get(f"growth/{name}"):
            cpu, wall = (median(rounds, quantity, side) or 0.0 for quantity in ("cpu", "wall"))
            yield (
                f"| {what} | {cpu:.1f} CPU s, {wall:.1f} s | < {most} s | {_yes(max(cpu, wall) < most)} | "
                f"{_rounds(rounds)} |"
            )


def _beside(rounds: Sequence[Any]) -> Iterator[str]:
    """What is left of a run's speed beside other programs, with and without what alignlab/fast/spinning.py
    sets."""
    if not rounds:
        return
    yield from (
        "",
        "## Beside other programs",
        "",
        "Images a second of draftp on the embedded model, with one thread for each core, beside busy "
        "processes of one thread each. The fair share is that of its threads among all. *As shipped* is what "
        "alignlab sets (`alignlab/fast/spinning.py`), *spinning* is OpenMP's own default.",
        "",
        "| busy processes | fair share | as shipped, over alone | spinning, over alone as shipped | as "
        "shipped over spinning | rounds |",
        "|---|---|---|---|---|---|",
    )
    for load in sorted({int(numbers["load"]) for numbers in rounds[0]["sides"].values()}):
        ours, theirs = f"as shipped, {load}", f"spinning, {load}"
        cores = median(rounds, "cores", ours) or 1.0
        shares = [_range(ratio(rounds, "speed", side, "as shipped, 0")) for side in (ours, theirs)]
        gain = _range(ratio(rounds, "speed", ours, theirs))
        yield (
            f"| {load} | {cores / (cores + load):.2f} | {shares[0]} | {shares[1]} | {gain} | {len(rounds)} |"
        )


def _range(found: Ratio | None) -> str:
    return "" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _target(row: Row) -> str:
    return "" if row.target is None else f"≤ {row.target:g}"


def _reached(value: float, target: float | None) -> str:
    return "" if target is None else _yes(round(value, 2) <= target)


def _yes(held: bool) -> str:
    return "yes" if held else "**no**"


def _rounds(rounds: Sequence[Any]) -> str:
    return f"{len(rounds)} ({sum(its['others'] > BUSY for its in rounds)})"
