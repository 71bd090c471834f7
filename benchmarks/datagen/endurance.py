"""Kills a dataset job that asks a language model at random moments, until all its rows are published.

`make endurance NAME=datagen`. A real datagen service runs the job in a child process of its own; killed are now the
child, now the whole service, at moments drawn by chance, and the service takes the job up again by itself. Afterwards
every row that was accepted before any kill must be in the published dataset, and no request whose answer had been
recorded may have been made again. The model's answers are damaged now and then and some requests are refused with 429,
so that kills also hit what follows from that.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc

sys.path.insert(0, str(Path(__file__).parent))
from mock_llm import Answer, Model, completion, serve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "datagen-endurance.txt"
BATCH, IN_FLIGHT, LATENCY = 5, 8, 0.03
ROWS_FOR_A_KILL = 450
"""More requests than any moment waits for, so that the job never ends before its kills."""
MOST_REQUESTS = 70
SERVICE_SHARE = 0.3
"""Share of the kills that take the whole service, not only the job's process."""
START_SHARE = 0.15
"""Share of the kills that come while the job is taken up again."""


class Provider:
    """Remembers what it was asked, and is not always well."""

    def __init__(self, draw: random.Random):
        self.asked: list[str] = []
        self._draw = draw
        self._model = Model(self._damage)

    def _damage(self, _number: int, text: str) -> str:
        kind = self._draw.random()
        if kind < 0.05:
            return f"Here you go:\n```json\n{text}\n```"
        if kind < 0.10:
            return text[: self._draw.randrange(len(text))]
        return "I had rather not." if kind < 0.12 else text

    def __call__(self, body: bytes) -> Answer:
        if self._draw.random() < 0.03:
            return 429, b'[{"error": {"code": 429, "message": "rate_limit", "details": [{"retryDelay": "0.05s"}]}}]'
        self.asked.append(hashlib.sha256(body).hexdigest())
        return self._model(body) if body else (200, completion(""))


class Service:
    """A datagen service in a process of its own, which can be killed and started again."""

    def __init__(self, folder: Path, provider_port: int):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._listen = f"127.0.0.1:{free.getsockname()[1]}"
        self._environment = {
            **os.environ, "LORALINE_DATA_DIR": str(folder), "LORALINE_LISTEN": self._listen, "LORALINE_AUTH": "off",
            "LORALINE_METRICS_LISTEN": "", "LORALINE_POLL_SECONDS": "0.1", "LORALINE_LEASE_SECONDS": "3",
            "LORALINE_MAX_ATTEMPTS": "1000000", "LLM_BASE_URL": f"http://127.0.0.1:{provider_port}/v1",
            "LLM_MODEL": "mock", "LLM_API_KEY": "none", "NO_PROXY": "127.0.0.1",
            "LORALINE_DATAGEN_LLM_CONCURRENCY": str(IN_FLIGHT), "LORALINE_DATAGEN_LLM_BACKOFF_SECONDS": "0.05",
        }  # fmt: skip
        self._process: asyncio.subprocess.Process | None = None
        self._channel: grpc.aio.Channel | None = None

    async def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "service.txt").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "loraline.datagen", env=self._environment, stdout=log, stderr=log
            )
        self._channel = grpc.aio.insecure_channel(self._listen)
        await asyncio.wait_for(self._channel.channel_ready(), 60)
        self.jobs = job_pb2_grpc.JobServiceStub(self._channel)
        self.datagen = datagen_pb2_grpc.DatagenServiceStub(self._channel)

    async def kill(self) -> None:
        """Kill it; the job's process goes with it."""
        assert self._process is not None and self._channel is not None
        await self._channel.close(None)
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    def worker(self) -> int | None:
        """Return the id of the process that does the job, if any. Its guardian is no child of the service."""
        assert self._process is not None
        for entry in Path("/proc").iterdir():
            try:
                parent = f"PPid:\t{self._process.pid}\n" in (entry / "status").read_text()
                if parent and b"loraline.core.jobs.child" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
            except (OSError, ValueError):
                continue
        return None


@dataclass
class Found:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    accepted: set[str] = field(default_factory=set)
    repeated: int = 0
    torn: int = 0
    known: set[str] = field(default_factory=set)
    seen: int = 0


def ask_for(rows: int, seed: int) -> datagen_pb2.GenerateDatasetRequest:
    """Return the request of the job."""
    request = datagen_pb2.GenerateDatasetRequest(name="asked")
    request.gate.refuse_codes.append("EMPTY_DATASET")  # What a counting model writes is monotonous.
    request.split.seed = seed
    request.sources.add(name="asked", llm=datagen_pb2.LlmRecipe(
        recipe="instruction-response", rows=rows, batch_size=BATCH, max_candidates_ratio=10,
        quota_policy=datagen_pb2.QUOTA_POLICY_WAIT, topics=["sea", "stone", "wind"], styles=["short", "long"],
    ))  # fmt: skip
    return request


def questions(path: Path) -> set[str]:
    """Return the questions of the whole rows of a file."""
    if not path.exists():
        return set()
    lines = path.read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["messages"][0]["content"] for line in lines}


def look(folder: Path, provider: Provider, found: Found) -> None:
    """Note what stands on disk after a kill, and whether a recorded request was made again before it."""
    found.repeated += sum(digest in found.known for digest in provider.asked[found.seen :])
    found.seen = len(provider.asked)
    found.accepted |= questions(folder / "rows.jsonl")
    ledger = folder / "llm-1" / "ledger.jsonl"
    if ledger.exists():
        content = ledger.read_bytes()
        found.torn += bool(content) and not content.endswith(b"\n")
        records = [json.loads(line) for line in content.split(b"\n")[:-1]]
        found.known = {record["payload"] for record in records if record["outcome"] == "answered"}


async def at_some_moment(service: Service, provider: Provider, draw: random.Random) -> int:
    """Wait for the job's process and then for a random moment of it; return its id."""
    while (worker := service.worker()) is None:
        await asyncio.sleep(0.01)
    if draw.random() < START_SHARE:
        await asyncio.sleep(draw.uniform(0.0, 2.0))
        return worker
    end, requests = time.monotonic() + 60, len(provider.asked) + draw.randrange(MOST_REQUESTS)
    while len(provider.asked) < requests and time.monotonic() < end:
        await asyncio.sleep(0.001)
    await asyncio.sleep(draw.uniform(0.0, 0.03))
    return worker


async def kill_often(service: Service, provider: Provider, draw: random.Random, kills: int, job: str) -> Found:
    """Kill until it was done often enough."""
    found, folder = Found(), service.folder / "jobs" / job
    while found.kills.total() < kills:
        worker = await at_some_moment(service, provider, draw)
        if draw.random() < SERVICE_SHARE:
            await service.kill()
            found.kills["service"] += 1
        else:
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:  # It ended by itself, or was never more than about to begin.
                continue
            found.kills["job_process"] += 1
        while Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes():
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)  # What it sent before its end has come in.
        look(folder, provider, found)
        if service.worker() is None and "service" in found.kills and not await alive(service):
            await service.start()
    return found


async def alive(service: Service) -> bool:
    """Return whether the service runs."""
    try:
        await service.jobs.ListJobs(job_pb2.ListJobsRequest(), timeout=5)
    except (grpc.aio.AioRpcError, asyncio.CancelledError, grpc.aio.UsageError):
        return False
    return True


async def finished(service: Service, name: str) -> job_pb2.Job:
    """Wait until the job has ended."""
    while True:
        job = (await service.jobs.GetJob(job_pb2.GetJobRequest(name=name))).job
        if job.state not in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING):
            return job
        await asyncio.sleep(0.2)


async def run(kills: int, seed: int) -> tuple[int, int, list[str]]:
    """Return lost rows, repeated calls, and lines of information."""
    draw = random.Random(seed)
    provider = Provider(draw)
    server, port = await serve(provider, LATENCY)
    rows = ROWS_FOR_A_KILL * kills
    with tempfile.TemporaryDirectory() as name:
        service = Service(Path(name), port)
        await service.start()
        try:
            job = (await service.datagen.GenerateDataset(ask_for(rows, seed))).job.name
            found = await kill_often(service, provider, draw, kills, job)
            ended = await finished(service, job)
            if ended.state != job_pb2.JOB_STATE_SUCCEEDED:
                told = ended.error.message or ended.pause.message
                raise SystemExit(f"seed {seed}: the job ended {job_pb2.JobState.Name(ended.state)}: {told}")
        finally:
            await service.kill()
        look(service.folder / "jobs" / job, provider, found)
        dataset = service.folder / "store" / "datasets" / "asked" / "v1"
        final = questions(dataset / "train.jsonl") | questions(dataset / "validation.jsonl")
    server.close()
    if len(final) != rows:
        raise SystemExit(f"seed {seed}: {len(final)} different rows of {rows}")
    info = [
        f"info kills {found.kills.total()}", *(f"info kills_of_{what} {n}" for what, n in sorted(found.kills.items())),
        f"info attempts {ended.attempt}", f"info rows {rows}", f"info rows_seen_before_a_kill {len(found.accepted)}",
        f"info requests {len(provider.asked)}", f"info answers_recorded {len(found.known)}",
        f"info torn_ledger_lines_mended {found.torn}",
    ]  # fmt: skip
    return len(found.accepted - final), found.repeated, info


def main() -> int:
    """Run it, print and keep its lines; 1 when a row was lost or a call repeated."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    lost, repeated, info = asyncio.run(run(wanted.kills, wanted.seed))
    lines = [
        f"seed {wanted.seed}",
        f"count lost_rows {lost} aim <=0",
        f"count repeated_calls {repeated} aim <=0",
        *info,
    ]
    if wanted.keep:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[1:]))
    return 1 if lost or repeated else 0


if __name__ == "__main__":
    sys.exit(main())
