"""Request ids that follow from what is asked: the same file and inputs give the same ids, so a re-run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from google.protobuf import json_format
from google.protobuf.message import Message

from loraline.api.artifact.v1 import artifact_pb2
from loraline.client.refs import kind_name


def request_id(
    pipeline: str, stage: str, template: Message, inputs: Iterable[tuple[str, artifact_pb2.ArtifactRef]]
) -> str:
    """Return the id of a stage's request.

    It depends on the settings in `template` and on the digest of each input (role and reference); an input without a
    digest counts with its reference. It does not depend on versions, times, or the order of keys in the file.
    """
    described = [[role, kind_name(ref.kind), ref.name, ref.digest or _selector(ref)] for role, ref in inputs]
    settings = json_format.MessageToDict(template, preserving_proto_field_name=True)
    content = json.dumps([template.DESCRIPTOR.full_name, settings, sorted(described)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:20]
    return f"{pipeline}.{stage}.{digest}"


def _selector(ref: artifact_pb2.ArtifactRef) -> str:
    which = ref.WhichOneof("selector")
    return f"v{ref.version}" if which == "version" else ref.alias
