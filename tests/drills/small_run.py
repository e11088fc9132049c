"""A run without engines, in a process of its own: ``python -m`` this module ``FOLDER``.

It resumes as a stage does, says ``resumed N``, and then does what each line of its input says, for step N + 1 and
after: ``record`` writes rollouts, ``log`` writes metrics, ``save`` takes a checkpoint. Before each it says
``begin COMMAND STEP`` and after it ``done COMMAND STEP``. An error of ours ends it as it ends the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rlhf.errors import RlhfError
from rlhf.runs import checkpoint
from rlhf.runs.events import EventLog
from rlhf.runs.metrics import MetricsLogger
from rlhf.runs.places import FileEntry, write_file

STAGE = "rl"
KEPT = 3
RANKS, RANK_BYTES = 4, 40_000
WIDE = {f"a_metric_with_a_long_name_{index:03d}": float(index) for index in range(200)}
"""A line of metrics that fills more than one page of memory or disk."""


def weights(step: int) -> bytes:
    """What each rank of a checkpoint holds."""
    return step.to_bytes(4, "big") * (RANK_BYTES // 4)


def main(folder: Path) -> int:
    """Follows its input to the end and returns the exit code."""
    try:
        return follow(folder)
    except RlhfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def follow(folder: Path) -> int:
    events = EventLog(folder / "events.jsonl")
    saved = folder / "checkpoints" / STAGE
    found = checkpoint.load_latest(saved, on_event=lambda kind, fields: events.record(kind, **fields))
    first = 0 if found is None else found.step
    if found is not None:
        assert found.state["step"] == first
        for rank in range(RANKS):
            assert Path(found.place, f"rank_{rank}.bin").read_bytes() == weights(first)
        events.record("stage_resumed", stage=STAGE, step=first)
    metrics = MetricsLogger(folder / "metrics.jsonl")
    metrics.resume(STAGE, first)
    done = dict.fromkeys(("record", "log", "save"), first)
    print(f"resumed {first}", flush=True)
    for line in sys.stdin:
        command = line.strip()
        done[command] += 1
        step = done[command]
        print(f"begin {command} {step}", flush=True)
        if command == "record":
            record(folder, step - 1)
        elif command == "log":
            metrics.log(STAGE, step, WIDE)
        else:
            checkpoint.save(saved, step, lambda place, step=step: write(place, step), state={"step": step}, keep=KEPT)
        print(f"done {command} {step}", flush=True)
    return 0


def write(place: str, step: int) -> dict[str, FileEntry]:
    names = [f"rank_{rank}.bin" for rank in range(RANKS)]
    return {name: write_file(place, name, [weights(step)]) for name in names}


def record(folder: Path, step: int) -> None:
    from actors.recorder import RecorderWorker  # pyarrow: not for who only saves
    from actors.store import LocalStore
    from tests.actors.judging import make_group

    groups: list[Any] = [make_group(f"p{step}/{index}", [f"text {step}"] * 4) for index in range(4)]
    RecorderWorker(folder, LocalStore()).record(STAGE, step, groups)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
