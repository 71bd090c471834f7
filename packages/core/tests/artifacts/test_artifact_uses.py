"""A version that somebody needs is not deleted without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from loraline.api.artifact.v1.artifact_pb2 import (
    ARTIFACT_KIND_ADAPTER,
    ARTIFACT_KIND_DATASET,
    ARTIFACT_KIND_MODEL,
    ArtifactRef,
)
from loraline.core.artifacts.uses import hold
from loraline.core.errors import LoralineError
from loraline.core.jobs.model import NewJob
from loraline.core.jobs.sql_table import open_table
from loraline.core.testing.jobs import struct


def refused(call: Callable[[], Any]) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        call()
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION
    return caught.value


def publish(place: Any, kind: int, name: str, inputs: tuple[ArtifactRef, ...] = ()) -> ArtifactRef:
    return place.library.publish(kind, name, place.folder(a=name.encode()), inputs=inputs).ref


def test_what_others_were_made_from_goes_only_by_force(place: Any) -> None:
    base = publish(place, ARTIFACT_KIND_MODEL, "tiny_a")
    publish(place, ARTIFACT_KIND_MODEL, "tinyxa")  # `_` is a wildcard of LIKE; this one is nobody's base
    adapter = publish(place, ARTIFACT_KIND_ADAPTER, "mareva", (base,))
    error = refused(lambda: place.library.delete(base))
    assert (error.reason, error.metadata["descendants"]) == ("ARTIFACT_HAS_DESCENDANTS", "adapter/mareva:v1")
    assert "loraline artifacts delete model/tiny_a:v1 --force" in error.message
    place.library.delete(ArtifactRef(kind=ARTIFACT_KIND_MODEL, name="tinyxa", version=1))
    place.library.delete(base, force=True)
    assert place.library.get(adapter).inputs[0] == base  # the record of it stays
    other = publish(place, ARTIFACT_KIND_MODEL, "other")
    child = publish(place, ARTIFACT_KIND_ADAPTER, "child", (other,))
    place.library.delete(child)
    place.library.delete(other)  # nothing made from it is left


def test_what_a_server_holds_is_not_deleted_even_by_force(place: Any) -> None:
    adapter, model = publish(place, ARTIFACT_KIND_ADAPTER, "mareva"), publish(place, ARTIFACT_KIND_MODEL, "tiny")
    hold(place.database, "inference on a", [adapter, model])
    hold(place.database, "inference on b", [adapter])
    error = refused(lambda: place.library.delete(adapter, force=True))
    assert error.reason == "ARTIFACT_SERVED"
    assert error.metadata["holders"] == "inference on a, inference on b"
    assert "loraline adapters unload mareva:v1" in error.message
    assert "loraline models load" in refused(lambda: place.library.delete(model)).message
    hold(place.database, "inference on b", [])
    hold(place.database, "inference on a", [adapter], seconds=-1)  # as after the death of a server
    place.library.delete(adapter)
    place.library.delete(model)


def test_what_an_unfinished_job_reads_is_not_deleted(place: Any) -> None:
    dataset = publish(place, ARTIFACT_KIND_DATASET, "talk")
    table = open_table(place.database)
    job, _ = table.create(NewJob("test.count", struct(to=1), "", (dataset,), {}))
    error = refused(lambda: place.library.delete(dataset, force=True))
    assert (error.reason, error.metadata["jobs"]) == ("ARTIFACT_NEEDED_BY_JOB", job.name)
    assert f"loraline jobs cancel {job.name}" in error.message
    table.request_stop(job.name, "cancel")
    place.library.delete(dataset)
