"""The inference stage as the server sees it."""

from __future__ import annotations

import grpc.aio

from loraline.api.inference.v1 import inference_pb2_grpc
from loraline.core.serving.component import Component, Platform
from loraline.inference.config import InferenceSettings
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.http.app import create_app
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.profiles.registry import Profiles
from loraline.inference.profiles.relay import Relay
from loraline.inference.readiness import NOTHING_LOADED
from loraline.inference.servicer import InferenceServicer
from loraline.inference.sessions.calls import SessionCalls
from loraline.inference.sessions.metrics import SessionMetrics
from loraline.inference.sessions.store import SessionStore
from loraline.inference.sessions.turns import Sessions

SERVICE = "loraline.api.inference.v1.InferenceService"


def build(platform: Platform, settings: InferenceSettings | None = None) -> Component:
    """Put the stage together. Neither torch nor vLLM is imported until a model is loaded."""
    settings = settings or InferenceSettings()
    metrics = InferenceMetrics(platform.registry)
    host = ModelHost(settings, platform.settings, platform.library, metrics)
    metrics.model_wanted.set_function(lambda: float(host.why_not_ready != NOTHING_LOADED))
    store = SessionStore(platform.database, settings.session_limits())
    sessions = Sessions(store, SessionMetrics(platform.registry, store.count))
    generation = Generation(host, settings, metrics, sessions)

    calls, profiles = SessionCalls(sessions), Profiles.load(settings.profiles_dir)
    relay = Relay(settings.profile_max_streams, settings.profile_reconnect_seconds, settings.profile_heartbeat_seconds)

    async def start() -> None:
        await host.start()
        await sessions.start()

    async def stop() -> None:
        await relay.stop()
        await sessions.stop()
        await host.stop()

    def register(server: grpc.aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(host, generation, calls, profiles), server
        )

    async def not_ready_because() -> str:
        return host.why_not_ready

    return Component(
        name="inference",
        services={SERVICE: register},
        start=start,
        stop=stop,
        not_ready_because=not_ready_because,
        http_app=create_app(generation, calls, profiles, relay) if settings.http_listen else None,
        http_listen=settings.http_listen,
        extra={"host": host, "generation": generation, "sessions": sessions, "profiles": profiles},
    )
