"""References to artifacts, and how people write them: `adapter/mareva:v3`, `adapter/mareva@production`."""

from __future__ import annotations

import re

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactKind, ArtifactRef
from loraline.core.errors import invalid_argument

KIND_NAMES: dict[int, str] = {
    artifact_pb2.ARTIFACT_KIND_SOURCE: "source",
    artifact_pb2.ARTIFACT_KIND_DATASET: "dataset",
    artifact_pb2.ARTIFACT_KIND_ADAPTER: "adapter",
    artifact_pb2.ARTIFACT_KIND_MODEL: "model",
    artifact_pb2.ARTIFACT_KIND_CHECKPOINT: "checkpoint",
    artifact_pb2.ARTIFACT_KIND_REPORT: "report",
}
"""Kind -> its word in references; the folder in the store is the plural, such as `adapters`."""

KINDS_BY_NAME: dict[str, ArtifactKind.ValueType] = {
    name: ArtifactKind.Value(f"ARTIFACT_KIND_{name.upper()}") for name in KIND_NAMES.values()
}

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION_LIKE = re.compile(r"v[0-9]+|latest")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REF = re.compile(
    r"(?P<kind>[a-z]+)/(?P<name>[a-z0-9][a-z0-9._-]{0,63})"
    r"(?::v(?P<version>[1-9][0-9]{0,17})|@(?P<alias>[a-z][a-z0-9._-]{0,63}))?"
)
_FORMS = "Write kind/name, kind/name:v3 or kind/name@alias, such as adapter/mareva:v3."


def parse_ref(text: str) -> ArtifactRef:
    """Read a reference as people write it; INVALID_ARGUMENT says which forms there are."""
    match = _REF.fullmatch(text.strip())
    if match is None:
        raise invalid_argument("REF_INVALID", f"{text[:200]!r} is no artifact reference. {_FORMS}", ref=_FORMS)
    kind = KINDS_BY_NAME.get(match["kind"])
    if kind is None:
        kinds = ", ".join(KINDS_BY_NAME)
        message = f"{match['kind']!r} is no kind of artifact. The kinds are {kinds}."
        raise invalid_argument("REF_INVALID", message, ref=message)
    ref = ArtifactRef(kind=kind, name=match["name"])
    if match["version"]:
        ref.version = int(match["version"])
    elif match["alias"]:
        ref.alias = match["alias"]
    return ref


def format_ref(ref: ArtifactRef) -> str:
    """Write a reference as people read it; the digest is left out."""
    text = f"{KIND_NAMES.get(ref.kind, 'unspecified')}/{ref.name}"
    selector = ref.WhichOneof("selector")
    if selector == "version":
        return f"{text}:v{ref.version}"
    return f"{text}@{ref.alias}" if selector == "alias" else text


def check_kind(kind: int) -> ArtifactKind.ValueType:
    """Return the kind, or raise INVALID_ARGUMENT when it is unset or unknown."""
    if kind in KIND_NAMES:
        return KINDS_BY_NAME[KIND_NAMES[kind]]
    kinds = ", ".join(KIND_NAMES.values())
    raise invalid_argument("KIND_INVALID", f"The kind of the artifact is missing. The kinds are {kinds}.", kind=kinds)


def check_name(name: str) -> str:
    """Return the name, or raise INVALID_ARGUMENT; names become folders and object keys."""
    if _NAME.fullmatch(name) is None:
        rule = "lower-case letters, digits, '-', '_' and '.', starting with a letter or digit, at most 64"
        raise invalid_argument("NAME_INVALID", f"{name[:80]!r} can't name an artifact: use {rule}.", name=rule)
    return name


def check_alias(alias: str) -> str:
    """Return the alias, or raise INVALID_ARGUMENT."""
    if _ALIAS.fullmatch(alias) is None:
        rule = "lower-case letters, digits, '-', '_' and '.', starting with a letter, at most 64"
        raise invalid_argument("ALIAS_INVALID", f"{alias[:80]!r} can't be an alias: use {rule}.", alias=rule)
    return alias


def check_new_alias(alias: str) -> str:
    """Return the alias, or raise INVALID_ARGUMENT also for one that people would take for a version."""
    if _VERSION_LIKE.fullmatch(check_alias(alias)):
        form = "without `@…` a reference means the latest" if alias == "latest" else f"versions are written `:{alias}`"
        message = f"{alias!r} can't be an alias: people would read it as a version, and {form}. Choose another word."
        raise invalid_argument("ALIAS_INVALID", message, alias=message)
    return alias


def check_ref(ref: ArtifactRef) -> ArtifactRef:
    """Return the reference, or raise INVALID_ARGUMENT for a part that can't be right."""
    check_kind(ref.kind)
    check_name(ref.name)
    selector = ref.WhichOneof("selector")
    if selector == "alias":
        check_alias(ref.alias)
    if selector == "version" and ref.version < 1:
        raise invalid_argument("REF_INVALID", "Versions are counted from 1.", version="at least 1")
    if ref.digest and _DIGEST.fullmatch(ref.digest) is None:
        raise invalid_argument("REF_INVALID", "A digest is `sha256:` and 64 hex digits.", digest="sha256:…")
    return ref


def prefix_of(kind: int, name: str, version: int) -> str:
    """Return where a version lies in a store, such as `adapters/mareva/v3`."""
    return f"{KIND_NAMES[check_kind(kind)]}s/{check_name(name)}/v{version}"
