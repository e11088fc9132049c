"""Requests to a running driver through files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.control import SCALABLE, clear_stop, parse_scale, read_scale, request_scale, request_stop
from rlhf.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: x\n")
    return tmp_path


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


def test_a_stop_is_asked_for_and_taken_back(run: Path) -> None:
    clear_stop(run)
    request_stop(run)
    assert (run / "control" / "stop").is_file()
    clear_stop(run)
    clear_stop(run)
    assert not (run / "control" / "stop").exists()
