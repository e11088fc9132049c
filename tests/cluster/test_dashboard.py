"""The dashboard asks for what a run exports, and Grafana gets what it needs to import it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cluster.dashboard import PATH, dashboard, main
from cluster.telemetry import METRICS, metrics_table

LOADED: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
GRAPHS = [panel for panel in LOADED["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in GRAPHS for target in panel["targets"]]


def test_the_file_is_the_one_that_the_table_makes(tmp_path: Path) -> None:
    assert dashboard() == LOADED, "run: python -m cluster.dashboard"
    assert main([str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text(encoding="utf-8")) == LOADED


def test_every_metric_that_is_asked_for_is_exported_and_the_other_way_round() -> None:
    exported = {metric.exported for metric in METRICS}
    queries = [*EXPRESSIONS, LOADED["templating"]["list"][1]["query"]["query"]]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert asked - exported == set()
    assert exported - asked == set(), "what is worth recording is worth a look"


def test_labels_that_are_selected_or_grouped_by_are_those_of_the_metrics() -> None:
    known = {"run", "NodeAddress"} | {label for metric in METRICS for label in metric.labels}
    for expression in EXPRESSIONS:
        grouped = {name for by in re.findall(r"by \(([^)]*)\)", expression) for name in re.split(r",\s*", by)}
        selected = set(re.findall(r"[{,]\s*(\w+)=", expression))
        assert grouped | selected <= known, expression


def test_each_graph_is_of_the_chosen_runs_and_brackets_match() -> None:
    for expression in EXPRESSIONS:
        assert expression.count("ray_") == expression.count('run=~"$run"'), expression
        assert all(expression.count(a) == expression.count(b) for a, b in ("()", "{}", "[]")), expression


def test_counters_are_rated_and_gauges_are_not() -> None:
    for metric in METRICS:
        for expression in EXPRESSIONS:
            rated = re.search(rf"(rate|increase)\({metric.exported}\{{", expression)
            if re.search(rf"\b{metric.exported}\b", expression):
                assert (rated is not None) == (metric.kind == "counter"), expression


def test_grafana_gets_what_it_needs() -> None:
    assert LOADED["uid"] and LOADED["title"] and isinstance(LOADED["schemaVersion"], int)
    source, run = LOADED["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert run["type"] == "query" and run["datasource"]["uid"] == "${datasource}"
    assert "id" not in LOADED, "an import would take the place of another dashboard"
    numbers = [panel["id"] for panel in LOADED["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in GRAPHS for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in LOADED["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x + place["x"], y + place["y"]) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_document_lists_every_metric() -> None:
    text = (PATH.parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
    assert text.endswith("\n".join(metrics_table()) + "\n")
