"""`loraline_inference_model_wanted`, for which InferenceNotReady waits: what was asked for, not what is there."""

from __future__ import annotations

from typing import Any

import pytest
from counting_engine import TOY, CountingChoice, CountingEngine, until
from prometheus_client import generate_latest

from loraline.core.errors import LoralineError
from loraline.core.serving.component import Component, Platform
from loraline.inference.component import build
from loraline.inference.config import InferenceSettings
from loraline.inference.host import ModelHost

pytestmark = pytest.mark.asyncio


def stage(platform: Platform, **settings: Any) -> tuple[Component, ModelHost]:
    """Put the stage together as the server does, on the counting engine."""
    component = build(platform, InferenceSettings(http_listen="", restart_backoff_seconds=0.05, **settings))
    host: ModelHost = component.extra["host"]
    host._choose = lambda _: CountingChoice("transformers", "test")
    return component, host


def wanted(platform: Platform) -> float:
    value = platform.registry.get_sample_value("loraline_inference_model_wanted")
    assert value is not None, generate_latest(platform.registry).decode()
    return value


async def test_a_server_that_nobody_asked_for_a_model_wants_none(platform: Platform, toy: Any) -> None:
    component, host = stage(platform)
    assert component.start and component.stop
    await component.start()
    try:
        assert (wanted(platform), bool(host.why_not_ready)) == (0.0, True)
        await host.load_model(TOY)
        assert (wanted(platform), host.why_not_ready) == (1.0, "")
    finally:
        await component.stop()


async def test_a_model_that_failed_to_load_is_wanted_still(
    platform: Platform, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingEngine, "fail_folder", "toy")
    component, host = stage(platform, model="model/toy:v1")
    assert component.start and component.stop
    await component.start()
    try:
        assert wanted(platform) == 1.0, "it is loading"
        await until(lambda: "out of memory" in host.why_not_ready)
        assert wanted(platform) == 1.0
        with pytest.raises(LoralineError):
            host.serving()
    finally:
        await component.stop()
