"""The tokenizer's part of a GGUF file: tokens, their kinds, merges or scores, and how text is split before merging."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, unsupported
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.merger.check.tokens import chat_template
from loraline.merger.engines.rendering import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's kinds of tokens."""
# How llama.cpp names the ways to split text that it knows, by the pattern in tokenizer.json. Another way gives other
# ids without any error, so a pattern that is not here is refused.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


@dataclass(frozen=True)
class Vocabulary:
    """What the writer needs; `tokens` has one entry for each row of the embedding."""

    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    """`bos`, `eos` and `pad`, those that there are."""
    add_bos: bool
    template: str


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """Read a folder's tokenizer. UNIMPLEMENTED for tokenizers that llama.cpp would read otherwise, or not at all."""
    # Not the file: for some model types transformers replaces parts of what tokenizer.json says, and training and
    # serving use what it makes of it.
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    if (content.get("model") or {}).get("type") == "BPE" and not content["model"].get("byte_fallback"):
        tokens, kinds, merges, scores, split, model = *_byte_level(content, rows), "gpt2"
    elif (folder / "tokenizer.model").is_file():
        tokens, kinds, merges, scores, split, model = *_sentencepiece(folder, content, rows), "llama"
    else:
        raise _unknown("neither a byte-level BPE in tokenizer.json nor a tokenizer.model")
    files = read_tokenizer(folder)
    # Asked of the tokenizer, as a SentencePiece model alone leaves the files without ids.
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    known = {name: number for name, number in ids.items() if number is not None}
    return Vocabulary(
        model,
        split,
        tokens,
        kinds,
        merges,
        scores,
        known,
        _adds_bos(content, files.config, known),
        chat_template(folder),
    )


def _adds_bos(content: dict[str, Any], config: dict[str, Any], ids: dict[str, int]) -> bool:
    """Whether encoding puts the begin token first, as the tokenizer's post-processor or its config says."""
    if "bos" not in ids:
        return False
    if "add_bos_token" in config:
        return bool(config["add_bos_token"])
    processors = [content.get("post_processor") or {}]
    processors += processors[0].get("processors") or []
    singles = [step for processor in processors for step in processor.get("single") or []]
    return bool(singles) and "SpecialToken" in singles[0]


def _byte_level(content: dict[str, Any], rows: int) -> tuple[list[str], list[int], list[str], list[float], str]:
    vocabulary: dict[str, int] = content["model"]["vocab"]
    tokens, kinds = _padding(rows)
    for text, number in vocabulary.items():
        _place(tokens, kinds, number, text, NORMAL)
    for added in content.get("added_tokens") or ():
        _place(tokens, kinds, added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED)
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"].get("merges") or ()]
    return tokens, kinds, merges, [], _split(content.get("pre_tokenizer") or {})


def _split(pre: dict[str, Any]) -> str:
    steps = pre.get("pretokenizers") or [pre]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    byte_level = next((step for step in steps if step.get("type") == "ByteLevel"), {})
    if byte_level.get("add_prefix_space"):
        raise _unknown("add_prefix_space is set")
    if not patterns and byte_level.get("use_regex", True) and len(steps) == 1:
        return "gpt-2"
    if len(patterns) == 1 and patterns[0] in _SPLITS and not byte_level.get("use_regex", True):
        return _SPLITS[patterns[0]]
    raise _unknown(f"text is split by {str(patterns or [step.get('type') for step in steps])[:80]}")


def _sentencepiece(
    folder: Path, content: dict[str, Any], rows: int
) -> tuple[list[str], list[int], list[str], list[float], str]:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise unsupported("A GGUF of a SentencePiece tokenizer here", "Install loraline-merger[export].") from error
    _require_llama_like(folder / "tokenizer.model")
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens, kinds = _padding(rows)
    scores = [-10000.0] * rows
    for number in range(processor.vocab_size()):
        kind = NORMAL
        if processor.is_unknown(number):
            kind = UNKNOWN
        elif processor.is_control(number):
            kind = CONTROL
        elif processor.is_byte(number):
            kind = BYTE
        elif processor.is_unused(number):
            kind = UNUSED
        _place(tokens, kinds, number, processor.id_to_piece(number), kind)
        scores[number] = processor.get_score(number)
    for added in content.get("added_tokens") or ():
        if added["id"] >= processor.vocab_size():
            _place(tokens, kinds, added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED)
            scores[added["id"]] = -1000.0
    return tokens, kinds, [], scores, "default"


def _require_llama_like(path: Path) -> None:
    """Refuse what llama.cpp's reading of SentencePiece, made for Llama's, would split otherwise without any error."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # of protobuf, whose kinds differ by version
        raise _unknown(f"{path.name} is no SentencePiece model") from error
    normal = model.normalizer_spec
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise _unknown("its SentencePiece model is no BPE")
    if normal.name != "identity" or normal.remove_extra_whitespaces or not normal.add_dummy_prefix:
        raise _unknown(f"its SentencePiece model changes text before splitting it ({normal.name or 'unnamed rule'})")


def _padding(rows: int) -> tuple[list[str], list[int]]:
    """Rows of the embedding that no token uses need a name of their own."""
    return [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows


def _place(tokens: list[str], kinds: list[int], number: int, text: str, kind: int) -> None:
    if not 0 <= number < len(tokens):
        raise _unknown(f"token {text!r} has id {number}, the embedding has {len(tokens)} rows")
    tokens[number], kinds[number] = text, kind


def _unknown(why: str) -> LoralineError:
    return unsupported(f"A GGUF of this tokenizer ({why})", "Serve the model with inference.")
