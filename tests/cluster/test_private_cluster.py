"""The cluster that a run starts for itself lets nobody else in: real processes of Ray."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import psutil
import pytest
import ray

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


def test_it_listens_on_this_machine_s_own_interface_only() -> None:
    heard = {}
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                heard[process.name(), connection.laddr.port] = connection.laddr.ip
    assert len(heard) >= 4, "the head and the node's own processes"
    assert {place: ip for place, ip in heard.items() if not ipaddress.ip_address(ip).is_loopback} == {}


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["no token", "a wrong token"])
def test_a_stranger_without_the_token_is_refused(token: str) -> None:
    address = ray.get_runtime_context().gcs_address
    program = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.cluster_resources())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    stranger = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert stranger.returncode != 0 and "CPU" not in stranger.stdout
    assert "uthentic" in stranger.stderr, stranger.stderr
