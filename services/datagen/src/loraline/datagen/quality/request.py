"""The gate of a request: checked, and turned into the rules' settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, invalid_argument
from loraline.datagen.quality.gate import Gate
from loraline.datagen.quality.settings import SIMILARITY, CheckSettings, Forbidden, Language, check_language
from loraline.datagen.quality.tokenizer import broken_tokenizer

TOKENIZER = "tokenizer.json"
_FORMATS: dict[int, Literal["newline", "json"]] = {
    datagen_pb2.OUTPUT_FORMAT_NEWLINE: "newline",
    datagen_pb2.OUTPUT_FORMAT_JSON: "json",
}
FORBIDDEN: dict[int, Forbidden] = {
    datagen_pb2.FORBIDDEN_TEXT_LATIN: "latin",
    datagen_pb2.FORBIDDEN_TEXT_DIGITS: "digits",
    datagen_pb2.FORBIDDEN_TEXT_EMOJI: "emoji",
    datagen_pb2.FORBIDDEN_TEXT_MARKDOWN: "markdown",
}


def gate_of(gate: datagen_pb2.QualityGate) -> Gate:
    """Return the checked gate; INVALID_ARGUMENT names the field that is wrong."""
    check_language(gate.language, "gate.language")
    _check_base_model(gate)
    _check_schema(gate)
    checked = Gate(frozenset(gate.refuse_codes), frozenset(gate.allow_codes), gate.drop_duplicates)
    checked.check_codes()
    return checked


def _check_base_model(gate: datagen_pb2.QualityGate) -> None:
    if gate.max_length and not gate.HasField("base_model"):
        raise invalid_argument(
            "BASE_MODEL_MISSING", "gate.max_length counts tokens, and gate.base_model does not say of which tokenizer. "
            "Name the base model.", gate__base_model="needed with max_length",
        )  # fmt: skip
    if gate.HasField("base_model") and gate.base_model.kind != artifact_pb2.ARTIFACT_KIND_MODEL:
        raise invalid_argument(
            "ARTIFACT_KIND_WRONG", "gate.base_model must be a model; `loraline models pull` brings one into the store.",
            gate__base_model__kind="must be ARTIFACT_KIND_MODEL",
        )  # fmt: skip


def _check_schema(gate: datagen_pb2.QualityGate) -> None:
    if not gate.HasField("answer_schema"):
        return
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(json_format.MessageToDict(gate.answer_schema))
    except SchemaError as error:
        raise invalid_argument(
            "ANSWER_SCHEMA_INVALID", f"gate.answer_schema is no JSON schema: {error.message}. Correct it.",
            gate__answer_schema=error.message,
        ) from error  # fmt: skip


def settings_of(gate: datagen_pb2.QualityGate, library: ArtifactLibrary) -> CheckSettings:
    """Return what the rules check against; brings the tokenizer, and nothing else of the base model, here."""
    return CheckSettings(
        language=cast(Language, gate.language),
        forbid=frozenset(FORBIDDEN[text] for text in gate.forbid),
        answer_format=_FORMATS.get(gate.answer_format, ""),
        answer_schema=json_format.MessageToDict(gate.answer_schema) if gate.HasField("answer_schema") else None,
        max_response_characters=gate.max_response_characters,
        max_length=gate.max_length,
        tokenizer=_tokenizer(gate.base_model, library) if gate.HasField("base_model") else None,
        similarity=gate.near_duplicate_similarity or SIMILARITY,
    )


def for_recipe(settings: CheckSettings, recipe: datagen_pb2.LlmRecipe) -> CheckSettings:
    """Return the settings for the rows of one recipe: its own language unless the gate names one."""
    return replace(
        settings, forbid=settings.forbid | {FORBIDDEN[text] for text in recipe.forbid},
        language=settings.language or cast(Language, recipe.language),
    )  # fmt: skip


def _tokenizer(base_model: artifact_pb2.ArtifactRef, library: ArtifactLibrary) -> Path:
    try:
        return library.fetch(base_model, paths=(TOKENIZER,)) / TOKENIZER
    except LoralineError as error:
        if error.reason != "FILE_NOT_FOUND":
            raise
        raise broken_tokenizer(f"{format_ref(base_model)} has no {TOKENIZER}") from error


def resolve_base_model(gate: datagen_pb2.QualityGate, library: ArtifactLibrary) -> None:
    """Make gate.base_model exact, so that the job reads what was there when the call was accepted.

    FAILED_PRECONDITION for one without a tokenizer.json.
    """
    if not gate.HasField("base_model"):
        return
    gate.base_model.CopyFrom(library.resolve(gate.base_model))
    if not any(file.path == TOKENIZER for file in library.get(gate.base_model).files):
        raise broken_tokenizer(f"{format_ref(gate.base_model)} has no {TOKENIZER}")
