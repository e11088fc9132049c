"""Metrics, events, progress, timings, memory, redaction and the files below them."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import RecordError
from rlhf.runs.events import EventLog, read_events
from rlhf.runs.files import (
    append_json_line,
    keep_json_lines,
    read_json,
    read_json_lines,
    replacing_folder,
    unfinished_folder,
    write_json,
    write_text,
)
from rlhf.runs.follow import STEPS_KNOWN, FollowedProgress, NewLines
from rlhf.runs.memory import RUN_MARK, MemorySampler, pss_bytes, run_processes, total_gib
from rlhf.runs.metrics import MetricsLogger, read_metrics
from rlhf.runs.progress import Progress
from rlhf.runs.redact import HIDDEN, redact
from rlhf.runs.timings import Timings

# Files


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    unfinished_folder(path).mkdir(parents=True)
    (unfinished_folder(path) / "half").touch()  # left by a crash
    for text in ("old", "new"):
        with replacing_folder(path) as partial:
            assert partial == unfinished_folder(path) and list(partial.iterdir()) == []
            (partial / "adapter").mkdir()
            (partial / "adapter" / "weights").write_text(text)
            assert not path.exists() or (path / "adapter" / "weights").read_text() == "old"
        assert (path / "adapter" / "weights").read_text() == text
    with pytest.raises(RuntimeError), replacing_folder(path) as partial:
        (partial / "weights").touch()
        raise RuntimeError("the export failed")
    assert (path / "adapter" / "weights").read_text() == "new"
    assert os.listdir(path.parent) == ["model"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path, rename = tmp_path / "model", os.rename
    path.mkdir()
    (path / "weights").write_text("old")

    def refuse(source: Path, target: Path) -> None:
        if source == unfinished_folder(path):
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr("rlhf.runs.files.os.rename", refuse)
    with pytest.raises(RecordError, match="no space"), replacing_folder(path) as partial:
        (partial / "weights").write_text("new")
    assert (path / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_is_flushed_with_all_that_is_in_it_before_it_takes_its_place(tmp_path: Path, monkeypatch) -> None:
    path, flushed = tmp_path / "model", []

    def fsync_path(found: Path) -> None:
        flushed.append((found.name, path.exists()))

    monkeypatch.setattr("rlhf.runs.files.fsync_path", fsync_path)
    with replacing_folder(path) as partial:
        (partial / "adapter").mkdir()
        (partial / "adapter" / "weights").touch()
    before = {"adapter", "weights", unfinished_folder(path).name}
    assert {name for name, in_place in flushed if not in_place} == before
    assert flushed[-1] == (tmp_path.name, True)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RecordError, match="too large"):
            write_text(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n"a": }')
    with pytest.raises(RecordError, match="a.json:2"):
        read_json(tmp_path / "a.json")


def test_a_line_cut_by_a_crash_spoils_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_json_line(path, {"n": 1})
    with path.open("a") as stream:
        stream.write('{"n": 2, "half')
    append_json_line(path, {"n": 3})
    assert [line["n"] for line in read_json_lines(path)] == [1, 3]


# Metrics


def test_non_finite_numbers_become_null_and_are_counted(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    logger.log("rl", 1, {"loss": float("nan"), "reward": 0.5, "grad": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = json.loads(text)
    assert line["metrics"] == {"loss": None, "reward": 0.5, "grad": None}
    assert (line["stage"], line["step"], line["non_finite"]) == ("rl", 1, 2)


def test_resume_drops_later_lines_of_its_stage_only(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    for stage, step in [("sft", 1), ("sft", 2), ("rl", 1), ("rl", 2), ("rl", 3)]:
        logger.log(stage, step, {"x": float(step)})
    assert MetricsLogger(tmp_path / "metrics.jsonl").resume("rl", 1) == 2
    kept = [(line["stage"], line["step"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [("sft", 1), ("sft", 2), ("rl", 1)]
    assert len(read_metrics(tmp_path / "metrics.jsonl", "sft")) == 2


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    MetricsLogger(tmp_path / "m.jsonl").log("rl", 1, {"x": value})
    assert read_metrics(tmp_path / "m.jsonl")[0]["metrics"]["x"] == value


def test_tensorboard_has_the_same_scalars_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in [(1, 1.0), (2, 5.0)]:
        logger = MetricsLogger(tmp_path / "m.jsonl", tensorboard=tmp_path / "tb")
        logger.resume("rl", first - 1)
        for step in range(first, 4):
            logger.log("rl", step, {"reward": value})
        logger.close()
        logger.close()
    accumulator = EventAccumulator(str(tmp_path / "tb" / "rl"))
    accumulator.Reload()
    assert {e.step: e.value for e in accumulator.Scalars("reward")} == {1: 1.0, 2: 5.0, 3: 5.0}


# Events


def test_events_are_plain_redacted_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.record("replica_restarted", role="generation", error=ValueError("x"), rate=float("nan"), at=(1, 2))
    log.record("endpoint", url="https://user:hunter2@host/v1", headers={"authorization": "Bearer abcdefghijkl"})
    first, second = read_events(log.path)
    assert first["kind"] == "replica_restarted" and first["error"] == "x" and first["rate"] == "nan"
    assert first["at"] == [1, 2] and first["time"] > 0
    assert second["url"] == f"https://user:{HIDDEN}@host/v1"
    assert second["headers"] == {"authorization": HIDDEN}


# Redaction


@pytest.mark.parametrize("key", ["api_key", "openai_api_key", "password", "hf_token", "token", "client_secret"])
def test_secret_keys_are_hidden(key: str) -> None:
    assert redact({"judge": [{key: "plain"}]}) == {"judge": [{key: HIDDEN}]}


@pytest.mark.parametrize("key", ["max_tokens", "pad_token", "api_key_env", "tokenizer", "num_tokens", "secretary"])
def test_other_keys_are_not(key: str) -> None:
    assert redact({key: "value"}) == {key: "value"}


def test_secret_values_are_hidden_wherever_they_are() -> None:
    text = "calling with sk-aaaaaaaaaaaaaaaaaaaaaaaa and hf_aaaaaaaaaaaaaaaaaaaaaaaa"
    assert redact({"note": text})["note"] == f"calling with {HIDDEN} and {HIDDEN}"
    assert redact(["run", "roles.judge.api_key=abc123", "seed=3", "http://h/?api_key=q&x=1"]) == [
        "run",
        f"roles.judge.api_key={HIDDEN}",
        "seed=3",
        f"http://h/?api_key={HIDDEN}&x=1",
    ]
    assert redact({"steps": 3, "rate": 1e-5, "none": None}) == {"steps": 3, "rate": 1e-5, "none": None}


# Progress


def test_plain_lines_are_few_and_say_how_long(tmp_path: Path) -> None:
    stream, now = io.StringIO(), [0.0]
    with Progress("rl", 100, done=10, stream=stream, interval_s=30.0, clock=lambda: now[0]) as bar:
        for step in range(90):
            now[0] += 1.0
            bar.advance(1, reward=step / 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rl: 11/100, 0:01 passed, 1:29 left, reward=0"
    assert lines[-1] == "rl: 100/100, 1:30 passed, 0:00 left, reward=0.89"
    assert len(lines) == 4


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("sft", 2, stream=stream) as bar:
        bar.advance(2, loss=1.5)
    assert "sft" in stream.getvalue()


def test_each_new_line_is_read_once_and_a_replaced_file_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"n": 0})
    lines = NewLines(path)
    assert lines.read() == [], "what was there before"
    append_json_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2')
        file.flush()
        assert lines.read() == [{"n": 1}]
        file.write(b"}\n")
    assert lines.read() == [{"n": 2}] and lines.read() == []
    assert keep_json_lines(path, lambda line: line["n"] != 1) == 1
    assert lines.read() == [{"n": 0}, {"n": 2}]
    later = NewLines(tmp_path / "later.jsonl")
    assert later.read() == []
    append_json_line(tmp_path / "later.jsonl", {"n": 3})
    assert later.read() == [{"n": 3}]


def test_progress_of_another_process_follows_its_record_over_a_lost_gang(tmp_path: Path) -> None:
    stream, events = io.StringIO(), EventLog(tmp_path / "events.jsonl")
    metrics = MetricsLogger(tmp_path / "metrics.jsonl")
    events.record(STEPS_KNOWN, stage="sft", steps=9, done=0)  # of an earlier driver
    metrics.log("sft", 2, {"policy_loss": 1.0})
    progress = FollowedProgress("sft", events.path, metrics.path, stream=stream)
    progress.update()
    assert stream.getvalue() == "", "nothing is known yet"
    metrics.resume("sft", 2)
    events.record(STEPS_KNOWN, stage="reward", steps=3, done=0)
    events.record(STEPS_KNOWN, stage="sft", steps=8, done=2)
    metrics.log("sft", 3, {"rank_loss": 0.5, "lr": 1.0, "held_out/rank_loss": float("nan")})
    progress.update()
    assert stream.getvalue().startswith("sft: 3/8, ") and stream.getvalue().endswith(", rank_loss=0.5\n")
    events.record(STEPS_KNOWN, stage="sft", steps=8, done=2)
    metrics.resume("sft", 2)
    metrics.log("reward", 1, {})
    for step in range(3, 9):
        metrics.log("sft", step, {"rank_loss": 0.25})
    progress.update()
    progress.close()
    assert stream.getvalue().splitlines()[-1].startswith("sft: 8/8, ")


# Timings


def test_timings_add_up_over_resumes(tmp_path: Path) -> None:
    now = [0.0]
    for _ in range(2):
        timings = Timings(tmp_path / "timings.json", clock=lambda: now[0])
        with timings.phase("rl/generate"):
            now[0] += 2.0
        with pytest.raises(RuntimeError), timings.phase("rl/update"):
            now[0] += 1.0
            raise RuntimeError
        timings.add_tokens("generation", 100, 2.0)
        timings.add("eval/judge", 0.5)
        timings.write()
    assert timings.totals() == {"rl": {"generate": 4.0, "update": 2.0}, "eval": {"judge": 1.0}}
    assert timings.throughput() == {"generation": 50.0}
    with pytest.raises(ValueError, match="stage/phase"):
        timings.add("generate", 1.0)


# Memory


def test_descendants_and_marked_processes_are_found() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    stranger = subprocess.Popen(["sleep", "60"], env={**os.environ, RUN_MARK: "run-1"})
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    try:
        assert {os.getpid(), parent.pid, grandchild} <= run_processes(os.getpid())
        assert grandchild in run_processes(parent.pid)
        assert stranger.pid not in run_processes(parent.pid)
        assert stranger.pid in run_processes(parent.pid, "run-1")
        assert stranger.pid not in run_processes(parent.pid, "run-2")
    finally:
        os.kill(grandchild, 9)
        for process in (parent, stranger):
            process.kill()
            process.wait(timeout=30)
        parent.stdout.close()
    assert pss_bytes(parent.pid) == 0


def test_peak_is_kept_after_the_memory_is_freed() -> None:
    base = total_gib(os.getpid())
    with MemorySampler(interval_s=0.05) as sampler:
        block = bytearray(200 * 2**20)
        block[::4096] = b"x" * len(block[::4096])
        while sampler.peak_memory_gib < base + 0.15:
            pass
        del block
    assert base + 0.15 < sampler.stop() < base + 0.5
    with MemorySampler(initial_gib=100.0) as sampler:
        pass
    assert sampler.peak_memory_gib == 100.0
