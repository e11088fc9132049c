"""A process that owns an engine, for tests that kill it: prints the engine's process ids, then waits."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from tests.actors.vllm.engines import engine_of, make_worker


async def main() -> None:
    worker = make_worker(Path(sys.argv[1]))
    await worker.start()
    print("processes", *engine_of(worker).processes, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    asyncio.run(main())
