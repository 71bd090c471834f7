"""Protobuf messages to and from the stage's own types."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from google.protobuf import timestamp_pb2
from google.protobuf.duration_pb2 import Duration

from loraline.api.inference.v1 import inference_pb2
from loraline.core.diagnostics.catalog import LANGUAGES
from loraline.core.errors import invalid_argument
from loraline.core.preflight import Finding
from loraline.core.private_paths import without_private_paths
from loraline.core.structs import json_value
from loraline.inference.adapters.registry import ServedAdapter
from loraline.inference.engines.port import Constraint, Sampling
from loraline.inference.generation import Figures
from loraline.inference.serving import Serving

DEFAULT_MAX_TOKENS = 256
DEFAULT_TEMPERATURE = 0.7
FINISH = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}


def sampling_of(message: inference_pb2.SamplingParameters, most_tokens: int) -> Sampling:
    """Read sampling parameters; what is unset gets the contract's defaults, within the server's `most_tokens`."""
    return Sampling(
        max_tokens=message.max_tokens or min(DEFAULT_MAX_TOKENS, most_tokens),
        temperature=message.temperature if message.HasField("temperature") else DEFAULT_TEMPERATURE,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        stop=tuple(message.stop),
        seed=message.seed if message.HasField("seed") else None,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        n=message.n or 1,
    )


def constraint_of(message: inference_pb2.StructuredOutput) -> Constraint | None:
    """Read the shape of the answer; None when none is asked for."""
    shape = message.WhichOneof("shape")
    if shape == "json_schema":
        return Constraint("json_schema", json_value(message.json_schema))
    if shape == "choices":
        return Constraint("choices", list(message.choices.values))
    if shape in ("regex", "grammar"):
        text = getattr(message, shape)
        if not text:
            raise invalid_argument(
                "STRUCTURE_INVALID", f"structured.{shape} is empty.", **{f"structured__{shape}": "empty"}
            )
        return Constraint("regex" if shape == "regex" else "grammar", text)
    return Constraint("json_object") if shape == "json_only" and message.json_only else None


def usage_of(figures: Figures) -> inference_pb2.Usage:
    """Return token counts."""
    return inference_pb2.Usage(prompt_tokens=figures.prompt_tokens, completion_tokens=figures.completion_tokens)


def timings_of(figures: Figures) -> inference_pb2.Timings:
    """Return times."""
    return inference_pb2.Timings(
        queue=_duration(figures.queue_seconds),
        first_token=_duration(figures.first_token_seconds),
        total=_duration(figures.total_seconds),
    )


def base_message(serving: Serving) -> inference_pb2.ServedModel:
    """Describe the served base."""
    message = inference_pb2.ServedModel(
        name=serving.name,
        kind=inference_pb2.SERVED_KIND_BASE,
        load_time=_time(serving.load_time),
        resident=True,
    )
    if serving.base.artifact is not None:
        message.artifact.CopyFrom(serving.base.artifact)
    if serving.proof is not None:
        message.proof.CopyFrom(serving.proof.to_message())
    return message


def describe_engine(answer: inference_pb2.GetCapabilitiesResponse, serving: Serving) -> None:
    """Put what the running engine can take in place of what the settings promise."""
    facts = serving.engine.facts
    answer.contract.max_lora_rank = facts.max_lora_rank
    answer.contract.target_modules.extend(facts.target_modules)
    answer.contract.vocab_size = facts.vocab_size
    answer.contract.dtype = facts.dtype
    answer.contract.max_model_len = answer.max_model_len = facts.max_model_len
    answer.engine, answer.engine_version = facts.engine, facts.version
    answer.max_loaded_adapters = facts.max_loaded_adapters
    answer.base.CopyFrom(base_message(serving))
    answer.chat_template_sha256 = serving.chat_format.template_sha256


def diagnosis_message(finding: Finding) -> inference_pb2.Diagnosis:
    """Tell a problem in every language that the diagnostics know."""
    return inference_pb2.Diagnosis(
        reason=finding.reason,
        message=without_private_paths(finding.said),
        explanations={language: finding.explained(language) for language in LANGUAGES},
    )


def adapter_message(adapter: ServedAdapter, aliases: Iterable[str]) -> inference_pb2.ServedModel:
    """Describe an adapter."""
    return inference_pb2.ServedModel(
        name=adapter.name,
        kind=inference_pb2.SERVED_KIND_ADAPTER,
        artifact=adapter.ref,
        internal_name=adapter.internal,
        aliases=sorted(aliases),
        load_time=_time(adapter.load_time),
        proof=adapter.proof.to_message(),
        lora_rank=adapter.rank,
        resident=adapter.resident,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


def _time(value: object) -> timestamp_pb2.Timestamp:
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(value)  # type: ignore[arg-type]
    return stamp
