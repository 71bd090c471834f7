"""What a request to continue a run asks for otherwise than the run was trained with."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.spec import resolve

_OF_THE_ADAPTER = ("r", "alpha", "rslora")
_MODULES = ("target_modules", "modules_to_save")
_FREE = {"epochs", "max_steps", "save_steps", "keep_checkpoints", "report_to", "lora"}
"""Parameters that may change without another word; those of lora are looked at one by one."""


def another_run(before: pb.TrainRequest, now: pb.TrainRequest) -> LoralineError | None:
    """Return FAILED_PRECONDITION (CONTINUE_DIFFERS) where a checkpoint of `before` cannot be gone on from as `now`.

    Those are the base, the method, the objective and the adapter's shape. None as well when `before` is not known.
    """
    if not before.name:
        return None
    one, other = resolve(before), resolve(now)
    found = _changed_enums(one, other) | _changed_base(one.base_model, other.base_model)
    if one.method == other.method:
        found |= _changed_shape(one.parameters.lora, other.parameters.lora)
    if not found:
        return None
    message = (
        f"The run {now.name} was trained otherwise: {_listed(found)}. "
        "Its checkpoint holds the state of that very training. "
        "Set these as they were, or start anew with existing_run BACKUP_AND_RESTART."
    )
    return failed_precondition("CONTINUE_DIFFERS", message, fields=",".join(found))


def told_differences(before: pb.TrainRequest, now: pb.TrainRequest) -> str:
    """Return what differs of the data and the settings, for people; empty when nothing does, or nothing is known."""
    if not before.name:
        return ""
    one, other = resolve(before), resolve(now)
    found: dict[str, tuple[Any, Any]] = {}
    for field in pb.TrainingParameters.DESCRIPTOR.fields:
        was, wanted = getattr(one.parameters, field.name), getattr(other.parameters, field.name)
        if field.name not in _FREE and was != wanted:
            found[f"parameters.{field.name}"] = (_word(field, was), _word(field, wanted))
    if one.parameters.lora.dropout != other.parameters.lora.dropout:
        found["parameters.lora.dropout"] = (one.parameters.lora.dropout, other.parameters.lora.dropout)
    if one.validation_fraction != other.validation_fraction:
        found["validation_fraction"] = (one.validation_fraction, other.validation_fraction)
    if _datasets(one) != _datasets(other):
        found["datasets"] = (_datasets(one), _datasets(other))
    return f"continued otherwise than it was begun: {_listed(found)}" if found else ""


def _listed(found: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{field} was {was}, now {wanted}" for field, (was, wanted) in found.items())


def _changed_enums(one: pb.TrainRequest, other: pb.TrainRequest) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    if one.method != other.method:
        found["method"] = (pb.Method.Name(one.method), pb.Method.Name(other.method))
    if one.objective != other.objective:
        found["objective"] = (pb.Objective.Name(one.objective), pb.Objective.Name(other.objective))
    return found


def _changed_base(one: pb.BaseModel, other: pb.BaseModel) -> dict[str, tuple[Any, Any]]:
    """Compare names only where both say in the same way what they mean: a path may hold the very model of a Hub id."""
    source = one.WhichOneof("source")
    if source != other.WhichOneof("source") or source is None:
        return {}
    if source == "artifact":
        was, wanted = format_ref(one.artifact), format_ref(other.artifact)
    elif source == "hub_id":
        was, wanted = one.hub_id, other.hub_id
        if one.revision and other.revision:
            was, wanted = f"{was}@{one.revision}", f"{wanted}@{other.revision}"
    else:
        was, wanted = one.path, other.path
        if PurePath(was).name == PurePath(wanted).name:  # another machine keeps its models elsewhere
            return {}
    return {"base_model": (was, wanted)} if was != wanted else {}


def _changed_shape(one: pb.LoraParameters, other: pb.LoraParameters) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for name in _OF_THE_ADAPTER:
        was, wanted = getattr(one, name), getattr(other, name)
        if was != wanted:
            found[f"parameters.lora.{name}"] = (was, wanted)
    for name in _MODULES:
        was, wanted = sorted(getattr(one, name)), sorted(getattr(other, name))
        if was != wanted:
            found[f"parameters.lora.{name}"] = (",".join(was) or "the default", ",".join(wanted) or "the default")
    return found


def _datasets(request: pb.TrainRequest) -> str:
    return ", ".join(f"{format_ref(one.ref)} × {one.weight:g}" for one in request.datasets)


def _word(field: Any, value: Any) -> Any:
    return field.enum_type.values_by_number[value].name if field.enum_type else value
