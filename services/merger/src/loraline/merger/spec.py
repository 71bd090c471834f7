"""The requests as the job understands them: defaults filled in, unsupported parts refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.api.merger.v1 import merger_pb2
from loraline.core.errors import LoralineError, invalid_argument
from loraline.merger.exports.modelfile import parameters_of

Dtype = Literal["", "bf16", "fp16", "fp32"]
MergeBaseChoice = Literal["original", "dequantized", "measured"]
CombineChoice = Literal["linear", "ties", "dare"]
_MERGE_BASES: dict[int, MergeBaseChoice] = {
    merger_pb2.MERGE_BASE_ORIGINAL: "original",
    merger_pb2.MERGE_BASE_DEQUANTIZED: "dequantized",
}
_COMBINE: dict[int, CombineChoice] = {
    merger_pb2.COMBINE_METHOD_TIES: "ties",
    merger_pb2.COMBINE_METHOD_DARE: "dare",
}
MAX_KL = 0.01
"""Default bound of the mean KL divergence, in nats."""
MAX_DIFF_FP32 = 0.05
"""Default bound of a log-probability's difference for fp32 results, in nats."""
MAX_DIFF_16BIT = 0.25
"""The same for 16-bit results."""


@dataclass(frozen=True)
class MergeBounds:
    """Above these nothing is published; in nats. A zero difference bound means the default of the result's type."""

    max_kl: float = MAX_KL
    max_diff: float = 0.0

    def max_diff_for(self, dtype: str) -> float:
        """Return the bound of a log-probability's difference for a result of this type."""
        return self.max_diff or (MAX_DIFF_FP32 if dtype == "fp32" else MAX_DIFF_16BIT)


@dataclass(frozen=True)
class MeasureSettings:
    """How much is measured, and in which type."""

    tokens: int = 512
    length: int = 2048
    dtype: str = "float32"


@dataclass(frozen=True)
class MergeSpec:
    """A merge."""

    name: str
    adapters: tuple[tuple[ArtifactRef, float], ...]
    base: ArtifactRef | None
    dtype: Dtype
    bounds: MergeBounds
    merge_base: MergeBaseChoice
    combine: CombineChoice
    density: float


# Format -> (its name in the contract, greatest difference, greatest mean KL) in nats, unless the caller says otherwise.
EXPORT_FORMATS: dict[int, tuple[str, float, float]] = {
    merger_pb2.EXPORT_FORMAT_OLLAMA: ("ollama", 0.25, 0.01),
    merger_pb2.EXPORT_FORMAT_GGUF_F16: ("gguf_f16", 0.25, 0.01),
    merger_pb2.EXPORT_FORMAT_GGUF_Q8_0: ("gguf_q8_0", 1.0, 0.02),
    merger_pb2.EXPORT_FORMAT_FP8: ("fp8", 2.0, 0.1),
    merger_pb2.EXPORT_FORMAT_INT8: ("int8", 2.0, 0.1),
}


@dataclass(frozen=True)
class ExportSpec:
    """An export."""

    name: str
    format: str
    bounds: MergeBounds
    system_prompt: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def export_spec(request: merger_pb2.ExportModelRequest) -> ExportSpec:
    """Read an ExportModelRequest. Raises INVALID_ARGUMENT for wrong kinds and for parameters of no runtime."""
    require_kind(request.model, artifact_pb2.ARTIFACT_KIND_MODEL, "model")
    if request.format not in EXPORT_FORMATS:
        raise invalid_argument("EXPORT_FORMAT_UNKNOWN", f"format {request.format} is none that this server writes.")
    name, diff, kl = EXPORT_FORMATS[request.format]
    bounds = MergeBounds(request.max_kl or kl, request.max_abs_logprob_diff or diff)
    parameters = MessageToDict(request.parameters) if request.HasField("parameters") else {}
    parameters_of(parameters, {}, ())
    return ExportSpec(request.name, name, bounds, request.system_prompt, parameters)


def merge_spec(request: merger_pb2.MergeRequest) -> MergeSpec:
    """Read a MergeRequest. Raises INVALID_ARGUMENT for wrong kinds and UNIMPLEMENTED for parts not served yet."""
    if not request.adapters:
        raise invalid_argument("ADAPTERS_MISSING", "Name at least one adapter.", adapters="at least one")
    for number, adapter in enumerate(request.adapters):
        require_kind(adapter.ref, artifact_pb2.ARTIFACT_KIND_ADAPTER, f"adapters[{number}].ref")
        if adapter.HasField("weight") and not abs(adapter.weight) < 1e6:
            raise invalid_argument(
                "WEIGHT_INVALID", f"Weight {adapter.weight} of adapter {number} is no usable number."
            )
    base = request.base_model if request.HasField("base_model") else None
    if base is not None:
        require_kind(base, artifact_pb2.ARTIFACT_KIND_MODEL, "base_model")
    combine = _COMBINE.get(request.combine, "linear")
    if request.density and combine == "linear":
        raise invalid_argument("DENSITY_UNUSED", "density has a meaning for TIES and DARE only; leave it 0.")
    if combine != "linear" and len(request.adapters) == 1:
        raise invalid_argument("ADAPTERS_MISSING", "TIES and DARE combine several adapters; name at least two.")
    weights = [(a.ref, a.weight if a.HasField("weight") else 1.0) for a in request.adapters]
    bounds = MergeBounds(request.max_kl or MAX_KL, request.max_abs_logprob_diff)
    choice = _MERGE_BASES.get(request.merge_base, "measured")
    dtype: Any = request.dtype
    return MergeSpec(request.name, tuple(weights), base, dtype, bounds, choice, combine, request.density)


def require_kind(ref: ArtifactRef, kind: int, field: str) -> None:
    """INVALID_ARGUMENT when a reference is of another kind."""
    if ref.kind != kind:
        raise wrong_kind(field, artifact_pb2.ArtifactKind.Name(kind), artifact_pb2.ArtifactKind.Name(ref.kind))  # type: ignore[arg-type]


def wrong_kind(field: str, wanted: str, found: str) -> LoralineError:
    """INVALID_ARGUMENT that names the field."""
    text = f"must be of kind {wanted}, is {found}"
    error = invalid_argument("WRONG_ARTIFACT_KIND", f"{field} {text}.")
    error.fields[field] = text
    return error
