"""Puts the trainer together."""

from __future__ import annotations

from loraline.api.trainer.v1 import trainer_pb2_grpc
from loraline.core.serving.component import Component, Platform
from loraline.trainer.config import TrainerSettings
from loraline.trainer.metrics import job_metrics
from loraline.trainer.servicer import CREATE_TINY_MODEL, IMPORT_MODEL, TRAIN, TrainerServicer

SERVICE = "loraline.api.trainer.v1.TrainerService"


def build(platform: Platform) -> Component:
    """Return the trainer as a component of a server."""
    servicer = TrainerServicer(platform, TrainerSettings())
    if platform.job_metrics is not None:
        platform.job_metrics.accept(**job_metrics(platform.registry))
    return Component(
        name="trainer",
        services={SERVICE: lambda server: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, server)},
        job_handlers=(TRAIN, IMPORT_MODEL, CREATE_TINY_MODEL),
    )
