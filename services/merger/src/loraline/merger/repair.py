"""Mends what can be mended safely in a writable copy of a model folder, each repair reported as the finding it ends."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.evidence.receipt import load_receipt
from loraline.core.model_files.tokenizer import TokenizerFiles, read_tokenizer
from loraline.merger.check.dimensions import head_dim
from loraline.merger.check.families import find_layout
from loraline.merger.check.findings import Finding
from loraline.merger.check.folder import base_eos, check_folder, check_weights
from loraline.merger.check.tokenizer import (
    TOKENIZER_CONFIG,
    UNLOADABLE_CLASSES,
    right_eos,
    sentencepiece_class,
    stopping_ids,
    token_ids,
)
from loraline.merger.check.tokens import chat_template
from loraline.merger.json_files import read_json
from loraline.merger.sync import TOKENIZER_FILES, files_to_sync, write_json
from loraline.merger.weights.header import read_header
from loraline.merger.weights.layout import INDEX_FILE, SHARD_NAMES, shard_path

_MAX_ROUNDS = 5
_ID_OF = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}


def repair_folder(folder: Path, base: Path | None = None) -> list[Finding]:
    """Apply every safe repair to `folder` and return the findings that are gone after it.

    In rounds, as some defects hide others: sizes are not compared while the config claims quantised weights.
    """
    gone: list[Finding] = []
    found = check_folder(folder, base)
    for _ in range(_MAX_ROUNDS):
        mendable = [finding for finding in found if finding.repairable and finding.code in _REPAIRS]
        for finding in mendable:
            _REPAIRS[finding.code](folder, finding, base)
        after = check_folder(folder, base)
        if after == found:
            break
        gone += [finding for finding in mendable if finding not in after]
        found = after
    return gone


def adopt_training(folder: Path, adapter: Path) -> list[Finding]:
    """Bring into a merged folder what the adapter was trained with and the base lacks: template and end token."""
    changes: list[Finding] = []
    if not chat_template(folder) and chat_template(adapter) and (adapter / RECEIPT_FILE).exists():
        changes.append(adopt_template(folder, adapter, "the base has none"))
    if (adapter / RECEIPT_FILE).exists():
        eos = load_receipt(adapter).eos_token_id
        config, generation = _read(folder / "config.json"), _read(folder / "generation_config.json")
        file, stops = stopping_ids(config, generation)
        if eos not in stops:
            _add_stop(folder / file, eos, stops)
            message = (
                f"The adapter learned to end answers with id {eos}, but generation stopped at {stops or 'nothing'}."
            )
            changes.append(Finding("EOS_NOT_STOPPING", "warning", file, message, f"{eos} was added to eos_token_id."))
    return changes


def adopt_template(folder: Path, adapter: Path, why: str) -> Finding:
    """Write the adapter's chat template into the folder."""
    (folder / "chat_template.jinja").write_text(chat_template(adapter), encoding="utf-8")
    message = f"The chat template was taken from the adapter: {why}."
    remedy = "Nothing to do; the token receipt proves that it renders the ids of the training."
    return Finding("CHAT_TEMPLATE_FROM_ADAPTER", "warning", "chat_template.jinja", message, remedy)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "CONFIG_UNREADABLE") if path.is_file() else {}


def _edit(path: Path, **values: Any) -> None:
    content = _read(path)
    content.update(values)
    write_json(path, content)


def _tokenizer_and_configs(folder: Path) -> tuple[TokenizerFiles, dict[str, Any], dict[str, Any]]:
    return read_tokenizer(folder), _read(folder / "config.json"), _read(folder / "generation_config.json")


def _blank_eos(folder: Path, finding: Finding, base: Path | None) -> None:
    files, config, generation = _tokenizer_and_configs(folder)
    right = base_eos(base) or right_eos(files, config, generation)
    content = _read(folder / finding.file)
    old = content.get("eos_token")
    content["eos_token"] = right
    if isinstance(old, dict) and ("__type" in old or finding.file != TOKENIZER_CONFIG):  # others do not load
        content["eos_token"] = {**old, "content": right}
    write_json(folder / finding.file, content)


def _lead_to_vocabulary(folder: Path, finding: Finding, base: Path | None) -> None:
    """Leave nothing in tokenizer_config.json that leads loaders past tokenizer.model; they find it by its name.

    Naming it would not do: transformers 4 takes the name for a path from where the server was started.
    """
    content, right = _read(folder / finding.file), sentencepiece_class(_read(folder / "config.json"))
    if "vocab_file" in content and content["vocab_file"] is None:
        del content["vocab_file"]
        write_json(folder / finding.file, content)
    elif right:
        write_json(folder / finding.file, {**content, "tokenizer_class": right})
    else:
        _restore(folder, finding, base)


def _tokenizer_class(folder: Path, finding: Finding, base: Path | None) -> None:
    name = _read(folder / finding.file)["tokenizer_class"]
    _edit(folder / finding.file, tokenizer_class=UNLOADABLE_CLASSES[name])


def _eos_ids(folder: Path, finding: Finding, base: Path | None) -> None:
    files, config, generation = _tokenizer_and_configs(folder)
    file, stops = stopping_ids(config, generation)
    eos = files.token_id("eos_token")
    if eos is not None:
        _add_stop(folder / file, eos, stops)


def _add_stop(path: Path, eos: int, stops: list[int]) -> None:
    _edit(path, eos_token_id=[eos, *stops] if stops else eos)


def _bos_ids(folder: Path, finding: Finding, base: Path | None) -> None:
    _edit(folder / finding.file, bos_token_id=read_tokenizer(folder).token_id("bos_token"))


def _named_files(folder: Path, finding: Finding, base: Path | None) -> None:
    """Forget names of files that are not there; the loader then finds those that are by their usual names."""
    config, files = _read(folder / finding.file), read_tokenizer(folder)
    for name in ("vocab_file", "tokenizer_file"):
        here = isinstance(config.get(name), str) and (folder / config[name]).is_file()
        if config.get(name) and (not here or (name == "vocab_file" and files.sentencepiece_alone)):
            del config[name]
    write_json(folder / finding.file, config)


def _restore(folder: Path, finding: Finding, base: Path | None) -> None:
    """Take the base's file; a tokenizer only as a whole, as its files are made for each other."""
    if base is None:
        return
    names = [finding.file]
    if finding.file in TOKENIZER_FILES:
        names = [name for name in files_to_sync(base) if name in TOKENIZER_FILES]
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
    for name in names:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _base_template(folder: Path, finding: Finding, base: Path | None) -> None:
    if base is not None and chat_template(base):
        (folder / "chat_template.jinja").write_text(chat_template(base), encoding="utf-8")


def _pad_ids(folder: Path, finding: Finding, base: Path | None) -> None:
    _edit(folder / finding.file, pad_token_id=read_tokenizer(folder).token_id("pad_token"))


def _ids_in_range(folder: Path, finding: Finding, base: Path | None) -> None:
    if finding.file == "tokenizer.json":
        _restore(folder, finding, base)
        return
    layout = find_layout(check_weights(folder)[0])
    content, files = _read(folder / finding.file), read_tokenizer(folder)
    for name, token in _ID_OF.items():
        ids = token_ids(content.get(name))
        kept = [number for number in ids if layout is None or 0 <= number < layout.rows]
        if kept != ids:
            content[name] = kept or files.token_id(token)
    write_json(folder / finding.file, content)


def _sizes(folder: Path, finding: Finding, base: Path | None) -> None:
    """Write what the shapes say into config.json; heads cannot be told from shapes and are left."""
    config, layout = _read(folder / "config.json"), find_layout(check_weights(folder)[0])
    if layout is None:
        return
    family = layout.family
    if finding.code == "KV_HEADS_MISMATCH":
        size, key = head_dim(config, family), layout.size_of(family.key)
        if size and key:
            config[family.kv_heads] = key // size
    values = {
        "VOCAB_SIZE_MISMATCH": ("vocab_size", layout.rows),
        "HIDDEN_SIZE_MISMATCH": (family.hidden, layout.hidden),
        "INTERMEDIATE_SIZE_MISMATCH": (family.intermediate, layout.intermediate),
        "LAYER_COUNT_MISMATCH": (family.layer_count, max(layout.layers) + 1),
    }
    if finding.code in values:
        name, value = values[finding.code]
        config[name] = value
    write_json(folder / "config.json", config)


def _counted(folder: Path, finding: Finding, base: Path | None) -> None:
    """Write a count that the finding took from the weights; its message begins with the field and ends with both."""
    field = finding.message.split(" ", 1)[0]
    counted = re.search(r"the weights have (\d+)", finding.message)
    if counted:
        _edit(folder / "config.json", **{field: int(counted[1])})


def _tie(folder: Path, finding: Finding, base: Path | None) -> None:
    _edit(folder / "config.json", tie_word_embeddings=True)


def _drop_quantization(folder: Path, finding: Finding, base: Path | None) -> None:
    config = _read(folder / "config.json")
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)


def _index(folder: Path, finding: Finding, base: Path | None) -> None:
    weight_map: dict[str, str] = {}
    index = _read(folder / INDEX_FILE)
    size = 0
    for name in sorted({*index["weight_map"].values(), *(path.name for path in folder.glob(SHARD_NAMES))}):
        header = read_header(shard_path(folder, name))
        weight_map.update({tensor.name: name for tensor in header.tensors})
        size += header.data_size
    metadata = index.get("metadata")
    index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    index["weight_map"] = dict(sorted(weight_map.items()))
    write_json(folder / INDEX_FILE, index)


def _base_config(folder: Path, finding: Finding, base: Path | None) -> None:
    """Take the base's value of the one field that the finding names, when its shapes are not against it."""
    if base is None:
        return
    field = finding.message.split(" ", 1)[0]
    mine, theirs = _read(folder / "config.json"), _read(base / "config.json")
    layout = find_layout(check_weights(folder)[0])
    from_shapes = set() if layout is None else {"vocab_size", layout.family.hidden, layout.family.layer_count}
    if field in from_shapes:
        return
    if field in theirs:
        mine[field] = theirs[field]
    else:
        mine.pop(field, None)
    write_json(folder / "config.json", mine)


_REPAIRS: dict[str, Callable[[Path, Finding, Path | None], None]] = {
    "EOS_TOKEN_BLANK": _blank_eos,
    "TOKENIZER_MODEL_UNNAMED": _lead_to_vocabulary,
    "TOKENIZER_CLASS_UNKNOWN": _tokenizer_class,
    "EOS_IDS_DISAGREE": _eos_ids,
    "PAD_IDS_DISAGREE": _pad_ids,
    "BOS_IDS_DISAGREE": _bos_ids,
    "TOKENIZER_FILE_MISSING": _named_files,
    "FILE_MISSING": _restore,
    "FILE_UNREADABLE": _restore,
    "TOKENIZER_MISSING": _restore,
    "SPECIAL_TOKEN_NOT_SINGLE": _restore,
    "CHAT_TEMPLATE_MISSING": _base_template,
    "EXPERT_COUNT_MISMATCH": _counted,
    "EXPERT_SIZE_MISMATCH": _counted,
    "TOKEN_ID_OUT_OF_RANGE": _ids_in_range,
    "VOCAB_SIZE_MISMATCH": _sizes,
    "HIDDEN_SIZE_MISMATCH": _sizes,
    "INTERMEDIATE_SIZE_MISMATCH": _sizes,
    "LAYER_COUNT_MISMATCH": _sizes,
    "KV_HEADS_MISMATCH": _sizes,
    "TIE_WORD_EMBEDDINGS_MISMATCH": _tie,
    "QUANTIZATION_LEFT_OVER": _drop_quantization,
    "INDEX_MISMATCH": _index,
    "CONFIG_DIFFERS_FROM_BASE": _base_config,
}
