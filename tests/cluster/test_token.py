"""Ray's token file: readable by its owner alone once a cluster was started or joined."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cluster import token
from cluster.token import protect_token, token_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token file of a temporary home, as Ray writes it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_that_others_can_read_is_closed_to_them_once(file: Path) -> None:
    assert token_file() == file
    assert protect_token()
    assert mode(file) == 0o600
    assert file.read_text() == "secret"
    assert not protect_token(), "nothing is left to do"


def test_a_stricter_mode_is_not_widened(file: Path) -> None:
    file.chmod(0o400)
    assert not protect_token()
    assert mode(file) == 0o400


def test_the_file_that_ray_was_pointed_to_is_the_one(file: Path, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "elsewhere"
    other.write_text("secret")
    other.chmod(0o664)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert protect_token()
    assert (mode(other), mode(file)) == (0o600, 0o644)


def test_somebody_elses_token_is_left_alone(file: Path, monkeypatch) -> None:
    monkeypatch.setattr(token.os, "geteuid", lambda: os.getuid() + 1)
    assert not protect_token()
    assert mode(file) == 0o644


def test_no_token_no_home_and_no_regular_file_are_no_fault(file: Path, monkeypatch) -> None:
    file.unlink()
    assert not protect_token()
    file.mkdir()
    assert not protect_token()
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert token_file() is None
    assert not protect_token()


def test_joining_a_cluster_protects_the_token(file: Path, monkeypatch) -> None:
    """Ray itself is replaced: it writes the token when it starts, as the real one does for a new cluster."""
    from cluster import placement

    file.unlink()

    def start(**options: object) -> None:
        file.write_text("secret")
        file.chmod(0o644)

    monkeypatch.setattr(placement.ray, "init", start)
    monkeypatch.setattr(placement.ray, "shutdown", lambda: None)
    monkeypatch.setattr(placement.os, "environ", dict(os.environ))  # what connect sets is for Ray's processes
    for address in (None, "auto"):
        placement.connect(address, num_cpus=1, object_store_bytes=None)
        placement.disconnect()
        assert mode(file) == 0o600
