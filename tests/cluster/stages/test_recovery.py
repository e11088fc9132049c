"""What the loss of a gang costs, in events."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.gang import LearnerGang
from cluster.stages.recovery import GangLosses
from rlhf.errors import LearnerError, ReplicaLostError

LOST = ReplicaLostError("learner[1].probe", found="no answer to two probes", needed="one", action="None.")


class Rank:
    """A rank whose calls never end."""

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: SimpleNamespace(future=lambda: asyncio.Future()))


def gang_of(monkeypatch: pytest.MonkeyPatch, role: str) -> LearnerGang:
    monkeypatch.setattr("actors.gang.kill", lambda handle: None)
    return LearnerGang(role, [Rank(), Rank()], timeout_s=60.0)


def test_updates_behind_the_checkpoint_are_lost_with_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    losses = GangLosses("learner", lambda kind, **fields: events.append((kind, fields)))
    learner, critic = gang_of(monkeypatch, "learner"), gang_of(monkeypatch, "critic")
    losses.began(learner, critic)
    losses.resumed(0)
    assert events == [], "a first life is no recovery"
    for num_updates in (1, 2, 3):
        losses.trained(num_updates, 100.0 + num_updates)
    critic.give_up(LOST, critic.ranks[1])
    error = LearnerError("critic", found="x", needed="y", action="z")
    losses.lost(error, restarts_left=2)
    losses.began(gang_of(monkeypatch, "learner"))
    losses.resumed(1)
    losses.trained(2, 100.0)
    losses.resumed(1)  # not after a loss
    (lost, found), (restarted, cost) = events
    assert (lost, found["role"], found["restarts_left"], found["error"]) == ("gang_lost", "critic", 2, str(error))
    assert found["detect_s"] >= 0
    assert (restarted, cost["step"], cost["lost_steps"], cost["lost_tokens"]) == ("gang_restarted", 1, 2, 205)
    assert cost["recover_s"] >= found["detect_s"]


def test_time_to_detect_counts_from_the_last_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("actors.gang.time.monotonic", lambda: now)
    for saw, called, expected in [((), 100.0, 30.0), ((0, 1), 100.0, 20.0), ((0,), 100.0, 30.0)]:
        now = called
        gang = gang_of(monkeypatch, "learner")
        ranks = list(gang.ranks)
        now += 10
        for rank in saw:
            gang.saw(ranks[rank])
        now += 20
        gang.give_up(LOST, ranks[1])
        assert gang.detect_s == expected and gang.ranks == []
        gang.give_up(ReplicaLostError("a later one", found="x", needed="y", action="z"))
        assert gang.lost_to is LOST
