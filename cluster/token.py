"""Ray's authentication token: whoever reads it can run code on the cluster, and Ray writes it for everyone to read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def token_file() -> Path | None:
    """Where Ray keeps this user's token: ``$RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``; None without a home."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        return Path(named)
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        return None


def protect_token() -> bool:
    """Makes the token readable by this user alone; returns whether it had to be changed.

    A file that is not there, or that belongs to somebody else, is left alone.
    """
    path = token_file()
    if path is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False  # none, or not ours to read
    try:
        found = os.fstat(descriptor)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or stat.S_IMODE(found.st_mode) & 0o077 == 0:
            return False
        os.fchmod(descriptor, 0o600)
        return True
    finally:
        os.close(descriptor)
