"""The run directory: where everything of one run is, who may write there, and whether a config may resume it.

Layout::

    config.yaml environment.json metrics.jsonl events.jsonl timings.json memory.json summary.json report.html
    status.json prometheus.json  how it stands while a driver is at work
    stages/NAME.json            a finished stage and its results
    rollouts/ verdicts/ rankings/ groups/   STAGE.PART.parquet, see ``rlhf.runs.names``
    eval/STAGE/                 parquet
    checkpoints/STAGE/step_N/   see ``rlhf.runs.checkpoint``
    policy/ reward_model/ STAGE/policy/   Hugging Face layout
    tensorboard/STAGE/ ray_train/STAGE/ control/
    inputs/DIGEST/              data and constitutions that came along with a submitted run
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel

from rlhf.config import dump, parse_yaml, to_yaml
from rlhf.errors import ConfigError
from rlhf.runs.changes import RESUMABLE_KEYS, config_changes, matches_any
from rlhf.runs.environment import describe_environment
from rlhf.runs.events import EventLog
from rlhf.runs.files import TEMPORARY, read_json, write_json, write_text
from rlhf.runs.names import INPUTS, is_stage_name
from rlhf.runs.redact import redact

_LOCK = ".lock"


class RunDirectory:
    """Paths of a run, and its lock while a driver is at work.

    ``RunDirectory(path)`` only reads. ``RunDirectory.open(...)`` creates or resumes, holds the lock, and is closed by
    ``close()`` or by leaving its ``with`` block; the system drops the lock of a killed driver by itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: int | None = None
        self._written: list[Path] = []
        """What ``open`` made of a run that is new."""

    @classmethod
    def open(
        cls,
        root: Path,
        config: BaseModel,
        *,
        data: Mapping[str, Path | str] | None = None,
        resumable: Sequence[str] = RESUMABLE_KEYS,
    ) -> Self:
        """Creates the directory, or resumes it if its config allows.

        Args:
            root: The directory; new, empty or a run's.
            config: The resolved configuration.
            data: Data files, or fingerprints, by name; the fingerprints must not change over a run's life. None does
                not look at them: for a run that reads them no more.
            resumable: Patterns of keys that may differ from the config that the run was started with, but not of a
                stage that is complete.

        Raises:
            ConfigError: Another live driver holds the run, it is not a run directory, or it is a run of another config
                or of other data (with the differences).
        """
        run = cls(root.resolve())
        with ExitStack() as on_failure:
            run._acquire()
            on_failure.callback(run.close)
            run._write_or_check(config, data, resumable)
            on_failure.pop_all()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def withdraw(self) -> None:
        """Takes back what ``open`` made of a run that is new and was refused after all; any other stays as it is."""
        for path in reversed(self._written):
            if path != self.root:
                path.unlink(missing_ok=True)
            elif not any(self.root.iterdir()):
                self.root.rmdir()
        self._written = []

    # Paths

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Revision, package versions and data fingerprints of the first start."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.root / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        """Seconds per stage and phase so far."""
        return self.root / "timings.json"

    @property
    def summary(self) -> Path:
        """The run's results."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The report as one HTML file."""
        return self.root / "report.html"

    @property
    def events(self) -> EventLog:
        """Faults, restarts, scaling, resumes."""
        return EventLog(self.root / "events.jsonl")

    @property
    def rollouts(self) -> Path:
        """Every sample with its score."""
        return self.root / "rollouts"

    @property
    def verdicts(self) -> Path:
        """Every verdict with its reason."""
        return self.root / "verdicts"

    @property
    def rankings(self) -> Path:
        """Every ranking."""
        return self.root / "rankings"

    @property
    def groups(self) -> Path:
        """Training groups that the feedback stage leaves for the offline stages."""
        return self.root / "groups"

    @property
    def eval(self) -> Path:
        """Completions of the evaluation."""
        return self.root / "eval"

    @property
    def policy(self) -> Path:
        """The trained policy in Hugging Face layout."""
        return self.root / "policy"

    @property
    def reward_model(self) -> Path:
        """The trained reward model in Hugging Face layout."""
        return self.root / "reward_model"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's own files, one folder per stage."""
        return self.root / "tensorboard"

    def checkpoints(self, stage: str) -> Path:
        """Checkpoints of one stage."""
        return self.root / "checkpoints" / _checked(stage)

    def _stage(self, stage: str) -> Path:
        return self.root / "stages" / f"{_checked(stage)}.json"

    # Stages

    def complete(self, stage: str, results: Mapping[str, Any]) -> None:
        """Writes that a stage is done, with its results (plain JSON); from now on a resume leaves it out."""
        write_json(self._stage(stage), {"stage": stage, "completed": time.time(), "results": dict(results)})

    def is_complete(self, stage: str) -> bool:
        """Whether ``complete`` was called for the stage, in this process or in an earlier one."""
        return self._stage(stage).is_file()

    def results(self, stage: str) -> dict[str, Any]:
        """What ``complete`` was given; raises ``RecordError`` where the stage is not done."""
        results: dict[str, Any] = read_json(self._stage(stage))["results"]
        return results

    def resolved_config(self) -> dict[str, Any]:
        """The run's configuration as a plain mapping; raises ``ConfigError`` where this is not a run directory."""
        if not self.config.is_file():
            raise ConfigError(
                str(self.root), found="no config.yaml", needed="a run directory", action="Name the folder of a run."
            )
        document: dict[str, Any] = parse_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        return document

    def is_held(self) -> bool:
        """Whether a driver is at work, on this machine or another one that shares the file system's locks."""
        try:
            descriptor = os.open(self.root / _LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    # Opening

    def _acquire(self) -> None:
        self._check_kind()
        is_new = not self.root.is_dir()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            found = error.strerror or str(error)
            needed, action = "a directory that can be written", "Choose another run_dir or mend the permissions."
            raise ConfigError(str(self.root), found=found, needed=needed, action=action) from error
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                found, action = f"no file locks ({error.strerror})", "Put run_dir on a filesystem with flock."
                raise ConfigError(str(self.root), found=found, needed="a lock", action=action) from error
            raise ConfigError(
                str(self.root),
                found=f"another driver at work ({holder.strip() or 'unknown'})",
                needed="one driver per run directory",
                action="Wait for it, stop it, or set another run_dir.",
            ) from None
        os.ftruncate(descriptor, 0)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")})
        os.pwrite(descriptor, holder.encode(), 0)
        self._lock = descriptor
        if is_new:
            self._written = [self.root, self.root / _LOCK]

    def _check_kind(self) -> None:
        needed, action = "a new, empty or run directory", "Set run_dir to another path."
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(str(self.root), found="a file", needed=needed, action=action)
        if not self.root.is_dir() or self.config.is_file():
            return
        known = (_LOCK, INPUTS)
        others = sorted(p.name for p in self.root.iterdir() if p.name not in known and not p.name.startswith(TEMPORARY))
        if others:
            found = f"a directory with {others[0]!r} and no config.yaml"
            raise ConfigError(str(self.root), found=found, needed=needed, action=action)

    def _write_or_check(
        self, config: BaseModel, data: Mapping[str, Path | str] | None, resumable: Sequence[str]
    ) -> None:
        # Secrets are hidden before the text is parsed back, so both sides of the comparison have them hidden alike.
        new = redact(parse_yaml(dump(config), "config"))
        environment = describe_environment(data or {})
        if not self.config.is_file():
            write_json(self.environment, environment)
            write_text(self.config, to_yaml(new))  # last: its presence makes this a run directory
            self.events.record("created")
            self._written += [self.environment, self.events.path, self.config]
            return
        self._written = []
        old = self.resolved_config()
        changes = config_changes(old, new)
        refused = [key for key in changes if not matches_any(key, resumable)]
        if refused:
            raise _other_config(self.root, {key: changes[key] for key in refused})
        self._check_complete(old, changes)
        before = read_json(self.environment)
        if data is not None:
            self._check_data(before.get("data", {}), environment["data"])
        if changes:
            write_text(self.config, to_yaml(new))
        packages = config_changes(before.get("packages", {}), environment["packages"])
        self.events.record("resumed", config_changes=changes, package_changes=packages)

    def _check_complete(self, config: Mapping[str, Any], changes: Mapping[str, tuple[Any, Any]]) -> None:
        """The record says what a finished stage did, so its settings stay what they were."""
        for index, stage in enumerate(config.get("stages", [])):
            late = {key: change for key, change in changes.items() if key.startswith(f"stages.{index}.")}
            if late and self.is_complete(stage["name"]):
                raise ConfigError(
                    str(self.root),
                    found=f"changes of stage {stage['name']}, which is complete:{_listed(late)}\n",
                    needed="a complete stage's settings as they were",
                    action="Put the values back, or set another run_dir to run the stage anew.",
                )

    def _check_data(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        before, now = ({name: entry["blake2b"] for name, entry in side.items()} for side in (old, new))
        changes = config_changes(before, now)
        if changes:
            raise _other_config(self.root, {f"data.{key}": value for key, value in changes.items()})


def _lock(descriptor: int) -> None:
    """Takes the lock at once or not at all; tried again, as a reader's ``is_held`` has it for a moment."""
    for pause_s in (0.02, 0.1, 0.0):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not pause_s:
                raise
            time.sleep(pause_s)


def _checked(name: str) -> str:
    """A stage name becomes part of a path, so it must be a plain word."""
    if not is_stage_name(name):
        action = "Use letters, digits, '-' and '_'."
        raise ConfigError("stage name", found=repr(name), needed="a plain word", action=action)
    return name


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    lines = "".join(f"\n  {key}: {old!r} -> {new!r}" for key, (old, new) in list(changes.items())[:20])
    return lines + (f"\n  and {len(changes) - 20} more" if len(changes) > 20 else "")


def _other_config(root: Path, changes: Mapping[str, tuple[Any, Any]]) -> ConfigError:
    return ConfigError(
        str(root),
        found=f"a run of another config:{_listed(changes)}\n",
        needed="the same values (only steps, timeouts, replicas and the like may change on resume)",
        action="Set another run_dir, or put the values back.",
    )
