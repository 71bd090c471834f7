"""A provider that counts what each row cost, and single runs of the clients against it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mock_llm import Answer, Model, serve
from peers_installs import Client, environment_of, python_of

ROW = re.compile(rb"This is batch (\d+)")
RATE_LIMITED = json.dumps({"error": {
    "message": "Rate limit reached for mock on requests per min (RPM)", "type": "requests", "param": None,
    "code": "rate_limit_exceeded",
}}).encode()  # fmt: skip
NO_QUOTA = json.dumps({"error": {
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "type": "insufficient_quota", "param": None, "code": "insufficient_quota",
}}).encode()  # fmt: skip
Moment = Callable[[], Coroutine[Any, Any, None]]


class Provider:
    """Answers requests for rows and counts them by row. Requests that ask for no row, such as probes, are answered and
    not counted."""

    def __init__(self, refused_share: float = 0.0, quota: int = 0, hold_after: int = 0):
        self.sent = 0
        self.answered: Counter[int] = Counter()
        self.times: list[float] = []
        self.refused_share, self.quota, self.hold_after = refused_share, quota, hold_after
        """Share of requests that get 429; requests after which no quota is left; answers after which none comes."""
        self._draw = random.Random(4)
        self._model = Model()

    def __call__(self, body: bytes) -> Answer | None:
        found = ROW.search(body)
        if not found:
            return self._model(body)
        self.sent += 1
        self.times.append(time.monotonic())
        if self.quota and self.sent > self.quota:
            return 429, NO_QUOTA
        if self._draw.random() < self.refused_share:
            return 429, RATE_LIMITED, b"Retry-After: 1\r\n"
        if self.hold_after and self.answered.total() >= self.hold_after:
            return None
        self.answered[int(found[1])] += 1
        return self._model(body)

    @property
    def repeated(self) -> int:
        """Answers that were paid for although the row had been answered before."""
        return self.answered.total() - len(self.answered)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: rows delivered, and wall and CPU seconds and the version of a run that ended well."""

    code: int
    rows: int
    seconds: float
    wall: float = 0.0
    cpu: float = 0.0
    version: str = ""


@dataclass(frozen=True)
class Bench:
    """What all runs share: the folder of the environments, the server's latency, and the core of the clients."""

    installs: Path
    latency: float
    core: int

    @asynccontextmanager
    async def serving(self, provider: Provider) -> AsyncIterator[str]:
        """Serve in this process; yield the base URL."""
        server, port = await serve(provider, self.latency)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.close()

    async def attempt(
        self, client: Client, url: str, rows: int, in_flight: int, folder: Path, *, warm: int = 0,
        limit: float = 600.0, kill_at: Moment | None = None, quota_policy: str = "PAUSE",
    ) -> Outcome:  # fmt: skip
        """Run a client once, in a process group of its own, which is killed with -9 at a moment or after `limit`."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(python_of(client, self.installs)), str(client.script), "--url", url, "--rows", str(rows),
            "--in-flight", str(in_flight), "--folder", str(folder), "--warm", str(warm),
            "--core", str(self.core),
        ]  # fmt: skip
        environment = {**environment_of(self.installs, folder), "BENCH_QUOTA_POLICY": quota_policy}
        begin = time.monotonic()
        with (folder / "told.txt").open("wb") as told, (folder / "log.txt").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=told, stderr=log, env=environment, start_new_session=True
            )
            ends: set[asyncio.Task[Any]] = {asyncio.create_task(process.wait())}
            if kill_at is not None:
                ends.add(asyncio.create_task(kill_at()))
            try:
                await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            finally:
                with suppress(ProcessLookupError):  # Its processes are gone too when it ended by itself.
                    os.killpg(process.pid, signal.SIGKILL)
                for end in ends:
                    end.cancel()
            code = await process.wait()
        return outcome_of(folder, code, time.monotonic() - begin)


def outcome_of(folder: Path, code: int, seconds: float) -> Outcome:
    """Return what the client told in its last line."""
    lines = [line for line in (folder / "told.txt").read_text(errors="replace").splitlines() if '"wall"' in line]
    if code or not lines:
        return Outcome(code, 0, seconds)
    told = json.loads(lines[-1])
    return Outcome(code, told["rows"], seconds, told["wall"], told["cpu"], told["version"])
