"""Gangs: ranks act together and fail together."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from actors.gang import LearnerGang
from rlhf.errors import DataError, LearnerError, NonFiniteError, RolloutsLostError, WorkerError
from rlhf.runs.places import SaveStatus
from tests.actors.meeting_ranks import RankWorker
from tests.fakes import make_group

engine = pytest.mark.engine

GROUPS = [make_group(f"p{i}", 0, (length,)) for i, length in enumerate([50, 10, 40, 20])]


class MovingRank:
    """Writes down every call, as an actor handle does: ``rank.method.remote(...)``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failing = ""
        self.error: Exception = RayActorError()

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._call(method, *args))

    def _call(self, method: str, *args: Any) -> Any:
        self.log.append(" ".join([method, *(str(part) for arg in args for part in arg)]))
        answer: Future[None] = Future()
        if method == self.failing:
            answer.set_exception(self.error)
        else:
            answer.set_result(None)
        return SimpleNamespace(future=lambda: answer)


def test_weights_are_in_device_memory_for_an_export_and_go_back_to_where_they_were(monkeypatch) -> None:
    monkeypatch.setattr("actors.gang.kill", lambda handle: None)
    ranks = [MovingRank(), MovingRank()]
    gang = LearnerGang("learner", ranks, timeout_s=60.0)

    async def export() -> None:
        async with gang.exporting():
            await gang.call("put_bucket")

    async def body() -> None:
        await export()
        await gang.reside(())
        await export()
        await gang.reside({"weights"})
        await export()
        ranks[0].failing = "put_bucket"
        await gang.reside(())
        with pytest.raises(LearnerError):
            await export()
        with pytest.raises(LearnerError, match="a gang that was ended"):
            await gang.reside({"weights"})

    asyncio.run(asyncio.wait_for(body(), 60))
    around = ["reside weights", "put_bucket", "reside"]
    expected = ["put_bucket", "reside", *around, "reside weights", "put_bucket", "reside", *around[:2]]
    assert ranks[0].log == ranks[1].log == expected


def test_the_ranks_third_skip_in_a_row_is_what_the_driver_gets(monkeypatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr("actors.gang.kill", ended.append)
    skips = NonFiniteError("learner rank 0", found="NaN", needed="numbers", action="The weights are unchanged.")
    ranks = [MovingRank(), MovingRank()]
    for rank in ranks:
        rank.failing, rank.error = "update", RayTaskError("update", "a traceback", skips)
    gang = LearnerGang("learner", ranks, timeout_s=60.0)
    with pytest.raises(NonFiniteError) as caught:
        asyncio.run(gang.update(GROUPS))
    assert caught.value is skips
    assert ended == ranks and gang.ranks == []


@pytest.fixture
def make_gang(ray_cluster, tmp_path: Path):
    import ray

    made: list[LearnerGang] = []

    def make(num_ranks: int = 2, **faults: str) -> LearnerGang:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        remote = ray.remote(RankWorker).options(num_cpus=0.1)
        ranks = [remote.remote(r, num_ranks, folder, faults.get(f"rank{r}", "")) for r in range(num_ranks)]
        made.append(LearnerGang("learner", ranks, timeout_s=30.0))
        return made[-1]

    yield make
    for gang in made:
        gang.kill()


def pids_of(gang: LearnerGang) -> list[int]:
    return asyncio.run(gang.call("pid"))


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its gang"
        time.sleep(0.05)


@engine
def test_an_update_shares_groups_out_and_ranks_meet(make_gang, tmp_path: Path) -> None:
    async def body() -> None:
        gang = make_gang()
        measured: list[tuple[str, int]] = []
        gang = LearnerGang("learner", gang.ranks, meter=lambda r, tokens, _: measured.append((r, tokens)), num_epochs=3)
        await gang.start()
        metrics = await gang.update(GROUPS)
        assert measured == [("learner", 3 * sum(group.num_tokens for group in GROUPS))], "trained on once an epoch"
        assert metrics["uids"] == ["p0", "p1"]
        annotated = await gang.annotate(GROUPS)
        assert [g.uid for g in annotated] == ["p0", "p1", "p2", "p3"]
        assert [g.annotations["values"] for g in annotated] == [0, 0, 1, 1]
        folder = tmp_path / "saved"
        folder.mkdir()
        files = await gang.save(str(folder))
        assert sorted(files) == sorted(path.name for path in folder.iterdir()) == ["rank0", "rank1"]
        assert await gang.verify(str(folder), files) == ""
        (folder / "rank1").write_bytes(b"stale")
        assert await gang.verify(str(folder), files) == "rank1 with altered bytes"
        copy = tmp_path / "copied"
        await gang.begin_save(str(copy))
        states = [await gang.saved() for _ in range(3)]
        assert [state.files for state in states] == [None, None, files], "when the last rank is done"

    asyncio.run(asyncio.wait_for(body(), 60))


@engine
@pytest.mark.parametrize(("fault", "kind"), [("kill", LearnerError), ("defect", WorkerError)])
def test_one_failing_rank_ends_the_gang_though_its_peer_waits_for_it(make_gang, fault: str, kind) -> None:
    gang = make_gang(rank1=fault)
    pids = pids_of(gang)
    with pytest.raises(kind, match=r"learner\[1\]\.update") as caught:
        asyncio.run(gang.update(GROUPS))
    assert "no answer" not in str(caught.value), "nobody waited for the peer, which waits longer than the gang does"
    assert gang.ranks == []
    wait_until_gone(pids)
    for call in (gang.update(GROUPS), gang.annotate(GROUPS), gang.start()):
        with pytest.raises(LearnerError, match="a gang that was ended"):
            asyncio.run(call)
    asyncio.run(gang.stop())


@engine
def test_a_hung_rank_ends_the_gang(make_gang) -> None:
    gang = make_gang(rank0="hang")
    pids = pids_of(gang)  # the ranks have started
    gang = LearnerGang("learner", gang.ranks, timeout_s=2.0)
    with pytest.raises(LearnerError, match="no answer after 2 s"):  # the call itself would take far longer
        asyncio.run(gang.update(GROUPS))
    wait_until_gone(pids)


@engine
def test_a_rank_s_own_error_keeps_its_type_and_ends_the_gang(make_gang) -> None:
    gang = make_gang(rank0="data")
    pids = pids_of(gang)
    with pytest.raises(DataError, match="batch"):
        asyncio.run(gang.update(GROUPS))
    wait_until_gone(pids)


@engine
def test_groups_that_are_lost_leave_the_gang_alive(make_gang) -> None:
    """Ranks agree on what is lost before they meet anywhere else, so all of them raise the same error."""
    gang = make_gang(rank0="lost once", rank1="lost once")
    pids = pids_of(gang)
    with pytest.raises(RolloutsLostError) as caught:
        asyncio.run(gang.update(GROUPS))
    assert caught.value.uids == ("p3",)
    assert asyncio.run(gang.update(GROUPS))["uids"] == ["p0", "p1"]
    assert pids_of(gang) == pids


@engine
def test_a_rank_whose_disk_is_full_is_told_of_and_the_gang_lives(make_gang, tmp_path: Path) -> None:
    gang = make_gang(rank1="disk")

    async def body() -> SaveStatus:
        await gang.begin_save(str(tmp_path / "copied"))
        return await gang.saved()

    assert asyncio.run(asyncio.wait_for(body(), 60)) == SaveStatus(fault="No space left on device")
    assert len(pids_of(gang)) == 2


@engine
def test_stop_ends_ranks_that_fail_to(make_gang) -> None:
    gang = make_gang(rank0="stop")
    pids = pids_of(gang)
    asyncio.run(gang.stop())
    assert gang.ranks == []
    wait_until_gone(pids)
