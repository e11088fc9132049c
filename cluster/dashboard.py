"""The Grafana dashboard of a run, from a table of panels.

``python -m cluster.dashboard`` writes ``cluster/dashboards/rlhf.json``. A test sees to it that the file is up to date
and asks for no metric that a run does not export.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.files import write_text

PATH = Path(__file__).parent / "dashboards" / "rlhf.json"
UID = "rlhf-run"

_SCHEMA = 39
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 24
_RUN = 'run=~"$run"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph.

    Attributes:
        title: Its heading.
        queries: Expression and legend of each group of lines; ``RUN`` stands for the selection of the run.
        unit: Grafana's name of the unit.
        about: What to look for.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""


def _rate(counter: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter}{{RUN}}[2m]))"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Progress",
        (
            Panel("Stage", (("ray_rlhf_stage_done_ratio{RUN}", "{{run}} {{stage}}"),), "percentunit"),
            Panel(
                "Time between steps",
                (("ray_rlhf_step_seconds{RUN}", "{{run}} {{stage}}"),),
                "s",
                "All that comes between two steps counts: validation, checkpoint, restarts.",
            ),
            Panel(
                "Seconds of a step by phase",
                (
                    (
                        "sum by (stage, phase) (increase(ray_rlhf_phase_seconds_total{RUN}[10m]))"
                        " / on (stage) group_left () sum by (stage) (increase(ray_rlhf_steps_total{RUN}[10m]))",
                        "{{stage}}/{{phase}}",
                    ),
                ),
                "s",
                "Over the last ten minutes. Phases overlap, so they need not sum to a step.",
            ),
        ),
    ),
    (
        "Scores",
        (
            Panel(
                "Score",
                (
                    ("ray_rlhf_score_mean{RUN}", "{{run}} {{stage}}"),
                    ("ray_rlhf_validation_score{RUN}", "{{run}} {{stage}} validation"),
                ),
            ),
            Panel("Spread of scores", (("ray_rlhf_score_std{RUN}", "{{run}} {{stage}}"),)),
            Panel(
                "Missing scores and skipped updates",
                (
                    ("increase(ray_rlhf_missing_scores_total{RUN}[5m])", "missing {{stage}}"),
                    ("increase(ray_rlhf_skipped_updates_total{RUN}[5m])", "skipped {{stage}}"),
                ),
                about="Both stay at none in a run that is well.",
            ),
            Panel("Loss", (('ray_rlhf_training{RUN, scalar=~".*loss|.*nll"}', "{{stage}} {{scalar}}"),)),
            Panel("KL", (('ray_rlhf_training{RUN, scalar=~".*kl.*"}', "{{stage}} {{scalar}}"),)),
            Panel(
                "Completion length",
                (('ray_rlhf_training{RUN, scalar="rollout/completion_length"}', "{{stage}}"),),
                about="In tokens. A steady rise or fall is often the reward being gamed.",
            ),
        ),
    ),
    (
        "Roles",
        (
            Panel(
                "Replicas",
                (
                    ("sum by (role, state) (ray_rlhf_replicas{RUN}) > 0", "{{role}} {{state}}"),
                    ("sum by (role) (ray_rlhf_replicas_wanted{RUN}) > 0", "{{role}} wanted"),
                ),
            ),
            Panel("Items in flight", (("sum by (role) (ray_rlhf_items_in_flight{RUN})", "{{role}}"),)),
            Panel(
                "Tokens per second at work",
                (
                    (
                        f"{_rate('ray_rlhf_tokens_total', 'role')} / {_rate('ray_rlhf_busy_seconds_total', 'role')}",
                        "{{role}}",
                    ),
                ),
                about="Over the time in which a role is at work, all its replicas together.",
            ),
            Panel("Restarts", (("sum by (role) (increase(ray_rlhf_restarts_total{RUN}[10m]))", "{{role}}"),)),
            Panel("Events", (("sum by (kind) (increase(ray_rlhf_events_total{RUN}[10m]))", "{{kind}}"),)),
            Panel("Calls in flight", (("sum by (role) (ray_rlhf_calls_in_flight{RUN})", "{{role}}"),)),
        ),
    ),
    (
        "Engines",
        (
            Panel("Requests", (("sum by (role, state) (ray_rlhf_engine_requests{RUN})", "{{role}} {{state}}"),)),
            Panel(
                "KV cache in use",
                (("max by (role, NodeAddress) (ray_rlhf_engine_kv_cache_ratio{RUN})", "{{role}} on {{NodeAddress}}"),),
                "percentunit",
                "Full with requests waiting: more replicas, or more memory for the cache, would be faster.",
            ),
            Panel(
                "Weights",
                (
                    ("ray_rlhf_weight_version{RUN}", "{{role}} version"),
                    ("ray_rlhf_staleness_updates{RUN}", "staleness"),
                ),
                about="Staleness: updates between the oldest weights of a batch and the learner's.",
            ),
        ),
    ),
    (
        "Weights, checkpoints, memory",
        (
            Panel(
                "Seconds",
                (
                    ("ray_rlhf_publication_seconds{RUN}", "publication"),
                    ("ray_rlhf_checkpoint_seconds{RUN}", "checkpoint {{stage}}"),
                ),
                "s",
            ),
            Panel("Published", (("ray_rlhf_publication_bytes{RUN}", "{{run}}"),), "bytes"),
            Panel(
                "Memory",
                (
                    ("ray_rlhf_memory_bytes{RUN}", "driver's machine"),
                    ("ray_rlhf_object_store_bytes{RUN}", "object store"),
                    ("ray_rlhf_object_store_capacity_bytes{RUN}", "object store, capacity"),
                ),
                "bytes",
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, _COLUMNS, 1)}
        )
        y += 1
        per_line = _COLUMNS // _WIDTH
        for index, panel in enumerate(row):
            x, line = _WIDTH * (index % per_line), index // per_line
            panels.append(_graph(panel, _place(x, y + line * _HEIGHT, _WIDTH, _HEIGHT)))
        y += _HEIGHT * -(-len(row) // per_line)
    return {
        "uid": UID,
        "title": "RLHF run",
        "tags": ["rlhf"],
        "schemaVersion": _SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _graph(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expression.replace("RUN", _RUN),
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _run_variable() -> dict[str, Any]:
    query = "label_values(ray_rlhf_driver_up, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "runs"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def main(arguments: Sequence[str]) -> int:
    """Writes the file; a path as argument writes it there."""
    path = Path(arguments[0]) if arguments else PATH
    write_text(path, json.dumps(dashboard(), indent=2) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
