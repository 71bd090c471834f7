"""The merger stage as the server sees it."""

from __future__ import annotations

import grpc.aio

from loraline.api.merger.v1 import merger_pb2_grpc
from loraline.core.serving.component import Component, Platform
from loraline.merger.metrics import MergerMetrics, declare_counters
from loraline.merger.servicer import HANDLERS, MergerServicer

SERVICE = "loraline.api.merger.v1.MergerService"


def build(platform: Platform) -> Component:
    """Put the stage together. torch is imported in the jobs' processes only."""
    servicer = MergerServicer(platform.library, platform.jobs, platform.settings)
    platform.registry.register(MergerMetrics(platform.database))
    declare_counters(platform.job_metrics, platform.registry)

    def register(server: grpc.aio.Server) -> None:
        merger_pb2_grpc.add_MergerServiceServicer_to_server(servicer, server)

    return Component(name="merger", services={SERVICE: register}, job_handlers=HANDLERS)
