"""Charts of the report as HTML fragments; plotly's script is put into the page once, by the report."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evaluation.bootstrap import Interval
from rlhf.runs.report_style import AFTER, BEFORE, BEST, GRID, INK, QUIET
from rlhf.runs.summary import Summary

MAX_CURVES = 24
"""Curves per stage; the ones that matter most come first."""

_FIRST = (
    "score$",
    "reward",
    "validation",
    "kl",
    "entropy",
    "pair_accuracy",
    "loss",
    "length",
    "grad",
    "clip",
    "missing",
)


def fragment(figure: Any, height: int) -> str:
    """A figure as HTML without plotly's own script."""
    figure.update_layout(
        height=height,
        margin={"l": 48, "r": 16, "t": 36, "b": 36},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, Segoe UI, Roboto, sans-serif", "size": 12, "color": INK},
        hoverlabel={"bgcolor": "#ffffff"},
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, linecolor=GRID)
    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    rendered: str = figure.to_html(include_plotlyjs=False, full_html=False, config=config, default_height=f"{height}px")
    return rendered


def metric_order(names: Sequence[str]) -> list[str]:
    """Reward, KL, entropy and their kind first, then the rest by name; timings are left out."""

    def key(name: str) -> tuple[int, str]:
        found = (index for index, pattern in enumerate(_FIRST) if re.search(pattern, name))
        return next(found, len(_FIRST)), name

    return sorted((name for name in names if not re.search(r"(seconds|per_second|_s)$", name)), key=key)


def curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """One small chart per metric over the steps of a stage; a gap is a value that was not finite."""
    import plotly.graph_objects as go

    names = metric_order(sorted({name for line in lines for name in line["metrics"]}))
    charts = []
    for name in names[:MAX_CURVES]:
        points = [(line["step"], line["metrics"][name]) for line in lines if name in line["metrics"]]
        mode = "lines+markers" if len(points) <= 40 else "lines"
        trace = go.Scatter(
            x=[step for step, _ in points],
            y=[value for _, value in points],
            mode=mode,
            line={"color": AFTER, "width": 2},
            marker={"size": 5},
            hovertemplate="step %{x}<br>%{y:.5g}<extra></extra>",
        )
        figure = go.Figure(trace)
        figure.update_layout(title={"text": html.escape(name), "font": {"size": 13}, "x": 0.02}, showlegend=False)
        charts.append(fragment(figure, 220))
    return charts


def slices_chart(summary: Summary) -> str:
    """How often the request is followed, with intervals, for all prompts and by slice; empty without an evaluation."""
    import plotly.graph_objects as go

    result = summary.eval
    if result is None or "follows_request" not in result.after:
        return ""
    parts: list[tuple[str, Mapping[str, Mapping[str, Interval]]]] = [
        ("all", {"before": result.before, "after": result.after, "best of n": result.best_of_n})
    ]
    for name, part in result.slices.items():
        parts.append((name, {"before": part.before, "after": part.after, "best of n": part.best_of_n}))
    figure = go.Figure()
    for arm, colour in (("before", BEFORE), ("after", AFTER), ("best of n", BEST)):
        shown = [
            (html.escape(name), arms[arm]["follows_request"]) for name, arms in parts if "follows_request" in arms[arm]
        ]
        if shown:
            figure.add_bar(
                name=arm,
                x=[name for name, _ in shown],
                y=[interval.mean for _, interval in shown],
                marker={"color": colour},
                error_y={
                    "array": [interval.high - interval.mean for _, interval in shown],
                    "arrayminus": [interval.mean - interval.low for _, interval in shown],
                    "color": INK,
                    "thickness": 1.2,
                },
                hovertemplate="%{x}: %{y:.3f}<extra>" + arm + "</extra>",
            )
    figure.update_layout(
        title={"text": "Follows the request, by the independent scorer", "font": {"size": 13}, "x": 0.02},
        barmode="group",
        bargap=0.35,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
    )
    figure.update_yaxes(range=[0, 1.05])
    return fragment(figure, 320)


def timings_chart(timings: Mapping[str, Mapping[str, float]]) -> str:
    """Minutes by stage and phase; a stage's ``total`` is a bar only where it has no phases, and stands at its name."""
    import plotly.graph_objects as go

    shown = {stage: minutes_shown(phases) for stage, phases in timings.items()}
    phases = sorted({phase for minutes in shown.values() for phase in minutes})
    stages = list(timings)[::-1]
    labels = [html.escape(_with_total(stage, timings[stage])) for stage in stages]
    palette = ["#2563eb", "#60a5fa", "#0d9488", "#5eead4", "#d97706", "#fbbf24", "#7c3aed", "#c4b5fd", "#be185d", QUIET]
    figure = go.Figure()
    for index, phase in enumerate(phases):
        figure.add_bar(
            name=html.escape(phase),
            y=labels,
            x=[shown[stage].get(phase, 0.0) for stage in stages],
            orientation="h",
            marker={"color": palette[index % len(palette)]},
            hovertemplate="%{y}: %{x:.2f} min<extra>" + html.escape(phase) + "</extra>",
        )
    title = {"text": "Minutes by stage and phase", "font": {"size": 13}, "x": 0.02}
    figure.update_layout(barmode="stack", title=title, legend={"traceorder": "normal"})
    return fragment(figure, 120 + 36 * max(len(stages), 2))


def minutes_shown(phases: Mapping[str, float]) -> dict[str, float]:
    """Minutes of a stage's bar by phase; its total would count the phases again."""
    return {phase: seconds / 60 for phase, seconds in phases.items() if phase != "total" or len(phases) == 1}


def _with_total(stage: str, phases: Mapping[str, float]) -> str:
    return f"{stage}, {phases['total'] / 60:.1f} in all" if "total" in phases else stage
