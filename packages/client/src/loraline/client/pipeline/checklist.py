"""The trainer's checklist before a run, told before any time is spent on it."""

from __future__ import annotations

from collections.abc import Callable

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.aio import AsyncLoraline
from loraline.client.errors import LoralineApiError


async def tell_doubts(client: AsyncLoraline, request: trainer_pb2.TrainRequest, remark: Callable[[str], None]) -> None:
    """Remark on what PlanRun doubts about a run. What it refuses is left to Train, whose error says it in full."""
    try:
        plan = await client.trainer.plan(request)
    except LoralineApiError as error:
        if error.unreachable:
            raise
        return  # an older server, or a request that Train refuses in its own words
    for check in plan.checks:
        if not check.passed and check.severity != job_pb2.SEVERITY_ERROR:
            remark(f"{check.message} {check.remedy}".strip())
    needed = plan.memory_bytes.get("total", 0)
    if plan.ok:
        memory = f", about {needed / 1e9:.2f} GB of memory" if needed else ""
        remark(f"planned: {plan.total_steps} steps{memory}")
