"""Whether a model folder is whole: config, weights to the last byte, tokenizer. Nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraline.core.artifacts.safetensors import read_header
from loraline.core.preflight.finding import Finding, ok

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_REASON = "MODEL_INCOMPLETE"


def check_model_folder(folder: Path) -> list[Finding]:
    """Return what keeps a folder from being a whole model, or one finding that it is."""
    problems = list(_problems(folder))
    return [Finding("model folder", "failed", f"{folder}: {problem}", _REASON) for problem in problems] or [
        ok("model folder", f"{folder} is whole")
    ]


def _problems(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield "there is no such folder"
        return
    try:
        if not read_object(folder / "config.json").get("architectures"):
            yield "config.json names no architectures, so that no engine knows which model this is"
    except (OSError, ValueError) as error:
        yield f"config.json cannot be read ({error})"
    yield from weight_problems(folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        yield f"it has no tokenizer ({', '.join(_TOKENIZERS[:2])})"


def weight_problems(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the weights: none, an unreadable index, shards that are missing, cut or incomplete."""
    named: dict[str, set[str]] = {}
    if (folder / INDEX).is_file():
        try:
            for tensor, shard in read_object(folder / INDEX)["weight_map"].items():
                named.setdefault(str(shard), set()).add(str(tensor))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            yield f"{INDEX} cannot be read ({error})"
            return
    shards = sorted(named) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not shards:
        pickles = [path.name for path in folder.glob("*.bin")]
        yield "it has no .safetensors weights" + (f" but {pickles[0]}, a pickle" if pickles else "")
    for shard in shards:
        path = folder / Path(shard).name
        try:
            missing = named.get(shard, set()) - set(read_header(path))
        except FileNotFoundError:
            left = " (an interrupted download left a part of it)" if list(folder.rglob(f"{shard}*.incomplete")) else ""
            yield f"{shard} named by its index is missing{left}"
        except (OSError, ValueError) as error:
            yield f"{shard} is cut or damaged ({error})"
        else:
            if missing:
                yield f"{shard} lacks {len(missing)} tensors that its index names, such as {min(missing)}"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; OSError or ValueError otherwise."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
