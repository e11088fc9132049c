"""Budgets of restarts: what is long past, or behind a newer checkpoint, no longer counts."""

from __future__ import annotations

from actors.restarts import ProgressBudget, RestartBudget


class Clock:
    """Goes on by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_restarts_count_within_the_window_and_not_over_a_whole_life() -> None:
    clock = Clock()
    budget = RestartBudget(2, 100.0, clock=clock)
    assert [budget.take(), budget.take(), budget.take()] == [True, True, False]
    clock.now = 99.0
    assert not budget.take(), "the window is not over"
    clock.now = 100.0
    assert budget.num_taken == 0
    for _ in range(50):  # one loss in half a window, for as long as it likes
        clock.now += 51.0
        assert budget.take()
        assert budget.num_taken <= 2


def test_what_was_refused_does_not_count() -> None:
    clock = Clock()
    budget = RestartBudget(1, 10.0, clock=clock)
    assert budget.take()
    for clock.now in (3.0, 6.0, 9.0):
        assert not budget.take()
    clock.now = 10.0
    assert budget.take()


def test_a_large_fleet_has_as_many_restarts_for_each_of_its_replicas() -> None:
    budget = RestartBudget(3, 10.0, size=lambda: 8)
    assert [budget.take() for _ in range(25)] == [True] * 24 + [False]


def test_what_leavers_were_restarted_for_does_not_weigh_on_those_that_stay() -> None:
    size = 8
    budget = RestartBudget(3, 10.0, size=lambda: size)
    for _ in range(8):  # a node that held all of them
        assert budget.take()
    size = 1
    assert budget.left == 2, "one restart for each replica, of the three that each has"
    assert [budget.take(), budget.take(), budget.take()] == [True, True, False]
    size = 4
    assert budget.left == 12 - 4 - 2, "eight of eight are four of four; the two later ones count whole"
    size = 0
    assert budget.left == 0, "a fleet that is stopped has those of one replica"


def test_no_restart_may_be_wanted() -> None:
    assert not RestartBudget(0, 10.0, size=lambda: 64).take()
    assert not RestartBudget(0, 10.0).take()


def test_a_gang_that_came_to_a_newer_checkpoint_may_be_lost_as_often_again() -> None:
    step = 5
    budget = ProgressBudget(2, lambda: step)
    assert [budget.take(), budget.take(), budget.take()] == [True, True, False]
    step = 6
    assert budget.left == 2
    assert [budget.take(), budget.take(), budget.take()] == [True, True, False]
    step = 4  # it fell back to an older one
    assert budget.left == 0
