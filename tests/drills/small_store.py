"""A cluster with the smallest object store there is, in a process of its own: ``python -m`` this module ``RUN``.

Puts one value that is larger than the store, and many that are so together, the recorder owning them; reads them back;
lets go of them and puts a small one. Says what came of it, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STORE_BYTES = 80 * 2**20
SIZES = {"one larger than the store": [120 * 2**20], "more than the store together": [30 * 2**20] * 5}
SMALL = 2**20


def main(run: Path) -> dict[str, Any]:
    """What was read back, and the errors, by what was put."""
    import ray

    from actors.recorder import RecorderWorker
    from actors.store import RayStore
    from cluster.placement import connect, disconnect
    from rlhf.errors import RlhfError

    connect(None, num_cpus=2, object_store_bytes=STORE_BYTES)
    recorder = ray.remote(RecorderWorker).options(num_cpus=0.1).remote(run=run, store=RayStore())
    store = RayStore(recorder, timeout_s=120.0)
    found: dict[str, Any] = {}
    for what, sizes in {**SIZES, "a small one": [SMALL]}.items():
        began = time.monotonic()
        try:
            handles = [store.put(np.full(size, number, np.uint8)) for number, size in enumerate(sizes)]
            read = [store.get(handle) for handle in handles]
            found[what] = {"sound": all((value == number).all() for number, value in enumerate(read))}
        except RlhfError as error:
            found[what] = {"error": f"{type(error).__name__}: {error}", "exit_code": error.exit_code}
        found[what]["seconds"] = time.monotonic() - began
        handles = read = []  # lets go of them
    disconnect()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
