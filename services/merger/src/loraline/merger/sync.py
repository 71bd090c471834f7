"""Brings the base's config and tokenizer files into the merged folder, byte for byte, and says what differs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loraline.api.merger.v1 import merger_pb2
from loraline.merger.check.findings import Finding
from loraline.merger.json_files import read_json
from loraline.merger.weights.layout import unsafe_path

SYNCED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files that decide how the weights are read and how text becomes ids."""
TOKENIZER_FILES = SYNCED_FILES[2:12]
"""Those of them that are one tokenizer."""
_PATTERNS = ("*.tiktoken", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*")
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class SyncedFile:
    """One file beside the base's; digests are hex SHA-256, empty when that side lacks the file."""

    path: str
    base_sha256: str
    merged_sha256: str
    difference: str

    def to_proto(self) -> merger_pb2.SyncedFile:
        """Return it as the contract has it."""
        return merger_pb2.SyncedFile(
            path=self.path,
            base_sha256=self.base_sha256,
            merged_sha256=self.merged_sha256,
            difference=self.difference,
        )


def files_to_sync(base: Path) -> list[str]:
    """Return the paths of the base's files that a merged model needs, sorted. Refuses links out of the folder."""
    names = {name for name in SYNCED_FILES if (base / name).exists()}
    for pattern in _PATTERNS:
        names |= {path.relative_to(base).as_posix() for path in base.glob(pattern) if path.is_file()}
    for name in names:
        if not (base / name).resolve().is_relative_to(base.resolve()):
            raise unsafe_path(name, f"it is a link to {(base / name).resolve()}")
    return sorted(names)


def copy_base_files(base: Path, merged: Path) -> None:
    """Copy the base's config and tokenizer files; nothing else of the base, neither code nor other weights."""
    for name in files_to_sync(base):
        (merged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, merged / name)


def write_dtype(merged: Path, dtype: str) -> list[Finding]:
    """Write the new type of the weights into config.json, in the field that the base uses."""
    path = merged / "config.json"
    config = read_json(path, "CONFIG_UNREADABLE")
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    before, after = config.get(field), _DTYPE_NAMES[dtype]
    if before == after:
        return []
    config[field] = after
    write_json(path, config)
    message = f"{field} changed from {before} to {after}, as the merge was asked for {dtype}."
    return [Finding("DTYPE_CHANGED", "info", "config.json", message, "Nothing to do.")]


def compare_files(base: Path, merged: Path, changes: Iterable[Finding]) -> list[SyncedFile]:
    """Compare all synchronised files as they now are; `changes` say why some differ."""
    why: dict[str, list[str]] = {}
    for change in changes:
        why.setdefault(change.file, []).append(f"{change.code}: {change.message}")
    result = []
    for name in sorted({*files_to_sync(base), *files_to_sync(merged)}):
        left, right = digest(base / name), digest(merged / name)
        difference = "" if left == right else "; ".join(why.get(name, ["differs without a recorded reason"]))
        result.append(SyncedFile(name, left, right, difference))
    return result


def digest(path: Path) -> str:
    """Return the hex SHA-256 of a file; empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write JSON the way transformers does: two spaces, the order kept, no escapes of other scripts."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
