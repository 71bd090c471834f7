"""Streams of events without an engine: their number, size and silence are bounded. And texts that no schema bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraline.core.errors import LoralineError
from loraline.inference.profiles.profile import LONGEST_TEXT, read_profile
from loraline.inference.profiles.relay import HEARTBEAT, Relay
from loraline.inference.profiles.streaming import Event

pytestmark = pytest.mark.asyncio


async def events(gate: asyncio.Event, *given: Event) -> AsyncGenerator[Event, None]:
    await gate.wait()
    for event in given:
        yield event


def opened() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


async def test_silence_is_filled_with_comments_and_news_come_between() -> None:
    relay, gate = Relay(2, 5, 0.02), asyncio.Event()
    stream = relay.open("anna", events(gate, Event("boat", 1), Event("close", {})))
    seen: list[bytes] = []
    async for frame in relay.read(stream):
        seen.append(frame)
        if len(seen) == 3:
            gate.set()
    news = [frame for frame in seen if frame != HEARTBEAT]
    assert seen[:3] == [HEARTBEAT] * 3
    assert HEARTBEAT.startswith(b":")  # a comment to every reader of events
    assert [frame.split(b"\n")[1] for frame in news] == [b"event: boat", b"event: close"]
    await relay.stop()


async def test_a_full_relay_refuses_until_one_has_ended_and_was_read() -> None:
    relay, gate = Relay(2, 5, 1), asyncio.Event()
    first = relay.open("anna", events(gate, Event("close", 1)))
    second = relay.open("ben", events(gate, Event("close", 2)))
    refused = events(opened(), Event("close", 3))
    with pytest.raises(LoralineError) as full:
        relay.open("cleo", refused)
    assert (full.value.code, full.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAMS_FULL")
    assert full.value.retry_after is not None
    assert len(relay) == 2
    gate.set()
    async for _ in relay.read(first):
        pass
    await second.begun(5)
    third = relay.open("cleo", refused)  # in the place of one that ended and has no reader
    assert len(relay) == 2
    frames = [frame async for frame in relay.read(third)]
    assert frames[0].startswith(b"id: ")
    await relay.stop()


async def test_a_stream_that_grows_too_large_ends_with_an_error() -> None:
    relay = Relay(1, 5, 1)
    stream = relay.open("anna", events(opened(), *(Event("boat", "x" * 300_000) for _ in range(9))))
    frames = [frame async for frame in relay.read(stream)]
    assert len(frames) == 5
    assert b"event: error" in frames[-1]
    assert b"stream_too_large" in frames[-1]
    await relay.stop()


async def test_texts_of_a_profile_that_nothing_bounds_are_bounded(tmp_path: Path) -> None:
    text = """
name: loose
description: d
answer:
  type: object
  properties:
    type: {type: string}
    kind: {enum: [a, b]}
    code: {type: string, pattern: "^[a-z]+$"}
    short: {type: string, maxLength: 3}
    list: {type: array, items: {type: [string, "null"]}}
    either: {anyOf: [{type: string}, {type: integer}]}
    default: {type: object, default: {type: string}}
"""
    (tmp_path / "loose.yaml").write_text(text, encoding="utf-8")
    found: dict[str, Any] = read_profile(tmp_path / "loose.yaml").answer["properties"]
    assert found["type"] == {"type": "string", "maxLength": LONGEST_TEXT}
    assert found["list"]["items"]["maxLength"] == LONGEST_TEXT
    assert found["either"]["anyOf"] == [{"type": "string", "maxLength": LONGEST_TEXT}, {"type": "integer"}]
    assert found["short"] == {"type": "string", "maxLength": 3}
    assert found["kind"] == {"enum": ["a", "b"]}
    assert "maxLength" not in found["code"]
    assert found["default"] == {"type": "object", "default": {"type": "string"}}
