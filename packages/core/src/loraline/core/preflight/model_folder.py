"""Whether a model folder is whole, and its tokenizer fits its weights. Nothing is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraline.core.artifacts.safetensors import read_header
from loraline.core.model_files.objects import load_object, text_setting
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.core.preflight.finding import Finding, ok

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_REASON = "MODEL_INCOMPLETE"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
"""The tensor whose rows are the token ids, as the families of language models name it."""


def check_model_folder(folder: Path) -> list[Finding]:
    """Return what keeps a folder from being a whole model, or one finding that it is."""
    found = [Finding("model folder", "failed", f"{folder}: {problem}", _REASON) for problem in _problems(folder)]
    return found or vocabulary_findings(folder) or [ok("model folder", f"{folder} is whole")]


def _problems(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield "there is no such folder"
        return
    try:
        if not load_object(folder / "config.json").get("architectures"):
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
            for tensor, shard in load_object(folder / INDEX)["weight_map"].items():
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


def vocabulary_findings(folder: Path) -> list[Finding]:
    """Compare config, tokenizer and embedding of a folder whose weights are whole; empty when they fit each other.

    `failed` is what no engine may load. Tokens added to the vocabulary that have no row are a warning: a padding token
    that no prompt uses does no harm, and prompts with such an id are refused one by one.
    """
    config = load_object(folder / "config.json")
    files, rows = read_tokenizer(folder), _embedding_rows(folder)
    found = []
    said = _vocab_size(config)
    if None not in (said, rows) and said != rows:
        text = f"config.json says vocab_size {said}; the embedding has {rows} rows"
        found.append(Finding("model folder", "failed", f"{folder.name}: {text}", "VOCAB_SIZE_MISMATCH"))
    if rows is not None and files.ids and max(files.ids.values()) >= rows:
        token = max(files.ids, key=lambda text: files.ids[text])
        level = "failed" if files.own_end > rows else "warning"
        text = f"the tokenizer gives {token!r} the id {files.ids[token]}; the embedding has {rows} rows"
        found.append(Finding("model folder", level, f"{folder.name}: {text}", "TOKEN_ID_OUT_OF_RANGE"))
    for file, value in files.blank_eos()[:1]:
        text = f"eos_token is blank ({value!r}) in {file}; answers may not end"
        found.append(Finding("model folder", "warning", f"{folder.name}: {text}", "EOS_TOKEN_BLANK"))
    return found


def _vocab_size(config: dict[str, Any]) -> int | None:
    """Return the size that config.json states; None where it states none, or where the model's own code reads it."""
    said = text_setting(config, "vocab_size")
    return said if isinstance(said, int) and not config.get("auto_map") else None


def _embedding_rows(folder: Path) -> int | None:
    """Return how many token ids the weights know; None where no tensor, or several that differ, could tell."""
    rows = set()
    for path in folder.glob("*.safetensors"):
        for name, entry in read_header(path).items():
            if _EMBEDDING.search(name) and entry.get("dtype") in ("F32", "F16", "BF16") and len(entry["shape"]) == 2:
                rows.add(int(entry["shape"][0]))
    return rows.pop() if len(rows) == 1 else None
