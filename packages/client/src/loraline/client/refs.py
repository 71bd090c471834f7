"""Artifact references as text: `adapter/mareva:v3`, `adapter/mareva@production`, `adapter/mareva`."""

from __future__ import annotations

import re

import grpc

from loraline.api.artifact.v1 import artifact_pb2
from loraline.client.errors import LoralineApiError

KINDS: dict[str, artifact_pb2.ArtifactKind.ValueType] = {
    "source": artifact_pb2.ARTIFACT_KIND_SOURCE,
    "dataset": artifact_pb2.ARTIFACT_KIND_DATASET,
    "adapter": artifact_pb2.ARTIFACT_KIND_ADAPTER,
    "model": artifact_pb2.ARTIFACT_KIND_MODEL,
    "checkpoint": artifact_pb2.ARTIFACT_KIND_CHECKPOINT,
    "report": artifact_pb2.ARTIFACT_KIND_REPORT,
}
"""Kinds by the word that people write."""

_NAMES = {number: word for word, number in KINDS.items()}
_REF = re.compile(
    r"(?:(?P<kind>[a-z]+)/)?(?P<name>[a-z0-9][a-z0-9._-]{0,63})"
    r"(?::v(?P<version>[1-9][0-9]*)|@(?P<alias>[a-z][a-z0-9._-]{0,63}))?"
)


def kind_name(kind: int) -> str:
    """Return the word for a kind; `unknown` for a kind that this client does not know."""
    return _NAMES.get(kind, "unknown")  # type: ignore[call-overload]


def parse_kind(word: str) -> artifact_pb2.ArtifactKind.ValueType:
    """Return the kind for a word, singular or plural; INVALID_ARGUMENT names the words there are."""
    kind = KINDS.get(word) or KINDS.get(word.removesuffix("s"))
    if kind is None:
        raise LoralineApiError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_KIND",
            f"There is no artifact kind {word!r}. The kinds are: {', '.join(KINDS)}.",
        )
    return kind


def parse_ref(text: str, default_kind: str = "") -> artifact_pb2.ArtifactRef:
    """Return the reference that a text means.

    `default_kind` is used for texts without a kind, such as `mareva:v3`; without it such texts are refused with
    INVALID_ARGUMENT, and so is everything else that is no reference.
    """
    match = _REF.fullmatch(text.strip())
    kind = (match["kind"] or default_kind) if match else ""
    if match is None or not kind:
        raise LoralineApiError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_REFERENCE",
            f"{text!r} is no artifact reference. Write kind/name, kind/name:v3 or kind/name@alias, "
            "such as adapter/mareva@production.",
        )
    ref = artifact_pb2.ArtifactRef(kind=parse_kind(kind), name=match["name"])
    if match["version"]:
        ref.version = int(match["version"])
    elif match["alias"]:
        ref.alias = match["alias"]
    return ref


def format_ref(ref: artifact_pb2.ArtifactRef) -> str:
    """Return a reference as people write it; the digest is left out."""
    text = f"{kind_name(ref.kind)}/{ref.name}"
    which = ref.WhichOneof("selector")
    if which == "version":
        return f"{text}:v{ref.version}"
    return f"{text}@{ref.alias}" if which == "alias" else text
