"""``report.html``: a run on one page that opens from the disk without any network.

Whatever the run has left so far is shown, so a report can be written while it is still going on. All text of models,
prompts and judges is escaped, and a content security policy forbids the page to load anything.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.bootstrap import Interval
from rlhf.evaluation.completions import EvalCompletion, from_wide
from rlhf.runs import report_charts as charts
from rlhf.runs.directory import RunDirectory
from rlhf.runs.events import read_events
from rlhf.runs.files import read_json, write_text
from rlhf.runs.metrics import read_metrics
from rlhf.runs.report_style import STYLE
from rlhf.runs.summary import DISPLAY, Summary, read_summary, total_seconds
from rlhf.runs.tables import read_table

SAMPLES_PER_SLICE = 4
"""Prompts of each slice whose completions are shown: the first ones in the order of their uids, not chosen ones."""
NUM_VERDICTS = 12
"""Verdicts shown, likewise the first ones."""
NUM_EVENTS = 40
"""Events shown, the latest ones."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def write_report(run_dir: Path) -> Path:
    """Writes ``RUN/report.html`` from what is in the run directory.

    Returns:
        Path of the file.

    Raises:
        ConfigError: This is not a run directory.
        RecordError: A record is broken.
    """
    from plotly.offline import get_plotlyjs

    run = RunDirectory(Path(run_dir))
    config = run.resolved_config()
    summary = read_summary(run.summary) if run.summary.is_file() else None
    name = summary.recipe if summary else str(config.get("name", run.root.resolve().name))
    sections = [
        _header(name, summary, config),
        _evaluation(summary),
        _samples(run),
        _curves(run),
        _feedback(run, summary),
        _work(run, summary),
        _events(run),
        _origin(run),
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(name)} - rlhf</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
    write_text(run.report, page)
    return run.report


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "<td class='n quiet'>-</td>"
    return f"<td class='n'>{interval.mean:.3f} <small>{interval.low:.3f} to {interval.high:.3f}</small></td>"


def _table(head: Sequence[str], rows: Iterable[str], numeric: bool = True) -> str:
    kind = " class='n'" if numeric else ""
    cells = "".join(f"<th{kind if index else ''}>{_text(name)}</th>" for index, name in enumerate(head))
    return f"<div class='card'><table><tr>{cells}</tr>{''.join(rows)}</table></div>"


def _header(name: str, summary: Summary | None, config: Mapping[str, Any]) -> str:
    model = _text(config.get("model", "unknown"))
    line = f"trained from {model}, seed {_text(config.get('seed', '?'))}, written {time.strftime('%Y-%m-%d %H:%M')}"
    if summary is None:
        return f"<h1>{_text(name)}</h1><p class='quiet'>{line}. The run is not finished.</p>"
    badges = "".join(
        f"<span class='badge {'met' if met else 'unmet'}'>{'✓' if met else '✗'} {_text(bar.replace('_', ' '))}</span>"
        for bar, met in summary.passed.items()
    )
    notes = "".join(f"<p class='quiet'>{_text(note)}</p>" for note in summary.notes)
    return f"<h1>{_text(name)}</h1><p class='quiet'>{line}</p>{_tiles(summary)}<div>{badges}</div>{notes}"


def _tiles(summary: Summary) -> str:
    tiles: list[tuple[str, str]] = []
    result = summary.eval
    if result is not None and "follows_request" in result.after and "follows_request" in result.before:
        before, after = result.before["follows_request"].mean, result.after["follows_request"].mean
        tiles.append((f"{before:.2f} → {after:.2f}", "follows the request"))
    if result is not None and result.win_rate is not None:
        tiles.append((f"{result.win_rate.mean:.2f}", "win rate against the start"))
    if result is not None and "kl_per_token" in result.after:
        tiles.append((f"{result.after['kl_per_token'].mean:.3f}", "KL per token, nats"))
    if summary.reward_model is not None and summary.reward_model.pair_accuracy is not None:
        tiles.append((f"{summary.reward_model.pair_accuracy.mean:.2f}", "reward model's pair accuracy"))
    tiles.append((f"{total_seconds(summary.timings) / 60:.0f} min", "in all stages"))
    tiles.append((f"{summary.peak_memory_gib:.1f} GiB", "peak memory"))
    cells = "".join(
        f"<div class='tile'><b>{_text(value)}</b><span>{_text(label)}</span></div>" for value, label in tiles
    )
    return f"<div class='tiles'>{cells}</div>"


def _evaluation(summary: Summary | None) -> str:
    result = summary.eval if summary else None
    if summary is None or result is None:
        return ""
    head = ["", "before", "after", "best of n", "change"]
    rows = []
    for metric, label in DISPLAY:
        sides = (result.before, result.after, result.best_of_n, result.delta)
        if any(metric in side for side in sides[:3]):
            rows.append(f"<tr><td>{_text(label)}</td>{''.join(_cell(side.get(metric)) for side in sides)}</tr>")
    by_slice = []
    for name, part in result.slices.items():
        worst = " <span class='badge tag'>worst</span>" if name == result.worst_slice else ""
        sides = (part.before, part.after, part.best_of_n, part.delta)
        cells = "".join(_cell(side.get("follows_request")) for side in sides)
        by_slice.append(f"<tr><td>{_text(name)}{worst}</td>{cells}{_cell(part.win_rate)}</tr>")
    missing = ", ".join(f"{_text(name)}: {count}" for name, count in result.missing.items())
    note = f"<p class='quiet'>Measures that could not be had: {missing}.</p>" if missing else ""
    slices = f"<h3>Follows the request, by slice</h3>{_table([*head, 'win rate'], by_slice)}" if by_slice else ""
    drawn = charts.slices_chart(summary)
    chart = f"<div class='card'>{drawn}</div>" if drawn else ""
    return (
        "<h2>Evaluation</h2>"
        f"<p class='quiet'>{result.num_prompts} held-out prompts; {result.told_confidence} intervals, "
        "prompts resampled.</p>"
        f"{chart}<h3>All prompts</h3>{_table(head, rows)}{slices}{note}"
    )


def _samples(run: RunDirectory) -> str:
    path = run.eval / "completions.parquet"
    if not path.is_file():
        return ""
    first = [row for row in from_wide(read_table(path)) if row.sample == 0 and row.arm in ("before", "after")]
    pairs: dict[str, dict[str, EvalCompletion]] = {}
    for row in first:
        pairs.setdefault(row.uid, {})[row.arm] = row
    shown: dict[str, int] = {}
    rows = []
    for uid in sorted(pairs):
        before, after = pairs[uid].get("before"), pairs[uid].get("after")
        if before is None or after is None or shown.get(before.request, 0) >= SAMPLES_PER_SLICE:
            continue
        shown[before.request] = shown.get(before.request, 0) + 1
        cells = "".join(
            f"<td class='text'>{_text(side.text)}<br><small>sentiment {_number(side.vader)}, judge "
            f"{_number(side.judge_margin)}, reward {_number(side.reward_model)}</small></td>"
            for side in (before, after)
        )
        request = f"<span class='badge tag'>{_text(before.request)}</span><br>" if before.request else ""
        rows.append(f"<tr><td>{request}{_text(before.prompt)}</td>{cells}</tr>")
    note = f"<p class='quiet'>The first {SAMPLES_PER_SLICE} prompts of each slice, first completion; not chosen.</p>"
    return f"<h2>Samples</h2>{note}{_table(['prompt', 'before', 'after'], rows, numeric=False)}"


def _curves(run: RunDirectory) -> str:
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in read_metrics(run.metrics):
        stages.setdefault(str(line["stage"]), []).append(line)
    parts = []
    for stage, lines in stages.items():
        cards = "".join(f"<div class='card'>{chart}</div>" for chart in charts.curves(lines))
        parts.append(f"<h2>Training: {_text(stage)}</h2><div class='charts'>{cards}</div>")
    return "".join(parts)


def _feedback(run: RunDirectory, summary: Summary | None) -> str:
    stages = [stage["name"] for stage in run.resolved_config().get("stages", []) if stage.get("kind") == "feedback"]
    files = [file for stage in stages for file in sorted(run.verdicts.glob(f"{stage}.*.parquet"))]
    lines = []
    if summary is not None and summary.feedback is not None:
        feedback = summary.feedback
        lines.append(f"{feedback.num_rankings} rankings from {_text(feedback.source)}")
        lines.append(f"{feedback.missing_fraction:.1%} of {feedback.num_verdicts} verdicts missing")
        if feedback.judge_agreement is not None:
            lines.append(f"judge's agreement with the independent scorer {feedback.judge_agreement}")
    if summary is not None and summary.reward_model is not None:
        lines.append(summary.reward_model.in_words())
        if summary.reward_model.judge_agreement is not None:
            lines.append(f"judge with the independent scorer on the same pairs {summary.reward_model.judge_agreement}")
    rows = []
    for verdict in read_table(files[0])[:NUM_VERDICTS] if files else []:
        texts = "<hr>".join(_text(text) for text in verdict["texts"])
        value = f"missing: {_text(verdict['error'])}" if verdict["value"] is None else f"{verdict['value']:.3f}"
        cells = f"<td>{_text(verdict['prompt'])}</td><td class='text'>{texts}</td>"
        rows.append(f"<tr>{cells}<td class='n'>{value}</td><td>{_text(verdict['reason'])}</td></tr>")
    if not lines and not rows:
        return ""
    table = _table(["prompt", "judged", "value", "reason"], rows, numeric=False) if rows else ""
    return f"<h2>Feedback</h2><p class='quiet'>{'; '.join(lines)}</p>{table}"


def _work(run: RunDirectory, summary: Summary | None) -> str:
    timings: dict[str, dict[str, float]] = summary.timings if summary else {}
    throughput: dict[str, float] = summary.throughput if summary else {}
    if summary is None and run.timings.is_file():
        from rlhf.runs.timings import Timings

        saved = Timings(run.timings)
        timings, throughput = saved.totals(), saved.throughput()
    if not timings:
        return ""
    rows = [f"<tr><td>{_text(role)}</td><td class='n'>{rate:,.0f}</td></tr>" for role, rate in throughput.items()]
    table = f"<h3>Tokens per second</h3>{_table(['role', 'tokens/s'], rows)}" if rows else ""
    return f"<h2>Time</h2><div class='card'>{charts.timings_chart(timings)}</div>{table}"


def _events(run: RunDirectory) -> str:
    events = read_events(run.events.path)[-NUM_EVENTS:]
    if not events:
        return ""
    rows = []
    for event in events:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
        details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "kind"))
        rows.append(
            f"<tr><td class='n'>{when}</td><td>{_text(event.get('kind'))}</td><td>{_text(details[:600])}</td></tr>"
        )
    table = _table(["time", "event", "details"], rows, numeric=False)
    return f"<h2>Events</h2><details><summary>The last {len(rows)}</summary>{table}</details>"


def _origin(run: RunDirectory) -> str:
    environment = read_json(run.environment) if run.environment.is_file() else {}
    versions = "".join(
        f"<tr><td>{_text(name)}</td><td class='n'>{_text(version)}</td></tr>"
        for name, version in environment.get("packages", {}).items()
    )
    revision = (environment.get("git") or {}).get("revision", "")
    git = f"<p class='quiet'>Revision {_text(revision)}</p>" if revision else ""
    config = _text(run.config.read_text(encoding="utf-8"))
    return (
        f"<h2>Origin</h2>{git}"
        f"<details><summary>Versions</summary>{_table(['package', 'version'], [versions])}</details>"
        f"<details><summary>Configuration</summary><div class='card'><pre>{config}</pre></div></details>"
    )
