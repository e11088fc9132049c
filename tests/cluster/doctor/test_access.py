"""Ports, addresses and tokens: on made-up machines, and on this one with listeners and files of the test's own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cluster.doctor import probe
from cluster.doctor.access import check_authentication, check_bind_addresses, check_ports
from tests.cluster.doctor.machines import faults, listener, own_token


def test_an_open_cluster_is_an_error_and_one_with_a_token_is_fine():
    found = faults(listeners=(listener(6379), listener(43210)))
    assert list(found) == ["bind addresses"]
    assert found["bind addresses"].level == "error"
    assert found["bind addresses"].found == "gcs_server on 0.0.0.0 port 6379, 43210 without a token"
    assert "RAY_AUTH_MODE=token" in found["bind addresses"].action
    assert faults(listeners=(listener(6379, asks_token=True), listener(8265, "127.0.0.1"), listener(9, "::1"))) == {}


def test_what_cannot_be_seen_is_a_warning():
    check = check_bind_addresses([listener(6379, "10.0.0.5", asks_token=None)])
    assert (check.ok, check.level) == (False, "warning")
    assert "cannot be seen" in check.found


def test_a_service_on_every_address_is_a_warning_even_with_a_token():
    serve = listener(8000, title="ray::ProxyActor", asks_token=True)
    check = check_bind_addresses([serve, listener(6379, asks_token=True)])
    assert (check.ok, check.level) == (False, "warning")
    assert "127.0.0.1" in check.action
    assert check_bind_addresses([listener(8000, "127.0.0.1", title="ray::ProxyActor")]).ok


def test_ports_that_others_hold_are_named():
    nginx = listener(8000, title="nginx: master process", is_ray=False, asks_token=None)
    check = check_ports([nginx, listener(6379)])
    assert (check.ok, check.level) == (False, "warning")
    assert "8000 serve: nginx:" in check.found and "6379 GCS: gcs_server" in check.found
    assert "8265 dashboard: free" in check.found
    assert "Stop what listens on 8000" in check.action
    assert check_ports([listener(6379)]).ok
    assert check_bind_addresses([nginx]).ok, "what is not Ray's is not its business"


@pytest.mark.parametrize(
    ("environ", "token", "joins", "level", "action"),
    [
        ({}, None, False, None, ""),
        ({}, own_token(), True, None, ""),
        ({"RAY_AUTH_MODE": "token"}, None, False, None, ""),
        ({"RAY_AUTH_MODE": "token"}, None, True, "error", "ray get-auth-token"),
        ({"RAY_AUTH_MODE": "disabled"}, own_token(), False, "error", "Unset RAY_AUTH_MODE"),
        ({"RAY_AUTH_TOKEN_PATH": "/x"}, None, False, "error", "RAY_AUTH_TOKEN_PATH"),
        ({}, own_token(0o644), False, "warning", "chmod 600 /home/u/.ray/auth_token"),
        ({}, own_token(owner=0), False, "error", "chown 1000"),
        ({}, own_token(size=0), False, "error", "get-auth-token --generate"),
    ],
)
def test_each_fault_of_the_token_has_a_remedy(environ, token, joins, level, action):
    wrong = [check for check in check_authentication(environ, token, 1000, joins=joins) if not check.ok]
    assert [check.level for check in wrong] == ([] if level is None else [level])
    assert all(action in check.action for check in wrong)


def test_the_token_file_is_looked_at_and_its_content_is_not_told(tmp_path: Path, monkeypatch):
    path = tmp_path / "token"
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert probe.token() is None
    path.write_text("secret")
    path.chmod(0o640)
    found = probe.token()
    assert found == {"path": str(path), "mode": 0o640, "owner": os.geteuid(), "size": 6}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert "secret" not in str(probe.token())


def test_who_listens_is_seen(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setitem(probe.RAY_PORTS, port, "test")
        [found] = [one for one in probe.listeners() if one["port"] == port]
    assert (found["address"], found["pid"], found["is_ray"]) == ("127.0.0.1", os.getpid(), False)


@pytest.mark.parametrize(
    ("address", "exposed"),
    [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("::", True), ("10.1.2.3", True), ("fe80::1%eth0", True)],
)
def test_loopback_addresses_are_told_from_others(address, exposed):
    assert probe.is_exposed(address) is exposed


def test_memory_limits_of_all_control_groups_above_count(tmp_path: Path, monkeypatch):
    own = tmp_path / "cgroup"
    own.write_text("0::/pod/container\n")
    root = tmp_path / "fs"
    folders = {"": ("max", "9"), "pod": ("4000", "1500"), "pod/container": ("max", "700")}
    for name, (limit, used) in folders.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "memory.max").write_text(limit + "\n")
        (root / name / "memory.current").write_text(used + "\n")
    (root / "pod" / "memory.stat").write_text("anon 900\ninactive_file 500\n")
    found = probe._cgroup_folders(root, own)
    monkeypatch.setattr(probe, "_cgroup_folders", lambda: found)
    assert probe.memory_limit(10_000) == 4000
    assert probe.memory_available(9_000) == 3000, "what the cache holds can be had"
    assert probe.memory_available(100) == 100
