"""A runner of the test kinds as a process of its own, for tests that kill it.

`python -m loraline.core.testing.job_runner` reads CoreSettings as one line of JSON from standard input, prints `ready`,
and runs until SIGTERM, on which it drains and exits with 0.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from loraline.core.config import CoreSettings
from loraline.core.db.database import Database
from loraline.core.jobs.runner import JobRunner
from loraline.core.jobs.sql_table import open_table
from loraline.core.testing.jobs import HANDLERS


async def serve(settings: CoreSettings) -> None:
    """Run jobs until SIGTERM."""
    database = Database(settings.database_url)
    runner = JobRunner(settings, open_table(database), HANDLERS)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await runner.start()
    print("ready", flush=True)
    await stop.wait()
    await runner.drain()
    database.close()


if __name__ == "__main__":
    asyncio.run(serve(CoreSettings.model_validate_json(sys.stdin.readline())))
