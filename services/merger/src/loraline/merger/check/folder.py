"""Checks a whole model folder and never raises for what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError
from loraline.core.model_files.objects import load_object
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.merger.check.dimensions import check_dimensions
from loraline.merger.check.families import find_layout
from loraline.merger.check.findings import Finding, from_error, gravest_first
from loraline.merger.check.tokenizer import check_tokenizer
from loraline.merger.check.tokens import chat_template
from loraline.merger.sync import TOKENIZER_FILES
from loraline.merger.weights.header import ShardHeader, TensorInfo, plain_weights, read_header
from loraline.merger.weights.layout import (
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    index_problems,
    no_weights,
    read_index,
    shard_path,
    unnamed_shards,
)

TOKENIZER, TIED = "tokenizer.json", "tie_word_embeddings"
_RESTORABLE = {
    "FILE_MISSING", "FILE_UNREADABLE", "TOKENIZER_MISSING", "TOKENIZER_MODEL_UNNAMED", "SPECIAL_TOKEN_NOT_SINGLE",
}  # fmt: skip
"""Mended by the base's file, where a base is given."""


def check_folder(folder: Path, base: Path | None = None) -> list[Finding]:
    """Return everything found in a model folder, gravest first; with `base`, also what differs from it."""
    config, findings = _config(folder)
    tensors, weight_findings = check_weights(folder)
    findings += weight_findings
    if config and tensors:
        findings += check_dimensions(config, tensors)
        findings += _leftovers(config, tensors)
    layout = find_layout(tensors)
    generation, problems = _json(folder / "generation_config.json", needed=False)
    findings += problems
    findings += check_tokenizer(read_tokenizer(folder), config, generation, layout.rows if layout else None)
    template, problems = _template(folder)
    findings += problems
    if not template and not problems:
        message = "There is no chat template: chat requests cannot be answered."
        remedy = "Put chat_template.jinja beside the tokenizer, unless this is a plain completion model."
        findings.append(Finding("CHAT_TEMPLATE_MISSING", "info", "chat_template.jinja", message, remedy))
    if base is not None:
        findings = [_restorable(finding, base, layout.rows if layout else 0) for finding in findings]
        findings += compare_with_base(config, tensors, base)
    return gravest_first(dict.fromkeys(findings))


def _restorable(finding: Finding, base: Path, rows: int) -> Finding:
    """Mark what a file of the base mends; a tokenizer only where the base's ids fit the embedding."""
    if finding.code == "TIE_WORD_EMBEDDINGS_MISMATCH":  # an output embedding may be lost: only a tied base tells
        return replace(finding, repairable=_json(base / "config.json", needed=True)[0].get(TIED) is True)
    if finding.code == "EOS_TOKEN_BLANK":
        return replace(finding, repairable=finding.repairable or bool(base_eos(base)))
    if finding.code == "CHAT_TEMPLATE_MISSING":
        return replace(finding, repairable=bool(_template(base)[0]))
    mendable = finding.code in _RESTORABLE or (finding.code, finding.file) == ("TOKEN_ID_OUT_OF_RANGE", TOKENIZER)
    if not mendable or not (base / finding.file).is_file():
        return finding
    ids = read_tokenizer(base).ids
    fits = finding.file not in TOKENIZER_FILES or (bool(ids) and bool(rows) and max(ids.values()) < rows)
    return replace(finding, repairable=finding.repairable or fits)


def base_eos(base: Path | None) -> str:
    """Return the end token of a base's tokenizer; empty without a base, or where it has none that can be seen."""
    return (read_tokenizer(base).token("eos_token") or "").strip() if base is not None else ""


def _template(folder: Path) -> tuple[str, list[Finding]]:
    try:
        return chat_template(folder), []
    except LoralineError as error:
        return "", [from_error(error, "chat_template.jinja")]


def check_weights(folder: Path) -> tuple[dict[str, TensorInfo], list[Finding]]:
    """Read all headers; return the tensors that could be read, and what is wrong with index and shards."""
    findings = [
        Finding(
            "PICKLE_WEIGHTS", "warning", path.name, f"{path.name} is a pickle; loading it can run code.", "Delete it."
        )
        for path in sorted(folder.iterdir())
        if path.suffix in PICKLE_SUFFIXES
    ]
    shards: list[ShardHeader] = []
    try:
        indexed = (folder / INDEX_FILE).exists()
        weight_map = read_index(folder / INDEX_FILE) if indexed else {}
        if not indexed and not (folder / SINGLE_FILE).exists():
            raise no_weights(folder)
    except LoralineError as error:
        return {}, [*findings, from_error(error, INDEX_FILE)]
    for name in dict.fromkeys(weight_map.values()) if indexed else [SINGLE_FILE]:
        try:
            shards.append(read_header(shard_path(folder, name)))
        except LoralineError as error:
            findings.append(from_error(error, name))
    if indexed and not any(finding.severity == "error" for finding in findings):
        problems = [*index_problems(weight_map, tuple(shards)), *unnamed_shards(folder, weight_map)]
        if problems:
            message = f"The index does not match its shards: {problems[0]} ({len(problems)} such)."
            remedy = "Write the index anew from the shards."
            findings.append(Finding("INDEX_MISMATCH", "error", INDEX_FILE, message, remedy, _index_mendable(shards)))
    return {tensor.name: tensor for shard in shards for tensor in shard.tensors}, findings


def _index_mendable(shards: list[ShardHeader]) -> bool:
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    return len(names) == len(set(names))


def _config(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    config, findings = _json(folder / "config.json", needed=True)
    if config and not config.get("architectures"):
        message = "architectures is missing; serving libraries cannot tell which model this is."
        findings.append(Finding("ARCHITECTURES_MISSING", "error", "config.json", message, "Take the base's config."))
    if config.get("auto_map"):
        message = "auto_map asks for code that the model brings; it does not load without trust_remote_code."
        findings.append(Finding("REMOTE_CODE", "info", "config.json", message, "Allow it only if you trust the model."))
    return config, findings


def _json(path: Path, *, needed: bool) -> tuple[dict[str, Any], list[Finding]]:
    if not path.exists():
        missing = Finding("FILE_MISSING", "error", path.name, f"{path.name} is missing.", "Take the base's file.")
        return {}, [missing] if needed else []
    try:
        return load_object(path), []
    except (OSError, ValueError) as error:
        message = f"{path.name} cannot be read: {error}."
        return {}, [Finding("FILE_UNREADABLE", "error", path.name, message, "Take the base's file.")]


def _leftovers(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> list[Finding]:
    if config.get("quantization_config") and plain_weights(tensors.values()):
        message = "quantization_config is left over: all weights are plain floats."
        return [Finding("QUANTIZATION_LEFT_OVER", "error", "config.json", message, "Remove quantization_config.", True)]
    return []


def compare_with_base(config: dict[str, Any], tensors: dict[str, TensorInfo], base: Path) -> list[Finding]:
    """Return how names, shapes and the main config fields differ from the base's."""
    base_config, problems = _json(base / "config.json", needed=True)
    base_tensors, base_findings = check_weights(base)
    if problems or any(finding.severity == "error" for finding in base_findings):
        message = "The base itself cannot be read; nothing was compared with it."
        return [Finding("BASE_UNREADABLE", "warning", "", message, "Check the base alone.")]
    findings = []
    for name in sorted(set(base_tensors) - set(tensors))[:5]:
        findings.append(
            Finding("MISSING_TENSOR", "error", "", f"{name} of the base is missing.", "Save the model again.")
        )
    for name in sorted(set(tensors) & set(base_tensors)):
        if tensors[name].shape != base_tensors[name].shape:
            message = f"{name} is {list(tensors[name].shape)}, the base's is {list(base_tensors[name].shape)}."
            findings.append(
                Finding("SHAPE_DIFFERS_FROM_BASE", "warning", "", message, "Expected only for a new vocabulary.")
            )
    free = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config"}
    for name in sorted((set(config) | set(base_config)) - free):
        if config.get(name) != base_config.get(name):
            message = f"{name} is {config.get(name)!r}, the base has {base_config.get(name)!r}."
            remedy = "Take the base's value, unless the change is meant."
            findings.append(Finding("CONFIG_DIFFERS_FROM_BASE", "warning", "config.json", message, remedy, True))
    return findings
