"""Requests to a running driver: small files in ``RUN/control``, so that they need no port and survive a restart."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.runs.directory import RunDirectory
from rlhf.runs.files import write_json

SCALABLE = ("generation", "judge", "scorer", "reference")
MAX_REPLICAS = 1024


def parse_scale(items: Sequence[str]) -> dict[str, int]:
    """Parses ``ROLE=N`` items; only stateless roles scale while a run goes on."""
    wanted: dict[str, int] = {}
    for item in items:
        role, _, text = item.partition("=")
        if role not in SCALABLE or not text.isdecimal() or not 1 <= int(text) <= MAX_REPLICAS:
            raise ConfigError(
                f"scale {item!r}",
                found="not a stateless role with a count",
                needed=f"ROLE=N with ROLE in {', '.join(SCALABLE)} and N from 1 to {MAX_REPLICAS}",
                action="Learners are sized in the config (roles.learner.ranks) and change at a restart.",
            )
        wanted[role] = int(text)
    return wanted


def _folder(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            str(run), found="no config.yaml", needed="a run directory", action="Name the folder that `rlhf run` made."
        )
    folder = run / "control"
    folder.mkdir(exist_ok=True)
    return folder


def _scale_file(run: Path) -> Path:
    return run / "control" / "scale.json"


def request_scale(run: Path, wanted: Mapping[str, int]) -> None:
    """Leaves the wanted number of replicas for the driver, which looks every second.

    Raises:
        ConfigError: Not a run directory, or no driver is at work: the next one drops what others were asked.
    """
    _folder(run)
    if not RunDirectory(run).is_held():
        raise ConfigError(
            str(run),
            found="no driver at work",
            needed="a run that goes on",
            action="Set roles.ROLE.replicas where the run is started or resumed.",
        )
    path = _scale_file(run)
    merged = read_scale(run) | dict(wanted)
    write_json(path, merged)


def read_scale(run: Path) -> dict[str, int]:
    """The wanted replicas by role; empty where nothing was asked."""
    path = _scale_file(run)
    if not path.is_file():
        return {}
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(wanted, dict):
        raise _unreadable(path, f"a {type(wanted).__name__}")
    return parse_scale([f"{role}={count}" for role, count in wanted.items()])


def _unreadable(path: Path, found: str) -> ConfigError:
    return ConfigError(str(path), found=found, needed="replicas by role, as JSON", action="Remove the file.")


class ScaleRequests:
    """What ``rlhf scale`` asks of one driver.

    Each request is tried once, and one that could not be met is not asked of fleets that start later. A file that
    cannot be read is an event and changes nothing: the run goes on with the replicas that it has.

    Args:
        run: The run directory.
        event: Writes an event: its kind, and fields by keyword.
    """

    def __init__(self, run: Path, event: Callable[..., None]) -> None:
        self._run = run
        self._event = event
        self._stamp: tuple[int, ...] = ()
        self._wanted: dict[str, int] = {}
        self._untried: set[str] = set()
        self._refused: set[str] = set()

    def replicas(self, role: str, configured: int) -> int:
        """How many replicas a fleet starts with."""
        self._read()
        return configured if role in self._refused else self._wanted.get(role, configured)

    def due(self, roles: Container[str]) -> dict[str, int]:
        """Requests for ``roles`` that have not been tried; from now on they have."""
        self._read()
        due = {role: self._wanted[role] for role in sorted(self._untried) if role in roles}
        self._untried -= due.keys()
        return due

    def refuse(self, role: str, error: Exception) -> None:
        """Notes that a request could not be met."""
        self._refused.add(role)
        self._event("scaling_failed", role=role, error=str(error))

    def _read(self) -> None:
        try:
            found = _scale_file(self._run).stat()
        except FileNotFoundError:
            return
        stamp = (found.st_mtime_ns, found.st_ino, found.st_size)  # clocks of files are coarse
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            wanted = read_scale(self._run)
        except ConfigError as error:
            self._event("scaling_failed", error=str(error))
            return
        asked_anew = {role for role, count in wanted.items() if count != self._wanted.get(role)} | self._refused
        self._untried |= asked_anew & wanted.keys()
        self._refused.clear()
        self._wanted = wanted


def request_stop(run: Path) -> None:
    """Asks all ranks of an offline stage to save and end."""
    (_folder(run) / "stop").touch()


def clear_requests(run: Path) -> bool:
    """Takes back what an earlier driver was asked, when a driver starts: its replicas are those of the recipe.

    Returns:
        Whether a number of replicas was taken back.
    """
    (run / "control" / "stop").unlink(missing_ok=True)
    asked = _scale_file(run).is_file()
    _scale_file(run).unlink(missing_ok=True)
    return asked
