"""Answers that other jobs have paid for, taken into a run before it asks anything itself.

A job that failed, was cancelled, or whose dataset the gate refused has left its answers in its ledger. A new job whose
requests are decided by the same things (endpoint, model, recipe, seeds, name of the source: its plan) takes them over,
call by call, whatever number of rows or candidates it wants itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraline.datagen.llms.endpoint import Endpoint
from loraline.datagen.llms.ledger import CallRecord

if TYPE_CHECKING:
    from loraline.datagen.llms.generate import LlmRun

AT_ONCE = 64


def plan_of(endpoint: Endpoint, prompting: str, name: str) -> str:
    """Return the digest of what decides a run's requests: where they go, what they say, and which source it is.

    The name counts because two equal sources of one dataset shall not be given the same answers.
    """
    told = "\n".join((endpoint.shown_url, endpoint.model, name, prompting))
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()


async def reuse_answers(run: LlmRun) -> int:
    """Take in what other jobs have paid for; return the number of answers."""
    taken, records = 0, _new_ones(run)
    while batch := _next_batch(run, records):
        run.hooks.check_stop()
        await asyncio.gather(*(run.record(record) for record in batch))
        taken += len(batch)
    return taken


def _new_ones(run: LlmRun) -> Iterator[CallRecord]:
    """Yield one recorded answer for each call number that the run has not come to yet."""
    for record in run.ledger.known(run.plans, run.next_call):
        if record.call >= run.next_call:
            run.next_call = record.call + 1
            # Its price was paid before; counting it again would spend this job's budget on nothing.
            yield dataclasses.replace(record, cost=0.0, prompt_tokens=0, completion_tokens=0)


def _next_batch(run: LlmRun, records: Iterator[CallRecord]) -> list[CallRecord]:
    batch: list[CallRecord] = []
    size = 0
    while len(batch) < AT_ONCE and size < run.room():
        record = next(records, None)
        if record is None:
            break
        batch.append(record)
        size += record.size
    return batch
