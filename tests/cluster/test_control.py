"""Requests to a running driver through files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control import (
    SCALABLE,
    ScaleRequests,
    clear_requests,
    parse_scale,
    read_scale,
    request_scale,
    request_stop,
)
from rlhf.config import StrictModel
from rlhf.errors import ConfigError
from rlhf.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run with a driver at work."""
    with RunDirectory.open(tmp_path / "run", StrictModel()) as run:
        yield run.root


def test_counts_by_role() -> None:
    assert parse_scale(["generation=3", "judge=1", "generation=2"]) == {"generation": 2, "judge": 1}
    assert parse_scale([f"{role}=1024" for role in SCALABLE]) == dict.fromkeys(SCALABLE, 1024)


@pytest.mark.parametrize(
    "item",
    ["learner=2", "critic=1", "generation", "generation=", "generation=0", "generation=-1", "generation=1.5"]
    + ["generation=1025", "generation=²", "generation=two", "=3", "", "generation=1=2"],
)
def test_what_is_no_count_of_a_stateless_role_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="ROLE=N"):
        parse_scale([item])


def test_a_request_is_read_back_and_later_ones_add_to_it(run: Path) -> None:
    assert read_scale(run) == {}
    request_scale(run, {"generation": 3})
    request_scale(run, {"judge": 2})
    request_scale(run, {"generation": 1})
    assert read_scale(run) == {"generation": 1, "judge": 2}
    assert [path.name for path in (run / "control").iterdir()] == ["scale.json"], "nothing half-written is left"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"learner": 2}', '{"generation": "many"}', "\udcff"])
def test_an_altered_file_is_a_configuration_error(run: Path, text: str) -> None:
    request_scale(run, {"generation": 1})
    (run / "control" / "scale.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
        read_scale(run)


def test_only_a_run_directory_takes_requests(tmp_path: Path) -> None:
    for request in (lambda: request_scale(tmp_path, {"judge": 1}), lambda: request_stop(tmp_path)):
        with pytest.raises(ConfigError, match="run directory"):
            request()
    assert list(tmp_path.iterdir()) == []


def test_replicas_are_asked_of_a_driver_at_work_only(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run", StrictModel()) as run:
        request_scale(run.root, {"judge": 2})
        assert RunDirectory(run.root).is_held(), "looking does not take the lock"
    with pytest.raises(ConfigError, match="no driver at work"):
        request_scale(run.root, {"judge": 3})
    assert read_scale(run.root) == {"judge": 2}


def test_a_driver_starts_without_the_requests_of_an_earlier_one(run: Path) -> None:
    assert not clear_requests(run)
    request_stop(run)
    assert (run / "control" / "stop").is_file()
    assert not clear_requests(run)
    assert not (run / "control" / "stop").exists()
    request_scale(run, {"generation": 3})
    assert clear_requests(run)
    assert read_scale(run) == {}


class Events(list):
    def __call__(self, kind: str, **fields: object) -> None:
        self.append((kind, fields))


def break_file(run: Path, text: str = "{") -> None:
    path = run / "control" / "scale.json"
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(1, 1))  # another time than before, however coarse the clock


def test_each_request_is_due_once_and_only_for_roles_that_run(run: Path) -> None:
    requests = ScaleRequests(run, Events())
    assert requests.due({"generation"}) == {}
    request_scale(run, {"generation": 3, "judge": 2})
    assert requests.due({"generation"}) == {"generation": 3}
    assert requests.due({"generation"}) == {}
    assert requests.replicas("judge", 1) == 2, "a fleet that starts later starts with what was asked for"
    assert requests.replicas("scorer", 1) == 1
    assert requests.due({"generation", "judge"}) == {"judge": 2}


def test_what_could_not_be_met_is_not_asked_of_later_fleets_until_it_is_asked_again(run: Path) -> None:
    events = Events()
    requests = ScaleRequests(run, events)
    request_scale(run, {"generation": 99})
    assert requests.due({"generation"}) == {"generation": 99}
    requests.refuse("generation", RuntimeError("no room"))
    assert requests.replicas("generation", 1) == 1
    assert events == [("scaling_failed", {"role": "generation", "error": "no room"})]
    request_scale(run, {"generation": 99})
    os.utime(run / "control" / "scale.json", ns=(2, 2))
    assert requests.due({"generation"}) == {"generation": 99}


def test_a_file_that_cannot_be_read_is_one_event_and_changes_nothing(run: Path) -> None:
    events = Events()
    requests = ScaleRequests(run, events)
    request_scale(run, {"generation": 3})
    assert requests.due({"generation"}) == {"generation": 3}
    break_file(run)
    for _ in range(3):
        assert requests.due({"generation"}) == {}
    assert requests.replicas("generation", 1) == 3
    [(kind, fields)] = events
    assert kind == "scaling_failed" and "scale.json" in fields["error"]
    break_file(run, '{"generation": 2}')
    os.utime(run / "control" / "scale.json", ns=(3, 3))
    assert requests.due({"generation"}) == {"generation": 2}
