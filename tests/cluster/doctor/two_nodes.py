"""A cluster of two nodes in a process of its own: says its address, loses a node when told so, ends with its input."""

from __future__ import annotations

import sys
import time

STORE_BYTES = 80 * 2**20


def main() -> None:
    """Starts, obeys, ends."""
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    second = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes(timeout=120)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        deadline = time.monotonic() + 120
        while sum(node["Alive"] for node in cluster.global_state.node_table()) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        print("lost", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
