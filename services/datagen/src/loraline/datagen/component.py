"""Datagen as a part of a server."""

from __future__ import annotations

from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.core.serving.component import Component, Platform
from loraline.datagen.config import DatagenSettings
from loraline.datagen.metrics import job_metrics
from loraline.datagen.servicer import HANDLERS, DatagenServicer

SERVICE = datagen_pb2.DESCRIPTOR.services_by_name["DatagenService"].full_name


def build(platform: Platform) -> Component:
    """Return the stage, ready to be served alone or beside others."""
    servicer = DatagenServicer(platform, DatagenSettings())
    if platform.job_metrics is not None:
        platform.job_metrics.accept(**job_metrics(platform.registry))
    return Component(
        name="datagen",
        services={SERVICE: lambda server: datagen_pb2_grpc.add_DatagenServiceServicer_to_server(servicer, server)},
        job_handlers=HANDLERS,
    )
