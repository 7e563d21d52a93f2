"""The page stands alone, shows what it is given as text, and answers in a real browser."""

import csv
import re
from itertools import pairwise
from pathlib import Path

import pytest

from alignlab import report as report_command
from alignlab.compare import charts as figures
from alignlab.compare.finished import Variant, read_runs, variants
from alignlab.compare.outcomes import contrasts, outcomes
from alignlab.report import report
from tests.browser import NASTY, browser, in_browser
from tests.running import command_line
from tests.runs_on_disk import made_run


@pytest.fixture
def page(tmp_path) -> Path:
    """Three variants, one of them hacked, with a prompt and an option that would be code if they were not
    text."""
    words = {"prompts.prompts": ["cat", NASTY]}
    for seed in (0, 1):
        made_run(tmp_path / "runs" / f"draft-{seed}", words, seed=seed, held_out_falls=True)
        made_run(tmp_path / "runs" / f"plus-{seed}", words | {"kl_coeff": 0.1}, seed=seed, gain=0.6)
        made_run(tmp_path / "runs" / f"odd-{seed}", words | {"algo.truncation": NASTY}, seed=seed, gain=0.8)
    return report(read_runs([str(tmp_path / "runs" / "*")]), tmp_path / "out", f"A title with {NASTY}")


def test_it_stands_alone(page):
    """No address is loaded, no file beside it; prompts, labels and titles are text; the tables hold every
    variant and run."""
    text = page.read_text()
    own = text[text.rindex("</style>") :].partition("</script>")[2]  # after plotly's own code
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", own)
    assert NASTY not in text and "&lt;script&gt;window.broken" in text
    rows = list(csv.DictReader((page.parent / "variants.csv").open()))
    assert [row["label"] for row in rows] == [
        "DRaFT",
        f"DRaFT truncation={NASTY}",
        "DRaFT+ kl_coeff=0.1",
    ] and float(rows[0]["gain.value"]) > 0.9
    runs = list(csv.DictReader((page.parent / "runs.csv").open()))
    assert len(runs) == 6
    assert all(row["diversity metric"] == "lpips-emoji" for row in (*rows, *runs))


@browser
def test_it_answers_in_a_browser(page, tmp_path):
    """The figures are drawn; a click on the legend hides a variant in both panels; the menu changes the x
    axis; hover shows a value; the slider moves through training; nothing of a prompt or label ran."""
    seen = in_browser(
        page,
        """
        const out = { broken: window.broken ?? 0, plots: document.querySelectorAll(".main-svg").length };
        const plot = document.getElementById("learning");
        const shown = () => plot._fullData.filter(t => t.mode.includes("lines") && t.visible === true).length;
        out.before = shown();
        const item = plot.querySelector(".legendtoggle");
        const box = item.getBoundingClientRect();
        const at = {bubbles: true, clientX: box.x + 3, clientY: box.y + 3};
        for (const kind of ["mousedown", "mouseup", "click"]) item.dispatchEvent(new MouseEvent(kind, at));
        await new Promise(r => setTimeout(r, 1500));
        out.after = shown();
        const menu = plot.layout.updatemenus[0].buttons;
        out.budgets = menu.map(b => b.label);
        await Plotly.update(plot, ...menu[1].args);
        out.axis = plot.layout.xaxis.title.text;
        out.images = plot._fullData[1].x.at(-1);
        Plotly.Fx.hover(plot, [{ curveNumber: 5, pointNumber: 2 }], "xy");
        await new Promise(r => setTimeout(r, 300));
        out.hover = plot.querySelectorAll(".hoverlayer text").length;
        const slider = document.getElementById("when");
        const epochs = () => [...document.querySelectorAll(".strip .epoch")].map(e => e.textContent);
        out.last = epochs();
        slider.value = 0; slider.dispatchEvent(new Event("input"));
        out.first = epochs();
        const pictures = [...document.querySelectorAll(".strip img")];
        out.visible = pictures.filter(i => i.clientHeight > 0).map(i => i.naturalWidth);
        out.now = document.getElementById("now").textContent;
        out.flags = document.querySelectorAll("ul.flags li").length;
        document.title = JSON.stringify(out);
        """,
        tmp_path,
    )
    assert seen["broken"] == 0 and seen["plots"] >= 4
    assert seen["before"] == 6 and seen["after"] == 4  # both panels
    assert seen["budgets"][:2] == ["epochs", "images"] and seen["axis"] == "images" and seen["images"] == 320
    assert seen["hover"] > 0
    assert seen["last"] == ["20"] * 3 and seen["first"] == ["0"] * 3 and seen["now"] == "base model"
    assert seen["visible"] == [64] * 3 and seen["flags"] == 2


def test_the_command(tmp_path, monkeypatch, capsys):
    """Patterns and lists; mistakes are sentences and exit code 2."""

    made_run(tmp_path / "a", seed=0)
    made_run(tmp_path / "b", {"eval_sampler.steps": 5}, seed=1)
    assert (
        command_line(
            monkeypatch,
            f"runs={tmp_path}/a",
            f"output_dir={tmp_path}/out",
            "title=Mine",
            command=report_command,
        )
        == 0
    )
    assert "<h1>Mine</h1>" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    for words, sentence in (
        ([f"runs=[{tmp_path}/a,{tmp_path}/b]"], "eval_sampler.steps is 20 in the first and 5 in the second"),
        ([f"runs={tmp_path}/none*"], "holds no run"),
        ([], "runs has no value"),
        ([f"runs={tmp_path}/a", "titel=x"], "did you mean title"),
    ):
        assert command_line(monkeypatch, *words, command=report_command) == 2
        err = capsys.readouterr().err
        assert sentence in err and "Traceback" not in err


def test_a_hundred_runs_are_quick(tmp_path):
    """The page of 100 runs in 20 variants is made in seconds."""
    import time

    for k in range(100):
        made_run(tmp_path / "runs" / str(k), {"lr": 1e-4 * (1 + k // 5)}, seed=k % 5)
    began = time.perf_counter()
    report(read_runs([str(tmp_path / "runs" / "*")]), tmp_path / "out", "hundred")
    assert time.perf_counter() - began < 60


def test_the_parts_of_a_combined_reward(tmp_path):
    """Trained on together, each reward has its own gain in its own unit, in the outcome, the figure and the
    page."""
    parts = {name: {"_target_": "x", "weight": 1.0, "normalize": False} for name in ("bright", "held")}
    for seed in (0, 1):
        made_run(tmp_path / f"run-{seed}", {"reward": parts, "eval_rewards": {}}, seed=seed)
    those = variants(read_runs([str(tmp_path / "run-*")]))
    (outcome,) = outcomes(those)
    assert list(outcome.trained) == ["bright", "held"] and not outcome.held_out
    assert (
        outcome.trained["bright"].value == pytest.approx(0.5, abs=0.05) and outcome.trained["held"].value == 0
    )
    assert [trace.name for trace in figures.z_scores(those).data] == [
        "training reward",
        "bright (trained)",
        "held (trained)",
    ]
    page = report(read_runs([str(tmp_path / "run-*")]), tmp_path / "out", "Parts").read_text()
    assert "gain of each reward trained on" in page and "held<br>(points)" in page
    made_run(tmp_path / "one")
    assert not outcomes(variants(read_runs([str(tmp_path / "one")])))[0].trained


def many(folder: Path, n: int, letters: int, **options: bool) -> list[Variant]:
    """Variants whose labels have so many letters, and differ in the last ones only."""
    for k in range(n):
        words = {"algo.truncation": "x" * letters + str(k)}
        made_run(folder / f"run-{k:03}", words, gain=0.5 + k / n, held_out_falls=k % 9 == 0, **options)
    return variants(read_runs([str(folder / "run-*")]))


def test_a_report_of_61_variants_with_labels_of_500_letters(tmp_path: Path) -> None:
    """It is drawn: every variant has its line in the tables and a panel, panels do not overlap, and names are
    short enough to read."""
    those = many(tmp_path, 61, 500, evaluated=False)
    assert len(those) == 61 and all(len(v.short) > 500 for v in those)
    page = report(read_runs([str(tmp_path / "run-*")]), tmp_path / "out", "T" * 500).read_text()
    assert all(page.count(v.label) >= 2 for v in those)
    drawn = figures.z_scores(those)
    axes = [getattr(drawn.layout, name) for name in drawn.layout if str(name).startswith("yaxis")]
    heights = sorted({axis.domain for axis in axes})
    assert len(axes) == 3 * 21 and len(heights) == 21 and len(drawn.layout.annotations) == 61
    inside = drawn.layout.height - drawn.layout.margin.t - drawn.layout.margin.b
    assert all((top - low) * inside > 100 for low, top in heights)  # pixels of a panel
    assert all(
        (low - top) * inside > 60 for (_, top), (low, _) in pairwise(heights)
    )  # of a title and an axis
    named = figures.names(those)
    assert len({*named.values()}) == 61 and all(len(name) < 100 for name in named.values())
    for figure in (figures.learning(those, "u", "d"), figures.trade_off(those, "u", "d")):
        assert not any(trace.showlegend for trace in figure.data) and figure.layout.height == 430
        beside = [
            (trace.hovertemplate or "").partition("<extra>")[2].removesuffix("</extra>")
            for trace in figure.data
        ]
        assert all(len(line) <= 64 for text in beside for line in text.split("<br>")) and any(
            len(text) > 300 for text in beside
        )


def test_a_report_of_300_variants(tmp_path: Path) -> None:
    """The pairs that are compared, the pictures and the panels do not grow with the square of the
    variants."""
    those = many(tmp_path, 300, 0)
    pairs = contrasts(those)
    assert {what: len(rows) for what, rows in pairs.items()} == {"reward": 299, "diversity": 299}
    best = max(those, key=lambda v: v.runs[0].summary.final.reward).label
    assert {row.first for row in pairs["reward"]} == {best}
    assert sum(len(strip["images"]) for strip in report_command.strips(those)) == 600
    drawn = figures.z_scores(those)
    assert sum(str(name).startswith("yaxis") for name in drawn.layout) == figures.PANELS
    flagged = {figures.in_lines(figures.names(those)[v.label], 36) for v in those if v.runs[0].flags}
    assert len(flagged) == 34 and flagged <= {title.text for title in drawn.layout.annotations}


def test_a_long_legend_makes_a_figure_higher(tmp_path: Path) -> None:
    """A few variants keep the height that they had; a legend that needs more room does not press the axes
    together."""
    few, more = many(tmp_path / "few", 3, 0), many(tmp_path / "more", 14, 80)
    assert (
        figures.trade_off(few, "u", "d").layout.height
        == 430
        < figures.trade_off(more, "u", "d").layout.height
    )
    assert len(contrasts(few)["reward"]) == 3 and len(contrasts(more)["reward"]) == 14 * 13 / 2
