"""vLLM on the CPU with a small random model: our gRPC and HTTP, AsyncLLM in-process, `vllm serve`; and our adapters."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from load import Ask, GrpcClients, HttpClients, Told
from processes import VLLM, InProcess, Server, environment, server, vllm_serve
from rounds import SPEED, THRIFT, Subject, in_process, line, over_wire, ratio, take_turns, timed
from servers import SERVED, free_port
from toy import make_adapters

LEVELS = ((1, 8, 96), (16, 2, 128), (64, 2, 96))
"""Streams at once, answers of each, tokens of an answer."""
ADAPTERS = 8


async def measure(model: Path, rounds: int) -> list[str]:
    """Run all of it."""
    from transformers import AutoTokenizer

    adapters = make_adapters(model, model.parent, AutoTokenizer.from_pretrained(model), ADAPTERS)
    with ExitStack() as stack:
        flags = [flag for folder in adapters for flag in ("--adapter", str(folder))]
        ours = stack.enter_context(server("ours", model, *flags))
        theirs = stack.enter_context(vllm_serve(model, SERVED, free_port(), []))
        consumer = InProcess("real", model)
        stack.callback(consumer.stop)
        grpc = GrpcClients(ours.grpc, ours.key)
        http, peer = HttpClients(ours.http, ours.key), HttpClients(theirs.http, "none")
        lines = [line("ratio", "start_seconds_vs_vllm_serve", ours.start_seconds / theirs.start_seconds)]
        lines += [line("info", "start_seconds", ours.start_seconds, digits=1)]
        lines += [line("info", "vllm_serve_start_seconds", theirs.start_seconds, digits=1)]
        for streams, answers, tokens in LEVELS:
            asked = {"askers": streams, "answers": answers, "tokens": tokens, "rate": 0}
            subjects = [
                in_process("async_llm", consumer, **asked),
                over_wire("vllm_serve", theirs, peer, **asked),
                over_wire("http", ours, http, **asked),
                over_wire("grpc", ours, grpc, **asked),
            ]
            await take_turns(subjects, rounds)
            lines += level(streams, subjects)
        lines += bench_serve(model, ours, theirs, rounds)
        lines += await load_adapters(ours, adapters)
        lines += await interleaved(ours, grpc, adapters, rounds)
        http.close()
        peer.close()
        await grpc.close()
    return lines


def level(streams: int, subjects: list[Subject]) -> list[str]:
    """Return the lines of one number of streams."""
    inside, vllm, *ours = subjects
    lines = []
    for subject in ours:
        what = f"real_{streams}_streams_{subject.name}_tokens_per_second"
        lines.append(line("ratio", f"{what}_vs_async_llm", ratio(subject, inside, SPEED), ">=0.95"))
        lines.append(line("ratio", f"{what}_vs_vllm_serve", ratio(subject, vllm, SPEED), ">=1.00"))
        thrift = ratio(subject, vllm, THRIFT)
        lines.append(
            line("ratio", f"real_{streams}_streams_{subject.name}_tokens_per_cpu_second_vs_vllm_serve", thrift)
        )
    for subject in subjects:
        what = f"real_{streams}_streams_{subject.name}"
        lines.append(line("info", f"{what}_tokens_per_second", subject.median(SPEED), digits=0))
        for share in (0.5, 0.99):
            first = subject.median(lambda r, share=share: r.first(share))
            lines.append(line("info", f"{what}_p{share * 100:.0f}_first_token_ms", first, digits=1))
    return lines


def bench_serve(model: Path, ours: Server, theirs: Server, rounds: int) -> list[str]:
    """Run vLLM's own load generator against both HTTP sides, in turns."""
    found: dict[str, list[dict[str, float]]] = {"http": [], "vllm_serve": []}
    sides = [("vllm_serve", theirs), ("http", ours)]
    for number in range(rounds):
        for name, target in sides if number % 2 == 0 else sides[::-1]:
            found[name].append(one_bench(model, target))
    lines = []
    for figure, better in (("output_token_throughput", 1), ("median_ttft", -1), ("p99_ttft", -1)):
        pairs = zip(found["http"], found["vllm_serve"], strict=True)
        value = statistics.median((a[figure] / b[figure]) ** better for a, b in pairs)
        lines.append(line("ratio", f"vllm_bench_serve_{figure}_ahead_of_vllm_serve", value, ">=1.00"))
    for name, rounds_of in found.items():
        for figure in rounds_of[0]:
            value = statistics.median(one[figure] for one in rounds_of)
            lines.append(line("info", f"vllm_bench_serve_{name}_{figure}", value, digits=1))
    return lines


def one_bench(model: Path, target: Server) -> dict[str, float]:
    """Return the figures that `vllm bench serve` prints."""
    command = [*VLLM, "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", f"http://{target.http}", "--endpoint", "/v1/chat/completions", "--model", SERVED]
    # Its own random prompts spell control tokens now and then, which ours refuses.
    prompts = model.parent / "prompts.jsonl"
    words = [f"Which boats were at the quay on day {day} of the month?" for day in range(128)]
    prompts.write_text("".join(json.dumps({"prompt": text, "output_tokens": 96}) + "\n" for text in words))
    command += ["--tokenizer", str(model), "--dataset-name", "custom", "--dataset-path", str(prompts), "--ignore-eos"]
    command += ["--custom-output-len", "96", "--num-prompts", "128", "--max-concurrency", "64", "--seed", "1"]
    environ = {**environment(), "OPENAI_API_KEY": target.key or "none"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=300)
    figures = {
        "output_token_throughput": r"Output token throughput \(tok/s\):\s+([\d.]+)",
        "median_ttft": r"Median TTFT \(ms\):\s+([\d.]+)",
        "p99_ttft": r"P99 TTFT \(ms\):\s+([\d.]+)",
        "median_inter_token": r"Median ITL \(ms\):\s+([\d.]+)",
        "failed": r"Failed requests:\s+(\d+)",
    }
    found = {name: re.search(pattern, done.stdout) for name, pattern in figures.items()}
    if done.returncode or found["output_token_throughput"] is None:
        raise RuntimeError(f"vllm bench serve failed: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return {name: float(match[1]) for name, match in found.items() if match}


async def load_adapters(ours: Server, adapters: list[Path]) -> list[str]:
    """Time LoadAdapter from the artifact store, with its proof, against copying and hashing the same files."""
    import grpc.aio

    from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER, ArtifactRef
    from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc

    loads, downloads = [], []
    async with grpc.aio.insecure_channel(ours.grpc) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        for folder in adapters:
            ref = ArtifactRef(kind=ARTIFACT_KIND_ADAPTER, name=folder.name, version=1)
            clock = timed()
            await stub.LoadAdapter(
                inference_pb2.LoadAdapterRequest(adapter=ref), metadata=(("authorization", f"Bearer {ours.key}"),)
            )
            loads.append(clock())
            clock = timed()
            copy_and_hash(folder)
            downloads.append(clock())
    load, download = statistics.median(loads), statistics.median(downloads)
    size = sum(file.stat().st_size for file in adapters[0].iterdir())
    return [
        line("ratio", "adapter_ready_seconds_vs_download_and_digest", load / download, "<=1.5"),
        line("info", "adapter_ready_ms", load * 1000, digits=1),
        line("info", "adapter_download_and_digest_ms", download * 1000, digits=1),
        line("info", "adapter_kib", size / 1024, digits=0),
    ]


def copy_and_hash(folder: Path) -> None:
    """Do what a download from a local store is at least: copy durably, and hash what was written."""
    with tempfile.TemporaryDirectory() as target:
        for file in sorted(folder.iterdir()):
            copied = Path(shutil.copy(file, target))
            with copied.open("rb") as content:
                hashlib.file_digest(content, "sha256")
                os.fsync(content.fileno())


async def interleaved(ours: Server, ask: Ask, adapters: list[Path], rounds: int) -> list[str]:
    """Eight adapters in the same batches against one."""
    names = itertools.cycle(folder.name for folder in adapters)

    async def any_of_them(tokens: int, rate: int, _: str) -> Told:
        return await ask(tokens, rate, next(names))

    asked = {"askers": 16, "answers": 1, "tokens": 96, "rate": 0}
    eight = over_wire("eight", ours, any_of_them, **asked)
    one = over_wire("one", ours, ask, **asked, model=adapters[0].name)
    base = over_wire("base", ours, ask, **asked)
    await take_turns([eight, one, base], rounds)
    return [
        line("ratio", "eight_adapters_tokens_per_second_vs_one", ratio(eight, one, SPEED), ">=0.92"),
        line("ratio", "one_adapter_tokens_per_second_vs_base", ratio(one, base, SPEED)),
        *(line("info", f"{s.name}_tokens_per_second", s.median(SPEED), digits=0) for s in (eight, one, base)),
    ]
