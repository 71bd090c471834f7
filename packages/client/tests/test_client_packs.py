"""Artifacts as one tar file: what comes out is what went in, or nothing."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.client import packs
from loraline.client.errors import LoralineApiError

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights" * 3000, "nested/merges.txt": "a 한 漢 🙂".encode()}


def packed(folder: Path) -> tuple[artifact_pb2.Artifact, Path]:
    ref = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_MODEL, name="tiny", version=3)
    artifact = artifact_pb2.Artifact(ref=ref, digest="sha256:" + "0" * 64)
    artifact.facts.update({"parameters": 4, "source": {"revision": "main"}})
    files = folder / "files"
    for path, data in CONTENT.items():
        (files / path).parent.mkdir(parents=True, exist_ok=True)
        (files / path).write_bytes(data)
        artifact.files.add(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    packs.pack(artifact, files, folder / "tiny.tar")
    return artifact, folder / "tiny.tar"


def refused(file: Path, folder: Path) -> LoralineApiError:
    with pytest.raises(LoralineApiError) as caught:
        packs.unpack(file, folder)
    return caught.value


def test_a_pack_gives_back_every_byte_and_its_manifest(tmp_path: Path) -> None:
    artifact, file = packed(tmp_path)
    assert packs.unpack(file, tmp_path / "out") == artifact
    assert {path: (tmp_path / "out" / path).read_bytes() for path in CONTENT} == CONTENT
    # Any tar shows what is in it.
    with tarfile.open(file) as archive:
        assert archive.getnames() == ["loraline.json", *(f"files/{path}" for path in CONTENT)]
    with pytest.raises(LoralineApiError) as caught:
        packs.pack(artifact, tmp_path / "files", file)
    assert caught.value.reason == "TARGET_EXISTS"


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    _, file = packed(tmp_path)
    whole, draw, told = file.read_bytes(), random.Random(5), set()
    for number in range(40):
        torn = tmp_path / f"{number}.tar"
        torn.write_bytes(whole[: draw.randrange(1, len(whole) - 11_000)])
        told.add(refused(torn, tmp_path / f"torn{number}").reason)
    begin = whole.index(b"weightsweights")
    for number in range(20):
        flipped = bytearray(whole)
        flipped[begin + draw.randrange(20_000)] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.tar").write_bytes(flipped)
        error = refused(tmp_path / "flipped.tar", tmp_path / f"flipped{number}")
        assert error.reason == "PACK_DAMAGED" and "model.safetensors" in error.message
    assert told <= {"PACK_DAMAGED", "NOT_A_PACK"} and "PACK_DAMAGED" in told


@pytest.mark.parametrize("name", ["files/../../evil", "/etc/evil", "files/other", "files/link"])
def test_what_is_not_listed_stays_out(tmp_path: Path, name: str) -> None:
    artifact, _ = packed(tmp_path)
    entry = artifact_pb2.ArtifactFile(path=name.removeprefix("files/"), size_bytes=1, sha256="0" * 64)
    if "other" not in name:
        artifact.files.append(entry)
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as archive:
        for path, data in (("loraline.json", json_format.MessageToJson(artifact).encode()), (name, b"x")):
            member = tarfile.TarInfo(path)
            if path == "files/link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    error = refused(hostile, tmp_path / "inside" / "out")
    assert error.reason == "PACK_DAMAGED" and "does not belong" in error.message
    assert not (tmp_path / "evil").exists() and not (tmp_path / "inside").exists()


def test_other_files_are_no_packs(tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO(b""))
    assert refused(other, tmp_path / "out").reason == "NOT_A_PACK"
    (tmp_path / "text.tar").write_text(json.dumps({"no": "tar"}))
    assert refused(tmp_path / "text.tar", tmp_path / "out").reason == "PACK_DAMAGED"
