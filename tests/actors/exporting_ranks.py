"""Ranks for the publication tests: a module of its own, so that their processes need not import PyTorch."""

from __future__ import annotations

NUM_BUCKETS = 4
DIGESTS = [f"digest{i}" for i in range(NUM_BUCKETS)]


class ExportingRank:
    """A rank that exports ``NUM_BUCKETS`` buckets; only rank 0 has them."""

    def __init__(self, rank: int, fail_at: int | None = None) -> None:
        self.rank = rank
        self.fail_at = fail_at
        self.log: list[object] = []

    def export_plan(self, bucket_bytes: int) -> list[str]:
        self.log.append(("plan", bucket_bytes))
        return ["bucket"] * NUM_BUCKETS

    def put_bucket(self, index: int):
        import ray

        self.log.append(index)
        if index == self.fail_at:
            raise MemoryError("no memory")
        return (ray.put(index), DIGESTS[index], 100) if self.rank == 0 else None

    def seen(self) -> list[object]:
        return self.log
