"""Series by adapter: there while the adapter can be asked, gone with it. What alerts wait for begins at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from served_toy import ADAPTER, ask, served_toy

from loraline.core.testing.waiting import until
from loraline.inference.metrics import InferenceMetrics


def _lines(registry: CollectorRegistry) -> list[str]:
    """Our own series: engines that other tests of this process started have left vLLM's behind."""
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if line.startswith("loraline_")]


def test_series_by_adapter_go_with_the_adapter() -> None:
    registry = CollectorRegistry()
    metrics = InferenceMetrics(registry)
    metrics.adapter_answered("mareva:v1", "ok", 0.2)
    metrics.adapter_answered("mareva:v1", "cancelled", 0.1)
    metrics.adapter_answered("harbour:v2", "ok", 0.3)
    requests = 'loraline_inference_adapter_requests_total{adapter="mareva:v1",outcome="ok"} 1.0'
    seconds = 'loraline_inference_adapter_request_seconds_count{adapter="mareva:v1"} 2.0'
    assert requests in _lines(registry)
    assert seconds in _lines(registry)
    metrics.forget_adapter("mareva:v1")
    text = "\n".join(_lines(registry))
    assert "mareva" not in text
    assert 'adapter="harbour:v2"' in text
    metrics.forget_adapters()
    assert "harbour" not in "\n".join(_lines(registry))


def test_refusals_that_page_stand_at_zero_before_the_first() -> None:
    registry = CollectorRegistry()
    InferenceMetrics(registry)
    lines = _lines(registry)
    for result in ("loaded", "PROOF_FAILED", "RECEIPT_MISMATCH"):
        assert f'loraline_inference_adapter_loads_total{{result="{result}"}} 0.0' in lines
    assert 'loraline_inference_engine_restarts_total{cause="died"} 0.0' in lines
    assert 'loraline_inference_refused_total{reason="QUEUE_FULL"} 0.0' in lines


async def test_one_question_counts_as_what_it_was(toy: Any, tmp_path: Path) -> None:
    async with served_toy("transformers", toy.model, tmp_path / "data") as served:
        served.platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"])
        assert await served.chat(ask(model="mareva", max_tokens=2))  # loads and proves it
        counters = {
            "prompt": ("tokens_total", {"direction": "prompt"}),
            "completion": ("tokens_total", {"direction": "completion"}),
            "first tokens": ("time_to_first_token_seconds_count", {}),
            "answered by": ("adapter_requests_total", {"adapter": "mareva:v1", "outcome": "ok"}),
            "asked of": ("requests_total", {"model_kind": "adapter", "outcome": "ok"}),
        }

        def figures() -> dict[str, float]:
            return {
                what: served.metric(f"loraline_inference_{name}", **labels) for what, (name, labels) in counters.items()
            }

        def idle() -> bool:
            return served.metric("loraline_inference_in_flight_requests") == 0

        await until(idle, "the first answer's end")
        before = figures()
        usage = (await served.chat(ask(model="mareva", max_tokens=7)))[-1].usage
        await until(idle, "the answer's end")
        grown = {what: figure - before[what] for what, figure in figures().items()}
        assert grown == {
            "prompt": usage.prompt_tokens,
            "completion": usage.completion_tokens,
            "first tokens": 1,
            "answered by": 1,
            "asked of": 1,
        }
        assert 0 < usage.completion_tokens <= 7 < usage.prompt_tokens
        assert served.metric("loraline_inference_model_load_seconds_count") == 1
