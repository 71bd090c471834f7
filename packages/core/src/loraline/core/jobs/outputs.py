"""What earlier attempts of a job published: a job that is killed late publishes once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraline.api.artifact.v1 import artifact_pb2
from loraline.core.jobs.table import JobTable

if TYPE_CHECKING:
    from loraline.core.artifacts.library import ArtifactLibrary


def published_before(
    table: JobTable, library: ArtifactLibrary, job: str, kind: int, name: str
) -> artifact_pb2.Artifact | None:
    """Return what an earlier attempt published, also when it died before it could write so in the job's record."""
    for ref in reversed(table.get(job).outputs):
        if ref.kind == kind and ref.name == name:
            return library.get(ref)
    token = ""
    while True:
        artifacts, token = library.list(kind=kind, name=name, page_size=200, page_token=token)
        for artifact in artifacts:
            if artifact.job == job:
                return library.get(artifact.ref)
        if not token:
            return None
