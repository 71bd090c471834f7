"""Kills a run that asks a language model at random moments and starts it again, until all its rows are there.

`make endurance NAME=datagen`. Afterwards every row that was accepted before any kill must be in the result, and no
request whose answer had been recorded may have been made again. The model's answers are damaged now and then and some
requests are refused with 429, so that kills also hit what follows from that.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mock_llm import Answer, Model, completion, serve

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "datagen-endurance.txt"
BATCH, IN_FLIGHT, LATENCY = 5, 8, 0.03
Moment = Callable[[], Coroutine[None, None, None]]

CHILD = """
import sys
from pathlib import Path
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.config import CoreSettings
from loraline.datagen.llms.source import llm_rows
folder, rows, batch, seed = sys.argv[1:]
recipe = datagen_pb2.LlmRecipe(
    recipe="instruction-response", rows=int(rows), batch_size=int(batch), max_candidates_ratio=10,
    quota_policy=datagen_pb2.QUOTA_POLICY_WAIT, topics=["sea", "stone", "wind"], styles=["short", "long"],
)
def accept(row):
    print(row.messages[0]["content"], flush=True)
core = CoreSettings(data_dir=Path(folder))
llm_rows(recipe, int(seed), "asked", Path(folder) / "llm-1", accept, core=core)
"""


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


def recorded(ledger: Path) -> set[str]:
    """Return the digests of the requests whose answers stand in the ledger, whole lines only."""
    if not ledger.exists():
        return set()
    lines = ledger.read_bytes().split(b"\n")[:-1]
    records = [json.loads(line) for line in lines]
    return {record["payload"] for record in records if record["outcome"] == "answered"}


async def attempt(folder: Path, port: int, rows: int, seed: int, moment: Moment | None) -> tuple[int, list[str]]:
    """Run the asking process once, killed at a moment; return its exit code and the rows that it accepted."""
    environment = {
        **os.environ, "LLM_BASE_URL": f"http://127.0.0.1:{port}/v1", "LLM_MODEL": "mock", "LLM_API_KEY": "none",
        "LORALINE_DATAGEN_LLM_CONCURRENCY": str(IN_FLIGHT), "LORALINE_DATAGEN_LLM_BACKOFF_SECONDS": "0.05",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(folder), str(rows), str(BATCH), str(seed), env=environment,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    told = asyncio.create_task(process.stdout.read())
    if moment is not None:
        end = asyncio.create_task(process.wait())
        came = asyncio.create_task(moment())
        await asyncio.wait({end, came}, return_when=asyncio.FIRST_COMPLETED)
        came.cancel()
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
    accepted = (await told).decode().splitlines(keepends=True)
    # A line without its end was cut by the kill.
    return await process.wait(), [line[:-1] for line in accepted if line.endswith("\n")]


def some_moment(provider: Provider, draw: random.Random) -> Moment:
    """Return what waits for a random moment: mostly some requests into the attempt, at times during its start."""
    requests, pause = draw.randrange(70), draw.uniform(0.0, 0.03)
    start = draw.uniform(0.5, 2.5) if draw.random() < 0.15 else 60.0
    begin = len(provider.asked)

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + start
        while len(provider.asked) < begin + requests and loop.time() < end:
            await asyncio.sleep(0.001)
        await asyncio.sleep(pause)

    return wait


async def run(kills: int, seed: int) -> tuple[int, int, list[str]]:
    """Return lost rows, repeated calls, and lines of information."""
    draw = random.Random(seed)
    provider = Provider(draw)
    server, port = await serve(provider, LATENCY)
    rows = 450 * kills  # More requests for each kill than any moment waits for: the run never ends too early.
    accepted: set[str] = set()
    done_kills = repeated = torn = 0
    with tempfile.TemporaryDirectory() as name:
        folder, seen = Path(name), 0
        ledger = folder / "llm-1" / "ledger.jsonl"
        final: list[str] = []
        while True:
            known = recorded(ledger)
            moment = some_moment(provider, draw) if done_kills < kills else None
            code, got = await attempt(folder, port, rows, seed, moment)
            repeated += sum(digest in known for digest in provider.asked[seen:])
            seen = len(provider.asked)
            accepted.update(got)
            if code == -signal.SIGKILL:
                done_kills += 1
                torn += not ledger.read_bytes().endswith(b"\n") if ledger.exists() else 0
                continue
            if code != 0:
                raise SystemExit(f"seed {seed}: the run failed with exit code {code}")
            final = got
            break
        answered = len(recorded(ledger))
    server.close()
    lost = len(accepted - set(final))
    assert len(final) == len(set(final)) == rows, f"seed {seed}: {len(final)} rows, {len(set(final))} different"
    info = [f"info kills {done_kills}", f"info rows {rows}", f"info requests {len(provider.asked)}",
            f"info answers_recorded {answered}", f"info torn_ledger_lines_mended {torn}"]  # fmt: skip
    return lost, repeated, info


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
