"""The front alone, over an engine that costs nothing: in-process, our gRPC and HTTP, vLLM's own OpenAI server."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import ExitStack
from pathlib import Path

from load import GrpcClients, HttpClients, Told, closed_loop, gaps_of, percentile
from processes import InProcess, server
from rounds import PER_MESSAGE, SPEED, THRIFT, Round, Subject, in_process, line, over_wire, ratio, take_turns

STREAMS = 64


async def steady(model: Path, rounds: int) -> list[str]:
    """64 streams of 100 tokens a second: what the wire adds to consuming in-process."""
    asked = {"askers": STREAMS, "answers": 1, "tokens": 300, "rate": 100}
    consumer = InProcess("mock", model)
    try:
        with server("ours", model, "--mock") as ours:
            grpc = GrpcClients(ours.grpc, ours.key)
            subjects = [in_process("in_process", consumer, **asked), over_wire("grpc", ours, grpc, **asked)]
            await take_turns(subjects, rounds)
            await grpc.close()
    finally:
        consumer.stop()
    inside, wire = subjects

    def p99(one: Round) -> float:
        return percentile(gaps_of(one.answers), 0.99) * 1000

    added = statistics.median(p99(b) - p99(a) for a, b in zip(inside.rounds, wire.rounds, strict=True))
    return [
        line("ratio", "steady_grpc_tokens_per_second_vs_in_process", ratio(wire, inside, SPEED), ">=0.97", 3),
        line("count", "steady_grpc_p99_inter_token_added_ms", added, "<=2"),
        *(line("info", f"steady_{s.name}_tokens_per_second", s.median(SPEED), digits=0) for s in subjects),
        *(line("info", f"steady_{s.name}_p99_inter_token_ms", s.median(p99)) for s in subjects),
        *(
            line("info", f"steady_{s.name}_cpu_share_of_a_core", s.median(lambda r: r.cpu / r.seconds))
            for s in subjects
        ),
    ]


async def coalescing(model: Path, rounds: int) -> list[str]:
    """Tokens that are ready go out as one message, against a message for each."""
    # More than either can send: 128,000 tokens a second.
    asked = {"askers": STREAMS, "answers": 1, "tokens": 1000, "rate": 2000}
    with (
        server("ours", model, "--mock", "--stamped") as ours,
        server("ours", model, "--mock", "--stamped", "--one-by-one", "--coalesce", "0") as single,
    ):
        one, other = GrpcClients(ours.grpc, ours.key, texts=True), GrpcClients(single.grpc, single.key, texts=True)
        together, apart = over_wire("together", ours, one, **asked), over_wire("apart", single, other, **asked)
        await take_turns([together, apart], rounds)
        # What the pause costs shows where neither is at its limit: few streams, faster than the pause.
        added = []
        for _ in range(rounds):
            late = [delays(await closed_loop(ask, 4, 1, 1000, 1000)) for ask in (one, other)]
            added.append((percentile(late[0], 0.99) - percentile(late[1], 0.99)) * 1000)
        await one.close()
        await other.close()
    per_message = together.median(PER_MESSAGE)
    speed, thrift = (ratio(together, apart, figure) for figure in (SPEED, THRIFT))
    return [
        line("ratio", "coalesced_tokens_per_server_cpu_second_vs_one_message_per_token", thrift, ">=5"),
        line("ratio", "coalesced_tokens_per_second_vs_one_message_per_token", speed, ">=5"),
        line("count", "coalesced_p99_delivery_added_ms", statistics.median(added), "<=5"),
        line("info", "coalesced_tokens_per_message", per_message),
        line("info", "coalesced_tokens_per_second", together.median(SPEED), digits=0),
        line("info", "one_message_per_token_tokens_per_second", apart.median(SPEED), digits=0),
    ]


def delays(answers: list[Told]) -> list[float]:
    """Return how long after it was made each token came, in seconds: the mock writes the time as the token's text."""
    from loraline.api.inference.v1 import inference_pb2

    return [
        at - float(stamp)
        for told in answers
        for at, raw in zip(told.arrivals, told.texts, strict=True)
        for stamp in inference_pb2.ChatResponse.FromString(raw).delta.split()
    ]


async def saturated(model: Path, rounds: int) -> list[str]:
    """64 askers, one answer after the other, from an engine faster than any front: ours and vLLM's own."""
    asked = {"askers": STREAMS, "answers": 3, "tokens": 256, "rate": 1000}
    with ExitStack() as stack:
        ours = stack.enter_context(server("ours", model, "--mock"))
        theirs = stack.enter_context(server("vllm", model, "--mock"))
        grpc = GrpcClients(ours.grpc, ours.key)
        http, peer = HttpClients(ours.http, ours.key), HttpClients(theirs.http, "none")
        subjects = [
            over_wire("vllm_http", theirs, peer, **asked),
            over_wire("http", ours, http, **asked),
            over_wire("grpc", ours, grpc, **asked),
        ]
        await take_turns(subjects, rounds)
        http.close()
        peer.close()
        await grpc.close()
        await asyncio.sleep(0.1)
    return [*against_vllm(subjects[1:], subjects[0]), *(text for subject in subjects for text in facts(subject))]


def against_vllm(ours: list[Subject], vllm: Subject) -> list[str]:
    """Return the ratios to vLLM's own front."""
    lines = []
    for subject in ours:
        for what, figure in (("second", SPEED), ("server_cpu_second", THRIFT)):
            name = f"saturated_{subject.name}_tokens_per_{what}_vs_vllm_http"
            lines.append(line("ratio", name, ratio(subject, vllm, figure), ">=1.5"))
    return lines


def facts(subject: Subject) -> list[str]:
    """Return what a saturated front gave."""
    name = f"saturated_{subject.name}"
    return [
        line("info", f"{name}_tokens_per_second", subject.median(SPEED), digits=0),
        line("info", f"{name}_tokens_per_cpu_second", subject.median(THRIFT), digits=0),
        line("info", f"{name}_tokens_per_message", subject.median(PER_MESSAGE), digits=1),
        line("info", f"{name}_p50_first_token_ms", subject.median(lambda r: r.first(0.5)), digits=1),
        line("info", f"{name}_p99_first_token_ms", subject.median(lambda r: r.first(0.99)), digits=1),
    ]
