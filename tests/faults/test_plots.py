"""Names and units of somebody else are text in a plot: plotly reads HTML and values in its texts, matplotlib
formulas."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt

from alignlab.compare.charts import escaped, learning, pareto, trade_off, z_scores
from alignlab.compare.finished import read_runs, variants
from alignlab.metrics.statistics import Interval
from alignlab.paper.drawing import STYLE
from alignlab.paper.registry import FIGURES
from alignlab.report import report
from tests.browser import browser, in_browser
from tests.runs_on_disk import made_run

LINK = '<a href="javascript:window.broken=1">x</a>%{x} &lt;b&gt; $^$'


def hostile(folder: Path) -> Path:
    """A run whose reward, option, metric, unit and distance are all called like that."""
    reward = {"_target_": "x", "weight": 2.0, "normalize": False}
    run = made_run(folder, {"reward": {LINK: reward}, "algo.k": LINK}, evaluated=False)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"reward_unit": LINK, "diversity_metric": LINK}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {f"eval/held {LINK}": k, f"eval/held {LINK}_std": 1.0} for k, line in enumerate(lines)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def texts(node: object) -> list[str]:
    """Every text of a figure."""
    if isinstance(node, dict):
        return [text for value in node.values() for text in texts(value)]
    if isinstance(node, list):
        return [text for value in node for text in texts(value)]
    return [node] if isinstance(node, str) else []


def test_no_text_of_a_plot_is_html(tmp_path: Path) -> None:
    """In legends, axes, titles and hovers, by which plotly would make a link, or put a number in place of
    %{x}."""
    those = variants(read_runs([str(hostile(tmp_path / "run"))]))
    point = {those[0].label: (Interval(value=1, low=0, high=2),) * 2}
    drawn = [
        learning(those, LINK, LINK),
        trade_off(those, LINK, LINK),
        pareto(those, point, (0, 0), (LINK, LINK)),
        z_scores(those),
    ]
    for figure in drawn:
        node = json.loads(figure.to_json())
        groups = {trace.pop("legendgroup", "") for trace in node["data"]}  # names, which are not shown
        assert groups
        shown = [
            text
            for text in texts([node["data"], {k: v for k, v in node["layout"].items() if k != "template"}])
        ]
        assert not [text for text in shown if "<a" in text or "x</a>%{x}" in text]
        assert [text for text in shown if "&lt;a" in text]
    assert escaped("a < b & c %{y}") == "a &lt; b &amp; c %&#123;y}"


@browser
def test_no_link_of_others_lives_in_the_page(tmp_path: Path) -> None:
    """In a real browser no plot has a link, and a legend shows what the reward is called."""
    page = report(read_runs([str(hostile(tmp_path / "run"))]), tmp_path / "out", LINK)
    seen = in_browser(
        page,
        """
        document.title = JSON.stringify({
            links: document.querySelectorAll(
                ".js-plotly-plot a:not(.modebar-btn), .js-plotly-plot a[href^=javascript]").length,
            text: [...document.querySelectorAll(".ytitle")].map(e => e.textContent).join(" "),
            plots: document.querySelectorAll(".main-svg").length });
        """,
        tmp_path,
    )
    assert (
        seen["links"] == 0
        and seen["plots"] >= 4
        and 'href="javascript' in seen["text"]
        and "%{x}" in seen["text"]
    )


def test_a_papers_figure_shows_names_as_they_are(tmp_path: Path) -> None:
    """A $ in a unit is no formula, which would end the command with a traceback; and no figure of ours has
    one."""
    matplotlib.use("Agg")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots()
        axes.set_xlabel(LINK)
        axes.plot([0, 1], [0, 1], label=LINK)
        axes.legend()
        figure.savefig(tmp_path / "x.svg")
        plt.close(figure)
    assert "<a href" not in (tmp_path / "x.svg").read_text().partition("<!--")[0]
    assert not [name for name, figure in FIGURES.items() if re.search(r"\$", figure.title)]
    with (
        plt.rc_context({**STYLE, "text.parse_math": True}),
        pytest.raises(ValueError, match=r"ParseException|Expected"),
    ):
        figure, axes = plt.subplots()
        axes.set_xlabel("$^$")
        figure.savefig(tmp_path / "y.svg")
    plt.close("all")
