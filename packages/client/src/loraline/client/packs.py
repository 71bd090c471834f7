"""Artifacts as one tar file, to carry them where no network goes. What comes out is what went in, or nothing.

The first member is `loraline.json`, the artifact's manifest with each file's SHA-256; the files follow under `files/`.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import IO

import grpc
from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.client.errors import LoralineApiError

MANIFEST = "loraline.json"
_FILES = "files/"
_LARGEST_MANIFEST = 64 * 2**20
_CHUNK = 2**20


def pack(artifact: artifact_pb2.Artifact, folder: Path, file: Path) -> None:
    """Write an artifact, whose files lie verified in `folder`, to a tar file that appears whole or not at all.

    Raises ALREADY_EXISTS (TARGET_EXISTS) rather than overwrite a file.
    """
    refuse_existing(file)
    begun = file.with_name(f".{file.name}.{os.getpid()}")
    manifest = json_format.MessageToJson(artifact, preserving_proto_field_name=True).encode()
    try:
        with tarfile.open(begun, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, MANIFEST, len(manifest), io.BytesIO(manifest))
            for entry in artifact.files:
                with (folder / entry.path).open("rb") as content:
                    _add(archive, _FILES + entry.path, entry.size_bytes, content)
        with begun.open("rb") as written:
            os.fsync(written.fileno())
        begun.replace(file)
    finally:
        begun.unlink(missing_ok=True)


def refuse_existing(file: Path) -> None:
    """Raise ALREADY_EXISTS (TARGET_EXISTS) when there is such a file."""
    if file.exists():
        message = f"{file} exists. Name another file, or delete it first."
        raise LoralineApiError(grpc.StatusCode.ALREADY_EXISTS, "TARGET_EXISTS", message)


def unpack(file: Path, folder: Path) -> artifact_pb2.Artifact:
    """Write the files of a pack into `folder`, each compared with its digest, and return the manifest.

    Raises DATA_LOSS (PACK_DAMAGED) for whatever is cut off, changed, missing or not listed; INVALID_ARGUMENT
    (NOT_A_PACK) for other files. No name in the archive can lead out of the folder.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            artifact = _manifest(archive, file)
            wanted = {_FILES + entry.path: entry for entry in artifact.files}
            for member in archive:
                if member.name == MANIFEST:
                    continue
                entry = wanted.pop(member.name, None)
                if entry is None or not member.isreg() or ".." in Path(entry.path).parts or entry.path.startswith("/"):
                    raise _damaged(file, f"{member.name!r} does not belong to it")
                content = archive.extractfile(member)
                assert content is not None  # noqa: S101 - it is a regular file
                _write(content, folder / entry.path, entry, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _damaged(file, str(error)) from error
    if wanted:
        missing = sorted(name.removeprefix(_FILES) for name in wanted)
        raise _damaged(file, f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    return artifact


def _add(archive: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    archive.addfile(member, content)


def _manifest(archive: tarfile.TarFile, file: Path) -> artifact_pb2.Artifact:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > _LARGEST_MANIFEST:
        message = f"{file} is no packed artifact. `loraline artifacts pack REF FILE.tar` makes one."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "NOT_A_PACK", message)
    content = archive.extractfile(first)
    assert content is not None  # noqa: S101 - it is a regular file
    try:
        return json_format.Parse(content.read(), artifact_pb2.Artifact(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise _damaged(file, f"its manifest cannot be read ({error})") from error


def _write(content: IO[bytes], target: Path, entry: artifact_pb2.ArtifactFile, file: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as written:
        while data := content.read(_CHUNK):
            digest.update(data)
            written.write(data)
    if digest.hexdigest() != entry.sha256:
        raise _damaged(file, f"{entry.path} does not match its SHA-256")


def _damaged(file: Path, what: str) -> LoralineApiError:
    message = f"{file} is damaged: {what}. Nothing was published; pack it again and compare the file's size."
    return LoralineApiError(grpc.StatusCode.DATA_LOSS, "PACK_DAMAGED", message)
