"""The cluster that a run starts for itself lets nobody in who has no token: real processes of Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


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
