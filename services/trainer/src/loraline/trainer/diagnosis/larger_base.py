"""The advice to take a larger base, as one that is there: the smallest in the store that is clearly larger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from loraline.api.artifact.v1.artifact_pb2 import (
    ARTIFACT_KIND_ADAPTER,
    ARTIFACT_KIND_DATASET,
    ARTIFACT_KIND_MODEL,
    Artifact,
    ArtifactRef,
)
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.errors import LoralineError
from loraline.core.structs import json_value
from loraline.trainer.diagnosis.advice import HIGHEST_RANK
from loraline.trainer.diagnosis.judging import Judgement
from loraline.trainer.outcome import count_parameters

_TUNING = (ARTIFACT_KIND_MODEL, ARTIFACT_KIND_ADAPTER, ARTIFACT_KIND_DATASET)
_CLEARLY = 1.5
"""A base counts as larger from so many times the parameters on."""


def models_in(library: ArtifactLibrary) -> list[Artifact]:
    """Return the newest models of the store whose size is known."""
    found, _ = library.list(kind=ARTIFACT_KIND_MODEL, page_size=500)
    return [artifact for artifact in found if _size(artifact)]


def larger_base(
    judgement: Judgement, parameters: pb.TrainingParameters, base: pb.BaseModel, models: Sequence[Artifact]
) -> ArtifactRef | None:
    """Return a base to run next on, where the loss has settled too high and more rank or steps would not help.

    None where it has not, where the run's own base has no known size, and where no larger one is among `models`. What
    was merged or trained from others is not advised: it would bring their tuning with it.
    """
    high = judgement.verdict in (pb.VERDICT_UNDERTRAINED, pb.VERDICT_FAIR)
    if not (judgement.settled and high) or (parameters.HasField("lora") and parameters.lora.r < HIGHEST_RANK):
        return None
    own = _own_size(base, models)
    bases = [artifact for artifact in models if not any(one.kind in _TUNING for one in artifact.inputs)]
    larger = [artifact for artifact in bases if own and _size(artifact) >= _CLEARLY * own]
    return min(larger, key=_size).ref if larger else None


def _own_size(base: pb.BaseModel, models: Iterable[Artifact]) -> int:
    """Return the parameters of a run's base; 0 where they are not known here."""
    if base.HasField("path"):
        try:
            return count_parameters(Path(base.path))
        except LoralineError:
            return 0
    if base.HasField("artifact"):
        return next((_size(artifact) for artifact in models if artifact.ref == base.artifact), 0)
    return next((_size(one) for one in models if json_value(one.facts).get("source") == base.hub_id), 0)


def _size(artifact: Artifact) -> int:
    return int(json_value(artifact.facts).get("parameters") or 0)
