"""The manifest: what an artifact holds, byte for byte, and what it was made from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from loraline.api.artifact.v1.artifact_pb2 import Artifact, ArtifactFile, ArtifactRef
from loraline.core.artifacts.refs import KIND_NAMES, KINDS_BY_NAME, check_kind, format_ref, parse_ref
from loraline.core.errors import data_loss, invalid_argument

MANIFEST = "manifest.json"
FORMAT = 1
_MAX_PATH = 512


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file of an artifact: its path with `/`, its size in bytes and its SHA-256 in hex."""

    path: str
    size: int
    sha256: str


def digest_of(files: Iterable[FileEntry]) -> str:
    """Return the artifact's digest: it depends on paths, sizes and contents, and on nothing else."""
    total = hashlib.sha256()
    for entry in sorted(files):
        total.update(f"{entry.path}\0{entry.size}\0{entry.sha256}\n".encode())
    return f"sha256:{total.hexdigest()}"


def check_path(path: str) -> str:
    """Return a file's path inside an artifact, or raise INVALID_ARGUMENT.

    Refused are absolute paths, `.` and `..`, backslashes, control characters, names longer than file systems allow,
    and the manifest's own name.
    """

    def refuse(why: str) -> Exception:
        message = f"The file path {path[:200]!r} is refused: {why}. Rename the file."
        return invalid_argument("PATH_INVALID", message, path=why)

    if not path or len(path) > _MAX_PATH:
        raise refuse(f"a path has 1 to {_MAX_PATH} characters")
    if "\\" in path or any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise refuse("backslashes and control characters are not portable")
    if path.startswith("/") or (len(path) > 1 and path[1] == ":"):
        raise refuse("it is absolute")
    if any(part in {"", ".", ".."} for part in path.split("/")):
        raise refuse("empty parts, '.' and '..' could lead elsewhere")
    try:
        encoded = [part.encode() for part in path.split("/")]
    except UnicodeEncodeError as error:
        raise refuse("it is not valid Unicode") from error
    if max(map(len, encoded)) > 255:
        raise refuse("a part is longer than 255 bytes")
    if path == MANIFEST:
        raise refuse(f"{MANIFEST} is written by the store; leave it out when you copy a fetched folder")
    return path


def scan_folder(folder: Path) -> list[tuple[str, Path, int]]:
    """List a folder's files as (path inside, file, size in bytes), sorted; empty subfolders are not kept.

    INVALID_ARGUMENT for symbolic links and special files, which could point anywhere, and for an empty folder.
    """
    if not folder.is_dir() or folder.is_symlink():
        raise invalid_argument("FOLDER_INVALID", f"{folder} is no folder.", folder="an existing folder is needed")
    found: list[tuple[str, Path, int]] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = PurePosixPath(Path(entry.path).relative_to(folder).as_posix()).as_posix()
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(Path(entry.path))
                elif stat.S_ISREG(mode):
                    found.append((check_path(path), Path(entry.path), entry.stat(follow_symlinks=False).st_size))
                else:
                    what = "a symbolic link" if stat.S_ISLNK(mode) else "a special file"
                    message = f"{path!r} in {folder} is {what}; artifacts hold regular files only. Copy the content."
                    raise invalid_argument("FILE_NOT_REGULAR", message, path=what)
    if not found:
        raise invalid_argument("FOLDER_EMPTY", f"{folder} holds no file to publish.", folder="holds no file")
    return sorted(found)


@dataclass
class Manifest:
    """What `manifest.json` says."""

    kind: int
    name: str
    version: int
    files: list[FileEntry]
    create_time: float
    """Seconds since the epoch."""
    job: str = ""
    inputs: list[ArtifactRef] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    library_versions: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        self.files = sorted(self.files)
        self.digest = self.digest or digest_of(self.files)

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(entry.size for entry in self.files)

    def details(self) -> dict[str, Any]:
        """Return everything but the file list, ready for JSON."""
        return {
            "format": FORMAT,
            "kind": KIND_NAMES[self.kind],
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "size_bytes": self.size_bytes,
            "create_time": datetime.fromtimestamp(self.create_time, UTC).isoformat(timespec="microseconds"),
            "job": self.job,
            "inputs": [{"ref": format_ref(ref), "digest": ref.digest} for ref in self.inputs],
            "settings": self.settings,
            "facts": self.facts,
            "library_versions": self.library_versions,
        }

    def file_list(self) -> list[dict[str, Any]]:
        """Return the file list, ready for JSON."""
        return [{"path": e.path, "size_bytes": e.size, "sha256": e.sha256} for e in self.files]

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return (json.dumps({**self.details(), "files": self.file_list()}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, details: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> Manifest:
        """Read what `details` and `file_list` gave; DATA_LOSS when the digest does not fit the file list."""
        entries = [FileEntry(item["path"], int(item["size_bytes"]), item["sha256"]) for item in files]
        inputs = []
        for item in details["inputs"]:
            ref = parse_ref(item["ref"])
            ref.digest = item["digest"]
            inputs.append(ref)
        manifest = cls(
            kind=KINDS_BY_NAME[details["kind"]],
            name=details["name"],
            version=int(details["version"]),
            files=entries,
            create_time=datetime.fromisoformat(details["create_time"]).timestamp(),
            job=details["job"],
            inputs=inputs,
            settings=dict(details["settings"]),
            facts=dict(details["facts"]),
            library_versions=dict(details["library_versions"]),
        )
        if manifest.digest != details["digest"]:
            where = f"{details['kind']}/{manifest.name}:v{manifest.version}"
            raise data_loss("MANIFEST_DAMAGED", f"The file list of {where} does not match its digest.", artifact=where)
        return manifest

    def to_artifact(self, *, aliases: Sequence[str] = (), location: str = "", with_files: bool = True) -> Artifact:
        """Return the artifact as the public contract describes it."""
        artifact = Artifact(
            ref=ArtifactRef(kind=check_kind(self.kind), name=self.name, version=self.version, digest=self.digest),
            digest=self.digest,
            size_bytes=self.size_bytes,
            job=self.job,
            inputs=self.inputs,
            library_versions=self.library_versions,
            aliases=sorted(aliases),
            location=location,
        )
        artifact.create_time.FromMicroseconds(round(self.create_time * 1e6))
        artifact.settings.update(self.settings)
        artifact.facts.update(self.facts)
        if with_files:
            artifact.files.extend(ArtifactFile(path=e.path, size_bytes=e.size, sha256=e.sha256) for e in self.files)
        return artifact


def plain(value: Any) -> Any:
    """Return a JSON-ready copy: messages become mappings, NaN and infinities words, unknown objects their text.

    A training run's last loss may be NaN; losing the run's artifact over it would be worse than writing "nan".
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _plain_object(value)


def _plain_object(value: Any) -> Any:
    if isinstance(value, Message):
        return json_format.MessageToDict(value, preserving_proto_field_name=True)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return plain(value.item()) if hasattr(value, "item") else str(value)  # item: of a numpy scalar
