"""The tokenizer against itself, config.json, generation_config.json and the rows of the embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loraline.core.model_files.tokenizer import SPECIAL_NAMES, TokenizerFiles
from loraline.merger.check.findings import Finding

UNLOADABLE_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Class names of transformers 5 that older serving libraries cannot import -> the one every version has."""
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE_CLASSES = {
    "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "mixtral": "LlamaTokenizer", "phi3": "LlamaTokenizer",
    "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer", "gemma3_text": "GemmaTokenizer",
}  # fmt: skip
"""Model type -> the class that reads its tokenizer.model, in transformers 4 and 5."""
_BLIND_CLASSES = frozenset(
    {
        "PreTrainedTokenizer", "PreTrainedTokenizerFast", "PythonBackend", "TokenizersBackend",
        "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizerFast",
        "BloomTokenizerFast", "BertTokenizer", "BertTokenizerFast", "MarianTokenizer", "M2M100Tokenizer",
        "T5Tokenizer", "T5TokenizerFast", "SiglipTokenizer", "XLNetTokenizer", "XLNetTokenizerFast",
    }
)  # fmt: skip
"""Classes that read another file than tokenizer.model, or make of it what it is not."""


def check_tokenizer(
    files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any], rows: int | None
) -> list[Finding]:
    """Return what is wrong; `rows` are the rows of the embedding, None when unknown."""
    findings = [
        Finding("FILE_UNREADABLE", "error", name, f"{name} cannot be read: {why}.", "Take the base's file.", False)
        for name, why in files.unreadable.items()
    ]
    if not any(files.has(name) for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        message = "The folder has no tokenizer.json, tokenizer.model or vocabulary."
        return [
            *findings,
            Finding("TOKENIZER_MISSING", "error", "tokenizer.json", message, "Copy the base's tokenizer."),
        ]
    findings += [
        *_led_past(files, config),
        *_files_named(files),
        *_class(files),
        *_special(files),
        *_blank(files, config, generation),
    ]
    findings += [*_ranges(files, config, generation, rows), *_agreement(files, config, generation)]
    return findings


def _led_past(files: TokenizerFiles, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Say when tokenizer.model is the only vocabulary and tokenizer_config.json leads loaders past it.

    Loaders find the file by its usual name as long as the class reads it and nothing else is said about its place.
    """
    if not files.sentencepiece_alone or files.config.get("auto_map"):
        return
    code, name = "TOKENIZER_MODEL_UNNAMED", files.config.get("tokenizer_class")
    if "vocab_file" in files.config and files.config["vocab_file"] is None:
        message = "vocab_file is null beside tokenizer.model: transformers 4 then opens nothing (not NoneType)."
        yield Finding(code, "warning", TOKENIZER_CONFIG, message, "Remove vocab_file; tokenizer.model is found.", True)
    if name is None or (isinstance(name, str) and name in _BLIND_CLASSES):
        right = sentencepiece_class(config)
        message = (
            f"tokenizer.model is the only vocabulary, but tokenizer_class is {name}, which does not read it: loaders "
            'fail ("expected str, bytes or os.PathLike object, not NoneType"), or split text otherwise without a word.'
        )
        remedy = f"Set tokenizer_class to {right}." if right else "Set tokenizer_class to the base's."
        yield Finding(code, "warning", TOKENIZER_CONFIG, message, remedy, bool(right))


def sentencepiece_class(config: Mapping[str, Any]) -> str:
    """Return the class that reads this model's tokenizer.model; empty when it cannot be told from config.json."""
    return SENTENCEPIECE_CLASSES.get(str(config.get("model_type")), "")


def _files_named(files: TokenizerFiles) -> Iterator[Finding]:
    for name in ("vocab_file", "tokenizer_file"):
        value = files.config.get(name)
        if not isinstance(value, str) or not value:
            continue
        message, remedy = "", f"Remove {name}: loaders find the file by its usual name."
        if not (files.folder / value).is_file():
            message = f"{name} names {value!r}, which is not in the folder."
        elif name == "vocab_file" and files.sentencepiece_alone:
            message = f"{name} names {value!r}, which transformers 4 looks for where the server was started, not here."
        if message:
            yield Finding("TOKENIZER_FILE_MISSING", "warning", TOKENIZER_CONFIG, message, remedy, True)


def _class(files: TokenizerFiles) -> Iterator[Finding]:
    name = files.config.get("tokenizer_class")
    if isinstance(name, str) and name in UNLOADABLE_CLASSES and not files.sentencepiece_alone:
        message = f"tokenizer_class is {name}, which only transformers 5 has."
        remedy = f"Set it to {UNLOADABLE_CLASSES[name]}, which every version loads."
        yield Finding("TOKENIZER_CLASS_UNKNOWN", "warning", TOKENIZER_CONFIG, message, remedy, True)


def _special(files: TokenizerFiles) -> Iterator[Finding]:
    if not files.ids:
        return
    for name in SPECIAL_NAMES:
        text = files.token(name)
        if text and text.strip() and text not in files.ids:
            message = f"{name} {text!r} is no single token of the vocabulary."
            remedy = "Take the base's tokenizer, or name a token that exists."
            yield Finding("SPECIAL_TOKEN_NOT_SINGLE", "error", TOKENIZER_CONFIG, message, remedy)
    for text in files.more_special():
        if text not in files.ids:
            message = f"The special token {text!r} is no single token of the vocabulary; it gets a new id when loaded."
            remedy = "Take the base's tokenizer, or remove it from additional_special_tokens."
            yield Finding("SPECIAL_TOKEN_NOT_SINGLE", "warning", TOKENIZER_CONFIG, message, remedy)


def _blank(files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[Finding]:
    for file, value in files.blank_eos():
        right = right_eos(files, config, generation)
        message = f"eos_token is blank ({value!r}); answers will not end."
        remedy = f"Set it to {right!r}." if right else "Set it to the token that ends an answer."
        yield Finding("EOS_TOKEN_BLANK", "error", file, message, remedy, bool(right))


def right_eos(files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any]) -> str:
    """Return the token that should be the eos_token of a folder whose own is blank; empty when it cannot be told."""
    for ids in (token_ids(generation.get("eos_token_id")), token_ids(config.get("eos_token_id"))):
        for number in ids:
            text = files.text_of(number)
            if text and text.strip():
                return text
    return "</s>" if "</s>" in files.ids or (not files.ids and files.has("tokenizer.model")) else ""


def token_ids(value: Any) -> list[int]:
    """Return the ids of a config field that may be absent, one id or a list."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int) and not isinstance(number, bool)]


def _ranges(
    files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any], rows: int | None
) -> Iterator[Finding]:
    if rows is None:
        return
    if files.ids and max(files.ids.values()) >= rows:
        greatest = max(files.ids, key=lambda text: files.ids[text])
        message = f"Token {greatest!r} has id {files.ids[greatest]}, but the embedding has {rows} rows."
        remedy = "Use the tokenizer that belongs to the weights; a GPU asserts on such an id (device-side assert)."
        yield Finding("TOKEN_ID_OUT_OF_RANGE", "error", "tokenizer.json", message, remedy)
    for file, source in (("config.json", config), ("generation_config.json", generation)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for number in token_ids(source.get(name)):
                if not 0 <= number < rows:
                    message = f"{name} is {number}, but the embedding has {rows} rows."
                    remedy = "Set it to the tokenizer's id, or to null."
                    yield Finding("TOKEN_ID_OUT_OF_RANGE", "error", file, message, remedy, True)


def _agreement(files: TokenizerFiles, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[Finding]:
    eos = files.token_id("eos_token")
    file, stops = stopping_ids(config, generation)
    if eos is not None and eos not in stops:
        message = f"The tokenizer's eos_token is id {eos}, but generation stops at {stops or 'nothing'}."
        yield Finding("EOS_IDS_DISAGREE", "warning", file, message, f"Add {eos} to eos_token_id.", True)
    if eos is None and not stops and not files.token("eos_token") and files.ids:
        message = "Neither the tokenizer nor the configs name a token that ends an answer; answers will not end."
        remedy = "Set eos_token and eos_token_id to what the training ended answers with."
        yield Finding("EOS_TOKEN_MISSING", "warning", TOKENIZER_CONFIG, message, remedy)
    bos = files.token_id("bos_token")
    pad = files.token_id("pad_token")
    for name, source in (("config.json", config), ("generation_config.json", generation)):
        begin = token_ids(source.get("bos_token_id"))
        if bos is not None and begin and begin[0] != bos:
            message = f"bos_token_id is {begin[0]}, the tokenizer's bos_token is id {bos}."
            yield Finding("BOS_IDS_DISAGREE", "warning", name, message, f"Set it to {bos}.", True)
        said = token_ids(source.get("pad_token_id"))
        if pad is not None and said and said[0] >= 0 and said[0] != pad:
            message = f"pad_token_id is {said[0]}, the tokenizer's pad_token is id {pad}."
            yield Finding("PAD_IDS_DISAGREE", "warning", name, message, f"Set it to {pad}.", True)


def stopping_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return the file that decides where generation stops, and its ids: generation_config.json where there is one."""
    if generation:
        return "generation_config.json", token_ids(generation.get("eos_token_id"))
    return "config.json", token_ids(config.get("eos_token_id"))
