"""Unary calls through the platform's server against a bare grpc.aio echo of the same message.

Two server processes, one client; rounds alternate between them, so that whatever else the machine does hits both. The
platform's server checks the key, validates the request and counts the call; the bare one does nothing.
The servers' CPU time for each call is printed too: it holds on a machine that is busy with other things.
Run with `make bench NAME=grpc` or `python benchmarks/grpc/bench.py [--rounds 60] [--calls 480]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio

from loraline.api.job.v1 import job_pb2, job_pb2_grpc

AIM = 0.90
IN_FLIGHT = 16
RESULTS = Path(__file__).parents[1] / "results" / "grpc.txt"
REQUEST = job_pb2.GetJobRequest(name="trainer-train-abcdefghijkm")
RESPONSE = job_pb2.GetJobResponse(
    job=job_pb2.Job(name=REQUEST.name, kind="trainer.train", state=job_pb2.JOB_STATE_RUNNING)
)


class Echo(job_pb2_grpc.JobServiceServicer):
    """Answers every call with the same message."""

    async def GetJob(self, request: job_pb2.GetJobRequest, context: object) -> job_pb2.GetJobResponse:
        return RESPONSE


async def serve(kind: str, folder: Path) -> None:
    """Run one of the two servers until it is killed; its address goes to standard output."""
    interceptors = []
    if kind == "platform":
        from loraline.core.serving.auth import KeyRing
        from loraline.core.serving.grpc_metrics import GrpcMetrics
        from loraline.core.serving.interceptor import PlatformInterceptor

        interceptors = [PlatformInterceptor(GrpcMetrics(), KeyRing(folder / "api_keys.json"))]
    server = grpc.aio.server(interceptors=interceptors, options=[("grpc.so_reuseport", 0)])
    job_pb2_grpc.add_JobServiceServicer_to_server(Echo(), server)  # pyright: ignore[reportAbstractUsage]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def round_of(stub: job_pb2_grpc.JobServiceAsyncStub, metadata: tuple, calls: int) -> float:
    """Return calls a second over one round with a fixed number in flight."""

    async def caller(count: int) -> None:
        for _ in range(count):
            await stub.GetJob(REQUEST, metadata=metadata)

    begun = time.perf_counter()
    await asyncio.gather(*(caller(calls // IN_FLIGHT) for _ in range(IN_FLIGHT)))
    return calls // IN_FLIGHT * IN_FLIGHT / (time.perf_counter() - begun)


async def measure(ports: dict[str, int], key: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """Return the calls a second of every round, by server; rounds are short, so that both meet the same weather."""
    # Both servers get the same metadata, so that the client's work is the same too.
    metadata = (("authorization", f"Bearer {key}"),)
    rates: dict[str, list[float]] = {"bare": [], "platform": []}
    channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{port}") for name, port in ports.items()}
    stubs = {name: job_pb2_grpc.JobServiceStub(channel) for name, channel in channels.items()}
    for stub in stubs.values():
        await round_of(stub, metadata, calls // 4)
    for number in range(rounds):
        order = ["bare", "platform"] if number % 2 == 0 else ["platform", "bare"]
        for name in order:
            rates[name].append(await round_of(stubs[name], metadata, calls))
    for channel in channels.values():
        await channel.close(None)
    return rates


def main() -> None:
    """Measure, print the ratio and keep it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=60)
    arguments.add_argument("--calls", type=int, default=480)
    arguments.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve[0], Path(options.serve[1])))
        return
    from loraline.core.serving.auth import KeyRing

    with tempfile.TemporaryDirectory() as folder:
        key = KeyRing(Path(folder) / "api_keys.json").create("bench", ["operate"])
        servers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--serve", name, folder], stdout=subprocess.PIPE, text=True
            )
            for name in ("bare", "platform")
        }
        try:
            ports = {name: int(server.stdout.readline()) for name, server in servers.items() if server.stdout}
            before = {name: cpu_seconds(server.pid) for name, server in servers.items()}
            rates = asyncio.run(measure(ports, key, options.rounds, options.calls))
            served = options.rounds * (options.calls // IN_FLIGHT * IN_FLIGHT) + options.calls // 4
            cpu = {name: (cpu_seconds(server.pid) - before[name]) / served * 1e6 for name, server in servers.items()}
        finally:
            for server in servers.values():
                server.terminate()
                server.wait()
    report(rates, cpu)


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far; nan where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(rates: dict[str, list[float]], cpu: dict[str, float]) -> None:
    """Print the figures and write them to the results folder."""
    ratios = sorted(ours / bare for ours, bare in zip(rates["platform"], rates["bare"], strict=True))
    ratio = statistics.median(ratios)
    quarter = len(ratios) // 4
    lines = [
        f"# {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, grpcio {grpc.__version__}",
        f"bare_echo_calls_per_second {statistics.median(rates['bare']):.0f}",
        f"platform_calls_per_second {statistics.median(rates['platform']):.0f}",
        f"server_cpu_us_per_call bare {cpu['bare']:.0f} platform {cpu['platform']:.0f}",
        f"rounds {len(ratios)} middle half of the ratios {ratios[quarter]:.3f} to {ratios[-quarter - 1]:.3f}",
        f"ratio unary_calls_vs_bare_echo {ratio:.3f} aim >={AIM:.2f}",
    ]
    text = "\n".join(lines)
    print(text)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
