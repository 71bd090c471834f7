"""Uploads are what their kind says, aliases do not look like versions, errors keep the server's folders private."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1 import artifact_pb2 as pb
from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import check_new_alias
from loraline.core.artifacts.uploads import Upload
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.private_paths import hide_folder
from loraline.core.serving.statuses import as_error
from loraline.core.serving.validation import check


def safetensors(*, missing: int = 0) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * (4 - missing)


GOOD: dict[int, dict[str, bytes]] = {
    pb.ARTIFACT_KIND_DATASET: {"train.jsonl": b'{"messages": []}\n\n{"a": 1}\n'},
    pb.ARTIFACT_KIND_ADAPTER: {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors()},
    pb.ARTIFACT_KIND_MODEL: {"config.json": b"{}", "model.safetensors": safetensors()},
    pb.ARTIFACT_KIND_SOURCE: {"whatever.bin": b"\0"},
}
BAD: list[tuple[int, dict[str, bytes | None], str, str]] = [
    (pb.ARTIFACT_KIND_DATASET, {"train.jsonl": None, "data.csv": b"a"}, "train.jsonl", "is missing"),
    (pb.ARTIFACT_KIND_DATASET, {"train.jsonl": b'{"a": 1}\nnot json\n'}, "train.jsonl:2", "is no JSON ("),
    (pb.ARTIFACT_KIND_DATASET, {"train.jsonl": b"[1]\n"}, "train.jsonl:1", "is no JSON object"),
    (pb.ARTIFACT_KIND_ADAPTER, {"adapter_config.json": None}, "adapter_config.json", "is missing"),
    (pb.ARTIFACT_KIND_ADAPTER, {"adapter_config.json": b"[]"}, "adapter_config.json", "is no JSON object"),
    (pb.ARTIFACT_KIND_ADAPTER, {"adapter_model.safetensors": b"x"}, "adapter_model.safetensors", "too short"),
    (pb.ARTIFACT_KIND_MODEL, {"model.safetensors": safetensors(missing=1)}, "model.safetensors", "promises"),
    (pb.ARTIFACT_KIND_MODEL, {"model.safetensors": None, "model.bin": b"x"}, "*.safetensors", "is missing"),
    (pb.ARTIFACT_KIND_MODEL, {"config.json": b"\xff"}, "config.json", "is no JSON"),
]


def upload(place: Any, kind: int, files: dict[str, bytes]) -> pb.Artifact:
    running = Upload(place.library.upload_dir, pb.UploadHeader(kind=kind, name="up"))  # type: ignore[arg-type]
    try:
        for path, content in files.items():
            running.add(path, content)
        return running.publish(place.library).artifact
    finally:
        running.discard()


@pytest.mark.parametrize("kind", GOOD)
def test_an_upload_of_its_kind_is_published(local_place: Any, kind: int) -> None:
    assert upload(local_place, kind, GOOD[kind]).ref.version == 1


@pytest.mark.parametrize(("kind", "change", "file", "words"), BAD)
def test_an_upload_of_another_kind_names_the_file(
    local_place: Any, kind: int, change: dict[str, bytes | None], file: str, words: str
) -> None:
    files = {path: content for path, content in {**GOOD[kind], **change}.items() if content is not None}
    with pytest.raises(LoralineError) as caught:
        upload(local_place, kind, files)
    assert caught.value.reason == "CONTENT_NOT_OF_KIND"
    assert words in caught.value.fields[file]
    assert file in caught.value.message
    assert local_place.library.list()[0] == []


@pytest.mark.parametrize("alias", ["latest", "v1", "v12"])
def test_aliases_that_look_like_versions_are_refused(local_place: Any, alias: str) -> None:
    ref = upload(local_place, pb.ARTIFACT_KIND_SOURCE, {"a": b"1"}).ref
    with pytest.raises(LoralineError, match="read it as a version") as caught:
        local_place.library.set_alias(ref, alias)
    assert caught.value.reason == "ALIAS_INVALID"
    for word in ("v1.2", "verified", "latest-good", "production"):
        assert check_new_alias(word) == word


@pytest.mark.parametrize("hub_id", ["..", "../etc", "org/..", "a..b", ".hidden", "org/.name", "a/b/c", "org/name."])
def test_hub_ids_lead_nowhere_else(hub_id: str) -> None:
    with pytest.raises(LoralineError) as caught:
        check(BaseModel(hub_id=hub_id))
    assert "must be a Hub id" in caught.value.fields["hub_id"]
    for good in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "org_1/a.b-c"):
        check(BaseModel(hub_id=good))


def test_errors_keep_the_servers_folders_private(tmp_path: Path) -> None:
    hide_folder(tmp_path / "data", "$LORALINE_DATA_DIR")
    file = str(tmp_path / "data" / "cache" / "x")
    error = failed_precondition("X", f"{file} is broken", file=file)
    error.fields = {file: f"see {file}"}
    told = as_error(error, "/method")
    assert str(tmp_path) not in str((told.message, told.metadata, told.fields))
    assert told.message == "$LORALINE_DATA_DIR/cache/x is broken"
    assert error.message.startswith(str(tmp_path))  # the log keeps the whole path
