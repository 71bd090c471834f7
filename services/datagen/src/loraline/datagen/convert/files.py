"""Which files a source consists of, without ever leaving the folders it may read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from loraline.datagen.convert.problems import bad_location, missing_source, path_denied

READABLE = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet"})
ABOUT_THE_FOLDER = frozenset({"readme", "license", "licence", "notice", "changelog"})


@dataclass(frozen=True)
class SourceFile:
    """A file to convert: its path, its name in errors and rows, and the names of the folders it lies in."""

    path: Path
    name: str
    folders: tuple[str, ...]


@dataclass
class SourceFiles:
    """The files of a source in a stable order, and what lies beside them that is not converted."""

    files: list[SourceFile]
    ignored: list[str] = field(default_factory=list)


def below(root: Path, subpath: str) -> Path:
    """Return `root`/`subpath`; typed errors when it would leave the root or does not exist."""
    relative = PurePosixPath(subpath)
    if relative.is_absolute() or ".." in relative.parts or "\x00" in subpath:
        raise bad_location(
            "SUBPATH_INVALID", "source.subpath", f"{subpath!r} leaves the source.", "Give a relative path without `..`"
        )
    target = root / relative
    if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(root)):
        raise path_denied(subpath, "it is a link that leaves the source.")
    if not target.exists():
        there = ", ".join(sorted(p.name for p in root.iterdir())[:10]) if root.is_dir() else root.name
        raise missing_source(f"{subpath!r} is not in the source. There are: {there}.", "source.subpath")
    return target


def find_files(
    root: Path, subpath: str = "", label: str = "", own: frozenset[str] = frozenset(),
    types: frozenset[str] = READABLE,
) -> SourceFiles:  # fmt: skip
    """List the files of a folder (recursively) or the one file.

    `label` names the root in classification rules; `own` are files at the root that are not the source's, such as an
    artifact's manifest; `types` are the endings of files that can be read.
    """
    target = below(root, subpath) if subpath else root
    if not target.exists():
        raise missing_source(f"{target.name!r} does not exist. Check the path.", "source")
    base = root if root.is_dir() else root.parent
    named = tuple(part for part in (label or (root.name if root.is_dir() else ""),) if part)
    if target.is_file():
        name = target.relative_to(base).as_posix()
        if target.suffix.lower() not in types:
            raise bad_location(
                "FILE_TYPE_UNKNOWN", "source", f"{name} is of no type that can be converted.",
                f"Types are {', '.join(sorted(types))}",
            )  # fmt: skip
        return SourceFiles([_source_file(target, base, named)])
    found = SourceFiles([])
    real_root = os.path.realpath(root)
    for folder, subfolders, names in os.walk(target, onerror=_unreadable_folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(set(names) - (own if Path(folder) == root else frozenset())):
            _sort_in(Path(folder) / name, base, real_root, named, found, types)
    if not found.files:
        beside = f" ({', '.join(found.ignored[:5])} are of no such type)" if found.ignored else ""
        raise bad_location(
            "NO_SOURCE_FILES", "source", f"There is no file to convert in {subpath or 'the source'}{beside}.",
            f"Put files of the types {', '.join(sorted(types))} there",
        )  # fmt: skip
    found.files.sort(key=lambda file: file.name)
    return found


def _sort_in(
    path: Path, base: Path, real_root: str, named: tuple[str, ...], found: SourceFiles, types: frozenset[str]
) -> None:
    name = path.relative_to(base).as_posix()
    if path.name.startswith("."):
        return
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real_root):
        raise path_denied(name, "it is a link that leaves the source.")
    documentation = path.stem.lower() in ABOUT_THE_FOLDER and path.suffix.lower() in {".txt", ".md", ""}
    if path.suffix.lower() not in types or documentation or not path.is_file():
        found.ignored.append(name)
        return
    found.files.append(_source_file(path, base, named))


def _source_file(path: Path, base: Path, named: tuple[str, ...]) -> SourceFile:
    relative = path.relative_to(base)
    return SourceFile(path, relative.as_posix(), (*named, *relative.parts[:-1], relative.stem))


def _unreadable_folder(error: OSError) -> None:
    name = Path(str(error.filename)).name
    raise bad_location(
        "FILE_UNREADABLE", "source", f"The folder {name!r} cannot be read: {error.strerror}.", "Mend its permissions"
    ) from error
