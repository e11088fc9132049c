"""What the benchmarks count, on small records written by hand."""

from __future__ import annotations

import random
import socket
from collections import Counter
from typing import Any

import pytest

from benchmarks import driver_overhead, goodput


def line(step: int, time: float, tokens: float = 100.0) -> dict[str, Any]:
    return {"step": step, "time": time, "metrics": {"rollout/completion_tokens": tokens}}


def rows(num_steps: int) -> list[dict[str, Any]]:
    """The rollouts of so many whole steps, each prompt in its turn."""
    found = []
    for place in range(num_steps * goodput.PROMPTS):
        step, (epoch, row) = place // goodput.PROMPTS, divmod(place, goodput.NUM_ROWS)
        spans = [{"version": step, "start": 0, "end": 4}]
        uid = f"e{epoch}/p/{row}"
        found += [{"step": step, "uid": uid, "sample": k, "version_spans": spans} for k in range(goodput.SAMPLES)]
    return found


def test_only_steps_of_the_surviving_history_inside_the_window_count() -> None:
    lines = [line(1, 5.0), line(2, 10.0), line(3, 15.0), line(4, 20.0), line(5, 30.0)]
    assert goodput.surviving_tokens(lines, newest=5, window=(5.0, 20.0)) == 300.0
    assert goodput.surviving_tokens(lines, newest=3, window=(5.0, 20.0)) == 200.0
    assert goodput.surviving_tokens([], newest=0, window=(0.0, 1.0)) == 0.0


def test_a_whole_record_has_no_fault_and_every_kind_of_fault_is_found() -> None:
    num_steps = goodput.NUM_ROWS // goodput.PROMPTS + 1
    whole = rows(num_steps)
    assert goodput.faults_of_record(whole, num_steps) == []
    assert goodput.faults_of_record([*whole, whole[0]], num_steps) == ["('e0/p/0', 0) 2 times"]
    assert len(goodput.faults_of_record(whole[1:], num_steps)) == 2, "a rollout too few, and its prompt's epoch"
    stale = [{**whole[-1], "version_spans": [{"version": 0, "start": 0, "end": 4}]}]
    [fault] = goodput.faults_of_record([*whole[:-1], *stale], num_steps)
    assert "other weights" in fault


def test_victims_are_drawn_by_role_and_a_seed_draws_the_same_ones() -> None:
    living = {"driver": [1], "generation": [2, 3, 4, 5, 6], "engine": []}
    found = [[goodput.choose(living, draw) for _ in range(400)] for draw in (random.Random(3), random.Random(3))]
    assert found[0] == found[1]
    roles = Counter(role for role, _ in found[0])
    assert set(roles) == {"driver", "generation"} and min(roles.values()) > 120, (
        "a role with more processes is no likelier"
    )
    assert {pid for _, pid in found[0]} == {1, 2, 3, 4, 5, 6}


def test_recovery_is_counted_from_the_kill_to_what_the_run_said_and_did_next() -> None:
    kills = [goodput.Kill("generation", 10.0), goodput.Kill("driver", 20.0), goodput.Kill("learner", 40.0)]
    events = [{"kind": "replica_lost", "time": 11.5}, {"kind": "resumed", "time": 22.0}]
    found = goodput.recoveries(kills, events, [line(1, 9.0), line(2, 16.0), line(3, 27.0)])
    assert found == {"generation": ([1.5], [6.0]), "driver": ([0.0], [7.0]), "learner": ([], [])}


def test_traffic_counts_the_bytes_of_tcp_connections_and_keeps_those_of_closed_ones() -> None:
    traffic = driver_overhead.Traffic()
    before = traffic.totals()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as one, listener.accept()[0] as other:
            one.sendall(b"x" * 5000)
            left = 5000
            while left:
                left -= len(other.recv(left))
            sent, received = (now - then for now, then in zip(traffic.totals(), before, strict=True))
    assert received == pytest.approx(5000, abs=2) and sent == pytest.approx(5000, abs=2)
    after = traffic.totals()
    assert after[1] - before[1] >= received, "a connection that was closed still counts"
