"""What of a Hub model lies in this machine's cache, and what is missing, file by file. Asks no network.

The cache is huggingface_hub's own: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NAMED = 5
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class CacheLook:
    """A model in the cache."""

    root: Path
    """The cache."""
    folder: Path | None
    """The snapshot; None when nothing of the model is here."""
    commit: str
    """Commit of the snapshot; empty without one."""
    present: tuple[str, ...]
    missing: tuple[str, ...]
    """Files that a complete model still needs; `a tokenizer` and the like where any of several names would do."""

    @property
    def complete(self) -> bool:
        """Whether the model can be loaded from here."""
        return self.folder is not None and not self.missing

    @property
    def described(self) -> str:
        """What is there and what is missing, for people."""
        if self.folder is None:
            return f"the cache {self.root} has nothing of it"
        if not self.missing:
            return f"the cache {self.root} has all {len(self.present)} files"
        shown = ", ".join(self.missing[:_NAMED])
        more = f" and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else ""
        total = len(self.present) + len(self.missing)
        return f"the cache {self.root} has {len(self.present)} of {total} files; missing: {shown}{more}"


def offline() -> str:
    """Return the variable that forbids the network; empty when none does.

    One of the three is enough: who sets it for data sets alone has no network for models either.
    """
    for name in _OFFLINE:
        if os.environ.get(name, "").upper() in _TRUE:
            return name
    from huggingface_hub import constants

    # Set in the process rather than in its environment.
    return _OFFLINE[0] if constants.HF_HUB_OFFLINE else ""


def look(hub_id: str, revision: str, patterns: Collection[str]) -> CacheLook:
    """Look for a model at a revision (empty: main); `patterns` are the files that belong to a model."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE).expanduser()
    place = root / f"models--{hub_id.replace('/', '--')}"
    commit = _commit(place, revision or constants.DEFAULT_REVISION)
    folder = place / "snapshots" / commit
    if not commit or not folder.is_dir():
        return CacheLook(root, None, "", (), ())
    listed = _listed(hub_id, commit, root)
    # A link whose blob was never finished is no file.
    present = tuple(sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()))
    wanted = {name for name in listed if _matches(name, patterns)} if listed else set()
    missing = sorted(wanted - set(present)) or needed(folder, present)
    kept = tuple(name for name in present if _matches(name, patterns))
    return CacheLook(root, folder, commit, kept, tuple(missing))


def needed(folder: Path, present: Collection[str]) -> list[str]:
    """Return what a model folder lacks to be loaded, going by its own index; in words where several names would do."""
    missing = [] if "config.json" in present else ["config.json"]
    if not any(name in present for name in TOKENIZERS):
        missing.append("a tokenizer")
    if INDEX in present:
        try:
            shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return [*missing, INDEX]
        missing.extend(sorted(str(name) for name in shards if name not in present))
    elif SINGLE not in present:
        missing.append(f"{SINGLE} or {INDEX}")
    return missing


def _commit(place: Path, revision: str) -> str:
    if (place / "snapshots" / revision).is_dir():
        return revision
    try:
        return (place / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _listed(hub_id: str, commit: str, root: Path) -> set[str]:
    """Return the names that the Hub listed when the model was fetched; empty where that is not known."""
    try:
        from huggingface_hub import get_cached_repo_tree

        return {entry.path for entry in get_cached_repo_tree(hub_id, revision=commit, cache_dir=root)}
    except Exception:  # older releases keep no list, and a torn one is as good as none
        return set()


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
