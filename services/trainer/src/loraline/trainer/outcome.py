"""What a training job publishes: the adapter, or the model where all weights were trained."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import failed_precondition
from loraline.core.jobs.context import JobContext
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.results import receipt_summary

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "safetensors", "bitsandbytes")


def publish(
    context: JobContext,
    request: pb.TrainRequest,
    base: ResolvedBase,
    references: list[artifact_pb2.ArtifactRef],
    finished: FinishedRun,
) -> artifact_pb2.Artifact:
    """Publish what the run made under the run's name."""
    whole = request.method == pb.METHOD_FULL
    inputs = [*references, *([base.model.artifact] if base.model.HasField("artifact") else [])]
    if request.HasField("init_adapter"):
        inputs.append(request.init_adapter)
    return context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL if whole else artifact_pb2.ARTIFACT_KIND_ADAPTER,
        request.name,
        finished.folder,
        inputs=inputs,
        settings=as_dict(request),
        facts=_facts(request, base, finished, whole=whole),
        library_versions=library_versions(),
    )


def _facts(request: pb.TrainRequest, base: ResolvedBase, finished: FinishedRun, *, whole: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "base_model": base.label,
        "final_loss": finished.figures["loss"],
        "token_accuracy": finished.figures["token_accuracy"],
        "rows": finished.receipt.counts.rows,
        "quantization": finished.precision.quantization,
        "dtype": finished.precision.saved if whole else finished.precision.dtype,
        "receipt": json_format.MessageToDict(receipt_summary(finished.receipt)),
    }
    if whole:
        facts["parameters"] = count_parameters(finished.folder)
    else:
        facts |= {"rank": request.parameters.lora.r, "target_modules": finished.target_modules}
    if finished.rejected is not None:
        facts["rejected_receipt"] = json_format.MessageToDict(receipt_summary(finished.rejected))
    return facts | {name: finished.figures[name] for name in _WHERE_MEASURED if name in finished.figures}


_WHERE_MEASURED = ("eval_loss", "reward_accuracy", "reward_margin")


def count_parameters(folder: Path) -> int:
    """Count weights from the safetensors headers."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:  # type: ignore[no-untyped-call]
                for name in weights.keys():  # noqa: SIM118  (not a dict)
                    count = 1
                    for size in weights.get_slice(name).get_shape():
                        count *= size
                    total += count
        except (SafetensorError, OSError) as error:
            message = f"{file.name} is no readable safetensors file ({error}). Fetch it again."
            raise failed_precondition("MODEL_UNREADABLE", message, file=file.name) from error
    return total


def as_dict(message: Any) -> dict[str, Any]:
    """Return a message as its fields are called in the contract."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that a training depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
