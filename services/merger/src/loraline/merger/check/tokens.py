"""The tokenizer's files, read as data: which ids there are and what the special tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraline.core.errors import failed_precondition
from loraline.merger.check.pieces import piece_ids
from loraline.merger.json_files import load_object

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a folder say; ids are those of tokenizer.json, else of a SentencePiece tokenizer.model."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    special_map: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """File -> why it cannot be read."""

    def has(self, name: str) -> bool:
        """Whether the folder has the file."""
        return (self.folder / name).is_file()

    @property
    def sentencepiece_alone(self) -> bool:
        """Whether tokenizer.model is the only vocabulary, so that loaders must be led to it."""
        others = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
        return self.has("tokenizer.model") and not any(self.has(name) for name in others)

    def token(self, name: str) -> str | None:
        """Return a special token's text, such as that of `eos_token`; None when it is not set anywhere."""
        for source in (self.config, self.special_map):
            if source.get(name) is not None:
                return token_text(source[name])
        return None

    def token_id(self, name: str) -> int | None:
        """Return a special token's id, when it is set and one id."""
        text = self.token(name)
        return None if text is None else self.ids.get(text)

    def more_special(self) -> list[str]:
        """Return the additional special tokens that the configs list."""
        listed = [source.get("additional_special_tokens") for source in (self.config, self.special_map)]
        return [token_text(token) for tokens in listed if isinstance(tokens, list) for token in tokens]

    def text_of(self, token_id: int) -> str | None:
        """Return the token with this id."""
        return next((text for text, number in self.ids.items() if number == token_id), None)


def token_text(value: Any) -> str:
    """Return the text of a token that is written as a string or as an AddedToken object."""
    return str(value.get("content", "")) if isinstance(value, Mapping) else str(value)


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read what tokenizer files there are; what cannot be read is noted, not raised."""
    unreadable: dict[str, str] = {}
    config = _object(folder / "tokenizer_config.json", unreadable)
    special = _object(folder / "special_tokens_map.json", unreadable)
    ids = _ids(_object(folder / "tokenizer.json", unreadable))
    if not ids and not (folder / "tokenizer.json").exists():
        ids = piece_ids(folder / "tokenizer.model")
    ids.update({str(k): v for k, v in _object(folder / "added_tokens.json", unreadable).items() if isinstance(v, int)})
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        ids.update({token_text(token): int(number) for number, token in decoder.items() if str(number).isdigit()})
    return TokenizerFiles(folder, config, special, ids, unreadable)


def _object(path: Path, unreadable: dict[str, str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return load_object(path)
    except (OSError, ValueError) as error:
        unreadable[path.name] = str(error)
        return {}


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids.update({text: number for text, number in vocabulary.items() if isinstance(number, int)})
    elif isinstance(vocabulary, list):  # Unigram: pairs of text and score, the place is the id
        ids.update({str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair})
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids[token_text(token)] = token["id"]
    return ids


def chat_template(folder: Path) -> str:
    """Return the folder's chat template from its file, else from tokenizer_config.json; empty without one.

    FAILED_PRECONDITION CHAT_TEMPLATE_FAILED for a file that is no text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise failed_precondition(
                "CHAT_TEMPLATE_FAILED", f"{file.name} cannot be read: {error}. Take the base's file.", file=file.name
            ) from error
    value = read_tokenizer(folder).config.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""
