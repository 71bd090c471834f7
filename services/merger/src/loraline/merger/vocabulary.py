"""What a merge changes in config and tokenizer on purpose: a grown vocabulary, embeddings that are two weights now."""

from __future__ import annotations

import shutil
from pathlib import Path

from loraline.core.errors import failed_precondition
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.merger.check.findings import Finding
from loraline.merger.json_files import read_json
from loraline.merger.sync import TOKENIZER_FILES, write_json

CONFIG = "config.json"


def write_vocabulary(folder: Path, rows: int) -> list[Finding]:
    """Write the embedding's rows into config.json, when they are others than it says."""
    config = read_json(folder / CONFIG, "CONFIG_UNREADABLE")
    before = config.get("vocab_size")
    if before == rows:
        return []
    config["vocab_size"] = rows
    write_json(folder / CONFIG, config)
    message = f"vocab_size changed from {before} to {rows}, as the adapter trained rows for added tokens."
    return [Finding("VOCABULARY_GROWN", "info", CONFIG, message, "Nothing to do.")]


def write_untied(folder: Path) -> list[Finding]:
    """Say in config.json that input and output embedding are two weights."""
    config = read_json(folder / CONFIG, "CONFIG_UNREADABLE")
    before = config.get("tie_word_embeddings")
    config["tie_word_embeddings"] = False
    write_json(folder / CONFIG, config)
    message = (
        f"tie_word_embeddings changed from {before} to False, as training made input and output embedding differ; the "
        "output's is written as a weight of its own."
    )
    return [Finding("EMBEDDINGS_UNTIED", "info", CONFIG, message, "Nothing to do; the model is larger by one weight.")]


def adopt_tokenizer(folder: Path, adapter: Path, *, grown: bool) -> list[Finding]:
    """Take the adapter's tokenizer files where its vocabulary is the base's plus added tokens.

    Raises FAILED_PRECONDITION TOKENIZER_NOT_EXTENDED when the vocabulary grew and the adapter's tokenizer gives the
    base's tokens other ids: then nobody knows which rows belong to which token.
    """
    mine, theirs = read_tokenizer(folder).ids, read_tokenizer(adapter).ids
    moved = next((text for text, number in mine.items() if theirs.get(text) != number), None)
    if not theirs or not mine or (moved is not None and not grown):
        return []
    if moved is not None:
        raise failed_precondition(
            "TOKENIZER_NOT_EXTENDED",
            f"The adapter added tokens, yet its tokenizer gives {moved!r} the id {theirs.get(moved)} where the base "
            f"has {mine[moved]}. Merge into the base it was trained on.",
            file="tokenizer.json",
            token=moved,
        )
    added = sorted(set(theirs) - set(mine))
    if not added:
        return []
    message = f"Taken from the adapter, which added {len(added)} tokens ({', '.join(added[:3])}, …)."
    changes = []
    for name in TOKENIZER_FILES:
        if (adapter / name).is_file() and not (adapter / name).is_symlink():
            shutil.copyfile(adapter / name, folder / name)
            changes.append(Finding("VOCABULARY_GROWN", "info", name, message, "Nothing to do."))
    return changes
