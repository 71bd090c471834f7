"""Runs curator, distilabel and Data Designer beside ours on one mock server: speed, and what faults cost each of them.

`make bench NAME=datagen-peers`. Each peer is installed, in its newest version, into a virtual environment of its own
under `--installs`; these are removed at the end unless `--keep-installs`. A peer that cannot be installed is an `info`
line, and the others go on.

Speed: one request for each row, through each client's whole pipeline, from the call to its return in a process that has
done it before (imports are not measured), on one core; `_while_asking` is the rate from the first request to the last
answer alone, as the server saw it. CPU seconds are those of the whole call and its processes.

Faults, at 32 in flight: a fifth of the requests gets 429 with `Retry-After: 1`; no quota is left from request 100 on,
and comes back before the client is started again; kill -9 of all of the client's processes when 230 of 400 rows were
answered and two quiet seconds have passed, so that every answer could have been written down, and a second start.
Repeated are answers for a row that had been answered before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from peers_installs import OURS, PEERS, Client, cache_folder, install
from peers_runs import Bench, Outcome, Provider

RESULTS = Path(__file__).resolve().parents[1] / "results" / "datagen-peers.txt"
FAULTS_IN_FLIGHT, FAULT_ROWS, KILL_ROWS, KILL_AFTER = 32, 200, 400, 230
QUOTA, REFUSED_SHARE, QUIET_SECONDS, LIMIT_SECONDS = 100, 0.2, 2.0, 120.0
Rates = dict[str, list[tuple[float, float, float]]]


async def speed(bench: Bench, clients: list[Client], rounds: int, rows: int) -> tuple[Rates, list[str]]:
    """Return requests a second, the same while asking, and CPU seconds for a thousand, of each round; the versions."""
    rates: Rates = {client.name: [] for client in clients}
    versions: dict[str, str] = {}
    for _ in range(rounds):
        for client in clients:
            provider, warm = Provider(), client.in_flight
            with tempfile.TemporaryDirectory() as folder:
                async with bench.serving(provider) as url:
                    told = await bench.attempt(client, url, rows, client.in_flight, Path(folder), warm=warm)
            if told.rows != rows or provider.sent != rows + warm:
                raise SystemExit(f"{client.name}: {told}, {provider.sent} requests")
            asking = provider.times[-1] - provider.times[warm] + bench.latency
            rates[client.name].append((rows / told.wall, rows / asking, told.cpu / rows * 1000))
            versions[client.name] = told.version
    return rates, [f"info {name}_version {version}" for name, version in versions.items()]


def ending(told: Outcome) -> str:
    return f"exit_code_{told.code}" if told.code >= 0 else f"no_end_after_{LIMIT_SECONDS:.0f}_s"


async def refusals(bench: Bench, client: Client, folder: Path) -> list[str]:
    """A fifth of the requests gets 429. Ours waits as it is told, which a recipe has to ask for."""
    provider = Provider(refused_share=REFUSED_SHARE)
    async with bench.serving(provider) as url:
        told = await bench.attempt(
            client, url, FAULT_ROWS, FAULTS_IN_FLIGHT, folder, limit=LIMIT_SECONDS, quota_policy="WAIT"
        )
    return [
        f"info {client.name}_rows_of_{FAULT_ROWS}_with_a_fifth_429 {told.rows}",
        f"info {client.name}_requests_with_a_fifth_429 {provider.sent}",
        f"info {client.name}_seconds_with_a_fifth_429 {told.seconds:.0f}",
        f"info {client.name}_ending_with_a_fifth_429 {ending(told)}",
    ]


async def out_of_quota(bench: Bench, client: Client, folder: Path) -> list[str]:
    """No quota from request 100 on; then it is back and the client is started again."""
    provider = Provider(quota=QUOTA)
    async with bench.serving(provider) as url:
        first = await bench.attempt(client, url, FAULT_ROWS, FAULTS_IN_FLIGHT, folder, limit=LIMIT_SECONDS)
        sent, provider.quota = provider.sent, 0
        second = await bench.attempt(client, url, FAULT_ROWS, FAULTS_IN_FLIGHT, folder, limit=LIMIT_SECONDS)
    return [
        f"info {client.name}_ending_out_of_quota {ending(first)}",
        f"info {client.name}_seconds_out_of_quota {first.seconds:.0f}",
        f"info {client.name}_requests_refused_out_of_quota {sent - QUOTA}",
        f"info {client.name}_rows_of_{FAULT_ROWS}_started_again_after_quota {second.rows}",
        f"info {client.name}_ending_started_again_after_quota {ending(second)}",
        f"info {client.name}_requests_repeated_after_quota {provider.repeated}",
    ]


async def killed(bench: Bench, client: Client, folder: Path) -> tuple[list[str], int]:
    """Kill -9 in the middle, then a second start."""
    provider = Provider(hold_after=KILL_AFTER)

    async def quiet() -> None:
        while provider.answered.total() < KILL_AFTER:
            await asyncio.sleep(0.01)
        await asyncio.sleep(QUIET_SECONDS)

    async with bench.serving(provider) as url:
        await bench.attempt(client, url, KILL_ROWS, FAULTS_IN_FLIGHT, folder, limit=LIMIT_SECONDS, kill_at=quiet)
        provider.hold_after = 0
        told = await bench.attempt(client, url, KILL_ROWS, FAULTS_IN_FLIGHT, folder, limit=LIMIT_SECONDS)
    aim = " aim <=0" if client is OURS else ""
    return [
        f"count {client.name}_requests_repeated_after_kill {provider.repeated}{aim}",
        f"info {client.name}_rows_of_{KILL_ROWS}_after_kill {told.rows}",
        f"info {client.name}_ending_after_kill {ending(told)}",
        f"info {client.name}_requests_after_kill_over_rows {provider.sent / KILL_ROWS:.2f}",
    ], provider.repeated


async def faults(bench: Bench, clients: list[Client]) -> tuple[list[str], bool]:
    """Return the lines, and whether ours repeated nothing. All clients at a time: they mostly wait."""

    async def of(client: Client) -> tuple[list[str], int]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            lines, repeated = await killed(bench, client, folder / "killed")
            lines += await refusals(bench, client, folder / "refused")
            return [*lines, *await out_of_quota(bench, client, folder / "quota")], repeated

    told = await asyncio.gather(*(of(client) for client in clients))
    return [line for lines, _ in told for line in lines], told[0][1] == 0


def compared(rates: Rates) -> tuple[list[str], bool]:
    """Return the lines of the rates, and whether ours was the fastest."""
    lines, met = [], True
    for peer in list(rates)[1:]:
        pairs = list(zip(rates[OURS.name], rates[peer], strict=True))
        whole, asking, cpu = (statistics.median(ours[at] / theirs[at] for ours, theirs in pairs) for at in range(3))
        met = met and whole >= 1.0
        lines += [f"ratio loraline_vs_{peer}_requests_per_second {whole:.2f} aim >=1.00",
                  f"info loraline_vs_{peer}_requests_per_second_while_asking {asking:.2f}",
                  f"info loraline_vs_{peer}_cpu_seconds {cpu:.2f}"]  # fmt: skip
    for name, told in rates.items():
        whole, asking, cpu = (statistics.median(values) for values in zip(*told, strict=True))
        lines += [f"info {name}_requests_per_second {whole:.0f}",
                  f"info {name}_requests_per_second_while_asking {asking:.0f}",
                  f"info {name}_cpu_seconds_per_1000 {cpu:.3f}"]  # fmt: skip
    return lines, met


async def run(installs: Path, rounds: int, rows: int, latency: float) -> tuple[list[str], bool]:
    """Install, measure; return the lines, and whether all aims were met."""
    cores = sorted(os.sched_getaffinity(0))
    bench, clients, lines = Bench(installs, latency, cores[0]), [OURS], []
    for peer in PEERS:
        why = install(peer, installs)
        clients += [] if why else [peer]
        lines += [f"info {peer.name}_install failed: {why}"] if why else []
    os.sched_setaffinity(0, {cores[-1]})  # The server, which runs in this process.
    rates, versions = await speed(bench, clients, rounds, rows)
    told, fastest = compared(rates)
    faulty, once = await faults(bench, clients)
    settings = [f"info {client.name}_in_flight {client.in_flight}" for client in clients]
    settings += [f"info rows {rows}", f"info latency_seconds {latency}", f"info rounds {rounds}"]
    return [*told, *faulty, *versions, *settings, *lines], fastest and once


def main() -> int:
    """Run the benchmark, print and keep its lines."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--rows", type=int, default=1000)
    arguments.add_argument("--latency", type=float, default=0.05)
    arguments.add_argument("--installs", type=Path, default=cache_folder())
    arguments.add_argument("--keep-installs", action="store_true")
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    try:
        lines, met = asyncio.run(run(wanted.installs, wanted.rounds, wanted.rows, wanted.latency))
    finally:
        if not wanted.keep_installs:
            for peer in PEERS:
                shutil.rmtree(wanted.installs / peer.name, ignore_errors=True)
    if wanted.keep:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
