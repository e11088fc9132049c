"""The lease by a clock of the test's own: who holds it, until when, and whose calls are refused."""

from __future__ import annotations

from cluster.keeper import Holding, LeaseBook

JUDGE = Holding(role="judge", index=0, group="judge-group", bundle=0, fingerprint="f")


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def book(clock: Clock, timeout_s: float = 10.0, wall_ns: int = 5) -> LeaseBook:
    return LeaseBook(timeout_s, clock=clock, wall_ns=lambda: wall_ns)


def test_a_driver_that_renews_keeps_its_lease_and_one_that_does_not_loses_it() -> None:
    clock = Clock()
    leases = book(clock)
    grant = leases.attach(10.0)
    assert grant is not None and (grant.holdings, grant.silent_s) == ({}, 0.0)
    for _ in range(5):
        clock.now += 9.0
        assert leases.renew(grant.epoch, {"a": JUDGE}) and not leases.expire()
    clock.now += 10.1
    assert leases.expire()
    assert not leases.renew(grant.epoch, {"a": JUDGE}), "what it held is being ended"
    assert leases.attach(10.0) is None


def test_the_next_driver_is_told_what_the_last_one_held_and_that_one_is_refused() -> None:
    clock = Clock()
    leases = book(clock)
    first = leases.attach(10.0)
    assert first is not None and leases.renew(first.epoch, {"a": JUDGE})
    clock.now += 7.0
    second = leases.attach(10.0)
    assert second is not None and second.epoch > first.epoch
    assert (second.holdings, second.silent_s) == ({"a": JUDGE}, 7.0)
    assert not leases.renew(first.epoch, {})
    clock.now += 9.0
    assert not leases.expire(), "the new driver's time began when it came"
    assert leases.renew(second.epoch, {"a": JUDGE})


def test_the_time_that_a_lease_lasts_is_the_last_drivers() -> None:
    clock = Clock()
    leases = book(clock, timeout_s=600.0)
    assert leases.attach(2.0) is not None
    assert leases.interval_s == 0.2
    clock.now += 2.1
    assert leases.expire()


def test_a_keeper_that_was_restarted_learns_of_its_driver_and_gives_no_epoch_twice() -> None:
    clock = Clock()
    grant = book(clock, wall_ns=1000).attach(10.0)
    assert grant is not None
    restarted = book(clock, wall_ns=2000)
    assert restarted.renew(grant.epoch, {"a": JUDGE})
    following = restarted.attach(10.0)
    assert following is not None and following.epoch > grant.epoch and following.holdings == {"a": JUDGE}
    fallen_back = book(clock, wall_ns=0)
    assert fallen_back.renew(following.epoch, {})
    last = fallen_back.attach(10.0)
    assert last is not None and last.epoch > following.epoch, "whatever the time of day is there"


def test_a_keeper_whom_no_driver_finds_ends_too() -> None:
    clock = Clock()
    restarted = book(clock, timeout_s=10.0)
    clock.now += 10.1
    assert restarted.expire()
