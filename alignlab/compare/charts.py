"""The figures of a report, in plotly: they answer to hover and to clicks on the legend, and need no
network."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from alignlab.compare.finished import BUDGETS, Variant
from alignlab.metrics.hacking import z_curves
from alignlab.metrics.pareto import pareto_front
from alignlab.metrics.statistics import Interval

COLOURS = (
    "#1f6f8b",
    "#d1495b",
    "#edae49",
    "#66a182",
    "#8d5a97",
    "#2e4057",
    "#e07a5f",
    "#7a9e2f",
    "#b07d62",
    "#4f9fd8",
)
GREY = "#8a8f98"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
NAME = 90
"""Letters of a variant's name in a drawing; of a longer one the beginning and the end are shown."""
LEGEND = 16
"""Variants that have an entry in the legends; where there are more, it would be larger than the drawing, and
the pointer tells them."""
PANELS = 90
"""Variants that have a panel of their own; where there are more, those with the most signs of hacking."""
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")


def colours(variants: Sequence[Variant]) -> dict[str, str]:
    """One for each variant, by its label."""
    return {v.label: COLOURS[k % len(COLOURS)] for k, v in enumerate(variants)}


def names(variants: Sequence[Variant]) -> dict[str, str]:
    """What each variant is called in a drawing, by its label: a long name is cut, and has the number of its
    line in the table."""
    out = {}
    for number, variant in enumerate(variants, 1):
        name = variant.short
        out[variant.label] = (
            name if len(name) <= NAME else f"{number}: {name[: NAME // 2]} … {name[-NAME // 3 :]}"
        )
    return out


def hovered(text: str) -> str:
    """A name beside the pointer, in lines."""
    return in_lines(text if len(text) <= 400 else f"{text[:300]} … {text[-80:]}", 64)


def learning(variants: Sequence[Variant], unit: str, diversity: str) -> go.Figure:
    """Reward and diversity over training, mean over seeds with its standard error; a menu chooses the budget
    on the x axis."""
    unit, diversity = escaped(unit), escaped(diversity)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.09, subplot_titles=("reward", "diversity"))
    palette, named, listed = colours(variants), names(variants), len(variants) <= LEGEND
    budgets = {
        name: key
        for name, key in BUDGETS.items()
        if all(key in run.evaluations[-1] for v in variants for run in v.runs)
    }
    by_budget: dict[str, list[Any]] = {name: [] for name in budgets}
    for variant in variants:
        colour = palette[variant.label]
        for column, key in enumerate(("eval/reward", "eval/lpips"), 1):
            y = variant.curves(key)
            mean, error = (
                y.mean(0),
                y.std(0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros(y.shape[1]),
            )
            shared = {"legendgroup": variant.label, "row": 1, "col": column}
            figure.add_scatter(
                x=[],
                y=[*(mean + error), *(mean - error)[::-1]],
                fill="toself",
                fillcolor=colour,
                opacity=0.18,
                mode="none",
                hoverinfo="skip",
                showlegend=False,
                **shared,
            )
            figure.add_scatter(
                x=[],
                y=mean,
                name=in_lines(named[variant.label], 44),
                mode="lines+markers",
                line={"color": colour, "width": 2.2},
                marker={"size": 5},
                showlegend=listed and column == 1,
                customdata=error,
                hovertemplate="%{y:.3f} ± %{customdata:.3f}<extra>" + hovered(variant.label) + "</extra>",
                **shared,
            )
            for name, budget in budgets.items():
                x = variant.curves(budget).mean(0)
                by_budget[name] += [[*x, *x[::-1]], list(x)]
    for trace, x in zip(figure.data, by_budget["epochs"], strict=True):
        trace.x = x
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"x": xs}, {"xaxis.title.text": name, "xaxis2.title.text": name}],
        }
        for name, xs in by_budget.items()
    ]
    figure.update_xaxes(title_text="epochs")
    figure.update_yaxes(title_text=unit, row=1, col=1)
    figure.update_yaxes(title_text=diversity, row=1, col=2)
    menu = {
        "buttons": buttons,
        "x": 1.0,
        "xanchor": "right",
        "y": 1.2,
        "yanchor": "bottom",
        "bgcolor": "white",
    }
    figure.update_layout(updatemenus=[menu])
    return styled(figure, 430, top=96, legend=_legend(list(named.values()), 2) if listed else 0)


def trade_off(variants: Sequence[Variant], unit: str, diversity: str) -> go.Figure:
    """Each seed's way from the base model through reward and diversity."""
    figure = go.Figure()
    palette, named, listed = colours(variants), names(variants), len(variants) <= LEGEND
    for variant in variants:
        for k, run in enumerate(variant.runs):
            figure.add_scatter(
                x=run.curve("eval/reward"),
                y=run.curve("eval/lpips"),
                name=in_lines(named[variant.label], 44),
                legendgroup=variant.label,
                showlegend=listed and k == 0,
                mode="lines+markers",
                line={"color": palette[variant.label], "width": 1.6},
                marker={"size": 5},
                opacity=0.85,
                text=[f"epoch {step:g}, seed {run.seed}" for step in run.curve("step")],
                hovertemplate="reward %{x:.3f}, diversity %{y:.3f}<br>%{text}<extra>"
                + hovered(variant.label)
                + "</extra>",
            )
    figure.update_xaxes(title_text=escaped(f"reward ({unit})"))
    figure.update_yaxes(title_text=escaped(diversity))
    return styled(figure, 430, legend=_legend(list(named.values()), 1) if listed else 0)


def pareto(
    variants: Sequence[Variant],
    points: dict[str, tuple[Interval, Interval]],
    base: tuple[float, float],
    axes: tuple[str, str],
) -> go.Figure:
    """Where each variant ended, with 95 % intervals, the base model, and the front that no variant beats."""
    figure = go.Figure()
    palette, named, listed = colours(variants), names(variants), len(variants) <= LEGEND
    spots = [(points[v.label][0].value, points[v.label][1].value) for v in variants]
    front = [spots[k] for k in pareto_front([*spots, base]) if k < len(spots)]
    figure.add_scatter(
        x=[p[0] for p in front],
        y=[p[1] for p in front],
        mode="lines",
        line={"color": GREY, "dash": "dot", "width": 1.5},
        name="Pareto front",
        hoverinfo="skip",
    )
    for variant in variants:
        x, y = points[variant.label]
        figure.add_scatter(
            x=[x.value],
            y=[y.value],
            name=in_lines(named[variant.label], 44),
            mode="markers",
            showlegend=listed,
            marker={"size": 12, "color": palette[variant.label], "line": {"color": "white", "width": 1}},
            error_x=_bars(x),
            error_y=_bars(y),
            hovertemplate=f"reward {x.value:.3f} [{x.low:.3f}, {x.high:.3f}]<br>"
            f"diversity {y.value:.3f} [{y.low:.3f}, {y.high:.3f}]"
            f"<extra>{hovered(variant.label)}</extra>",
        )
    figure.add_scatter(
        x=[base[0]],
        y=[base[1]],
        name="base model",
        mode="markers",
        marker={"size": 14, "symbol": "star", "color": GREY},
        hovertemplate="reward %{x:.3f}, diversity %{y:.3f}<extra>base model</extra>",
    )
    figure.update_xaxes(title_text=escaped(axes[0]))
    figure.update_yaxes(title_text=escaped(axes[1]))
    return styled(figure, 430, legend=_legend(list(named.values()), 1) if listed else 0)


def _bars(interval: Interval) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval.high - interval.value],
        "arrayminus": [interval.value - interval.low],
        "thickness": 1.4,
        "width": 4,
    }


def z_scores(variants: Sequence[Variant]) -> go.Figure:
    """The training reward, its parts if it has several, and all others over training, in standard deviations
    of the base model's images."""
    named, shown_first = (
        names(variants),
        sorted(range(len(variants)), key=lambda k: -sum(len(run.flags) for run in variants[k].runs)),
    )
    variants = [variants[k] for k in sorted(shown_first[:PANELS])]
    columns = min(3, len(variants))
    rows = -(-len(variants) // columns)
    titles = [in_lines(named[v.label], 36) for v in variants]
    more = max(title.count("<br>") for title in titles)
    height, top = 140 + (230 + 18 * more) * rows, 40 + 18 * more
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes="all",
        subplot_titles=titles,
        vertical_spacing=(70 + 18 * more)
        / (height - top - 56),  # room for a title and an axis, however many rows there are
    )
    for k, variant in enumerate(variants):
        curves = [z_curves(run.evaluations) for run in variant.runs]
        training = set(variant.runs[0].settings.rewards)
        hidden = training if len(training) == 1 else set()
        if not curves[0]:
            continue
        shown = [
            "reward",
            *(n for n in curves[0] if n != "reward" and not n.startswith("image/") and n not in hidden),
        ]
        for j, name in enumerate(shown):
            mean = np.mean([c[name] for c in curves if name in c], 0)
            label = (
                "training reward" if name == "reward" else f"{name} (trained)" if name in training else name
            )
            figure.add_scatter(
                x=variant.curves("step")[0],
                y=mean,
                name=escaped(label),
                legendgroup=label,
                showlegend=k == 0,
                mode="lines+markers",
                marker={"size": 4},
                line={
                    "color": "#222831" if j == 0 else COLOURS[(j - 1) % len(COLOURS)],
                    "dash": DASHES[0 if j == 0 else 1 + (j - 1) % 4],
                    "width": 2,
                },
                hovertemplate="epoch %{x:g}: %{y:+.2f} sd<extra>" + escaped(label) + "</extra>",
                row=1 + k // columns,
                col=1 + k % columns,
            )
    figure.update_yaxes(title_text="sd of the base model", col=1)
    figure.update_xaxes(title_text="epoch", row=rows)
    return styled(figure, height, top=top).update_yaxes(zeroline=True, zerolinecolor=GREY, zerolinewidth=1)


def _legend(entries: Sequence[str], columns: int) -> int:
    """The pixels by which a legend is higher than the room that every figure has below it."""
    lines = sum(in_lines(entry, 44).count("<br>") + 1 for entry in entries)
    return max(0, 19 * -(-lines // columns) - 80)


def styled(figure: go.Figure, height: int, top: int = 24, legend: int = 0) -> go.Figure:
    """The look of all figures; a legend that needs more room than usual makes the figure higher, and not its
    axes lower."""
    figure.update_layout(
        template="plotly_white",
        height=height + legend,
        font={"family": FONT, "size": 13, "color": "#222831"},
        margin={"l": 64, "r": 20, "t": top, "b": 56},
        legend={"orientation": "h", "y": -76 / (height - top - 56), "yanchor": "top", "x": 0},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="white",
    )
    figure.update_xaxes(
        gridcolor="#eceff3", zeroline=False, linecolor="#c9ced6", ticks="outside", tickcolor="#c9ced6"
    )
    figure.update_yaxes(
        gridcolor="#eceff3", zeroline=False, linecolor="#c9ced6", ticks="outside", tickcolor="#c9ced6"
    )
    return figure


def escaped(text: str) -> str:
    """Plotly reads a little HTML in its texts, and %{NAME} as a value: what is not ours (a label, the name or
    unit of a reward or a metric) is shown as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "%&#123;")


def in_lines(text: str, width: int) -> str:
    """As it is, in lines of at most so many letters."""
    return "<br>".join(map(escaped, wrap(text, width)))
