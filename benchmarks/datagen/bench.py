"""Measures the whole LLM path beside raw aiohttp and a plain AsyncOpenAI gather, on a mock server with 50 ms answers.

`make bench NAME=datagen`. The server has a process of its own; each client runs in a fresh process on one core, rounds
are interleaved, and the ratio is the median of the rounds' ratios. Ours does everything a job does: prompt, limiter,
retry, salvage, schema, duplicates, ledger. `--in-flight` and `--requests` change the size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parents[0] / "results" / "datagen.txt"
AIMS = {"aiohttp": 0.80, "openai": 6.0}
CLIENTS = ("loraline", "aiohttp", "openai")


def body_of(number: int) -> dict[str, Any]:
    """Return a request such as ours, for the peers; its size is ours within some per cent."""
    from loraline.datagen.llms.prompting import LlmSettings, Prompter
    from loraline.datagen.llms.recipes import RECIPES

    settings = LlmSettings(RECIPES["instruction-response"], 1)
    return json.loads(Prompter(settings, 1).body("mock", number, 1, structured=True))


async def with_loraline(url: str, requests: int, in_flight: int) -> int:
    from loraline.datagen.llms.answer_index import AnswerIndex
    from loraline.datagen.llms.endpoint import Endpoint
    from loraline.datagen.llms.generate import LlmRun
    from loraline.datagen.llms.intake import Intake
    from loraline.datagen.llms.ledger_file import FileLedger
    from loraline.datagen.llms.prompting import LlmSettings
    from loraline.datagen.llms.recipes import RECIPES
    from loraline.datagen.llms.routes import Pace

    settings = LlmSettings(RECIPES["instruction-response"], requests, 1)
    with tempfile.TemporaryDirectory() as folder:
        intake = Intake(settings, "bench", lambda row: row.to_line())
        index = AnswerIndex(Path(folder) / "llm-answers.db")
        ledger = FileLedger(Path(folder) / "jobs" / "one" / "llm-1" / "ledger.jsonl", index)
        pace = Pace(in_flight, limits_folder=Path(folder) / "limits")
        await LlmRun(settings, [Endpoint("default", url, "mock", "none")], ledger, intake, 1, None, pace).run()
        ledger.close()
    return intake.accepted


async def with_aiohttp(url: str, requests: int, in_flight: int) -> int:
    import aiohttp

    body, done, numbers = body_of(0), 0, iter(range(requests))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight)) as session:

        async def work() -> None:
            nonlocal done
            for _ in numbers:
                async with session.post(f"{url}/chat/completions", json=body) as response:
                    done += bool((await response.json())["choices"])

        await asyncio.gather(*(work() for _ in range(in_flight)))
    return done


async def with_openai(url: str, requests: int, in_flight: int) -> int:
    import openai

    body = body_of(0)
    gate = asyncio.Semaphore(in_flight)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask() -> bool:
            async with gate:
                return bool((await client.chat.completions.create(**body)).choices)

        return sum(await asyncio.gather(*(ask() for _ in range(requests))))


def client(name: str, url: str, requests: int, in_flight: int) -> None:
    """Measure one client in this process and print its seconds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    work = {"loraline": with_loraline, "aiohttp": with_aiohttp, "openai": with_openai}[name]
    asyncio.run(work(url, in_flight, in_flight))  # imports and connections are not measured
    begin, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    done = asyncio.run(work(url, requests, in_flight))
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    print(json.dumps({"done": done, "wall": time.perf_counter() - begin, "cpu": used}))


def measure(name: str, url: str, requests: int, in_flight: int) -> tuple[float, float]:
    """Return requests a second and CPU seconds for a thousand requests."""
    command = [sys.executable, __file__, "--client", name, "--url", url, "--requests", str(requests),
               "--in-flight", str(in_flight)]  # fmt: skip
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert told["done"] == requests, (name, told)
    return requests / told["wall"], told["cpu"] / requests * 1000


@contextmanager
def mock_server(latency: float) -> Iterator[str]:
    """Start the mock model on a core of its own where there are two; yield its base URL."""
    server = subprocess.Popen(
        [sys.executable, str(FOLDER / "mock_llm.py"), "--latency", str(latency)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None and server.stdin is not None
    os.sched_setaffinity(server.pid, {max(os.sched_getaffinity(0))})
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    finally:
        server.stdin.close()
        server.wait()


def of_ceiling() -> tuple[float, float]:
    """Return the share of the server's ceiling that ours reaches at 64 in flight and 1 s answers, and its aim."""
    with mock_server(1.0) as url:
        rate, _ = measure("loraline", url, 64 * 40, 64)
    return rate / 64, 0.95


def run(rounds: int, requests: int, in_flight: int, latency: float) -> tuple[list[str], bool]:
    """Run the rounds; return the lines, and whether all aims were met."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in CLIENTS}
    with mock_server(latency) as url:
        for _ in range(rounds):
            for name in CLIENTS:
                rates[name].append(measure(name, url, requests if name != "openai" else requests // 4, in_flight))
    share, least = of_ceiling()
    lines, met = [f"ratio loraline_of_ceiling_at_64_with_1s_answers {share:.2f} aim >={least:.2f}"], share >= least
    for peer, aim in AIMS.items():
        pairs = zip(rates["loraline"], rates[peer], strict=True)
        ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
        met = met and ratio >= aim
        lines.append(f"ratio loraline_vs_{peer}_requests_per_second {ratio:.2f} aim >={aim:.2f}")
    for name, told in rates.items():
        lines.append(f"info {name}_requests_per_second {statistics.median(rate for rate, _ in told):.0f}")
        lines.append(f"info {name}_cpu_seconds_per_1000 {statistics.median(cpu for _, cpu in told):.3f}")
    return [*lines, f"info in_flight {in_flight}", f"info latency_seconds {latency}", f"info rounds {rounds}"], met


def main() -> int:
    """Run the benchmark, print and keep its lines."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--client", choices=CLIENTS)
    arguments.add_argument("--url", default="")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--requests", type=int, default=8000)
    arguments.add_argument("--in-flight", type=int, default=256)
    arguments.add_argument("--latency", type=float, default=0.05)
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    if wanted.client:
        client(wanted.client, wanted.url, wanted.requests, wanted.in_flight)
        return 0
    lines, met = run(wanted.rounds, wanted.requests, wanted.in_flight, wanted.latency)
    if wanted.keep:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
