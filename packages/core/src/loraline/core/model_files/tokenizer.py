"""The tokenizer's files, read as data: which ids there are and what the special tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraline.core.model_files.objects import load_object
from loraline.core.model_files.pieces import piece_ids

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
    own_end: int = 0
    """One more than the greatest id of the vocabulary itself, without the tokens added to it; 0 when unknown."""

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

    def blank_eos(self) -> list[tuple[str, Any]]:
        """Return the files whose eos_token is empty or white space, each with what it says: answers would not end."""
        sources = {"tokenizer_config.json": self.config, "special_tokens_map.json": self.special_map}
        said = [(file, source.get("eos_token")) for file, source in sources.items()]
        return [(file, value) for file, value in said if value is not None and not token_text(value).strip()]

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


def read_token_names(folder: Path) -> TokenizerFiles:
    """Read the small files alone: which tokens are special, without ids; what cannot be read is noted, not raised."""
    unreadable: dict[str, str] = {}
    config = _object(folder / "tokenizer_config.json", unreadable)
    special = _object(folder / "special_tokens_map.json", unreadable)
    return TokenizerFiles(folder, config, special, unreadable=unreadable)


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read what tokenizer files there are; what cannot be read is noted, not raised."""
    named = read_token_names(folder)
    config, unreadable = named.config, named.unreadable
    document = _object(folder / "tokenizer.json", unreadable)
    ids = _own_ids(document)
    if not document and not (folder / "tokenizer.json").exists():
        ids = piece_ids(folder / "tokenizer.model")
    own_end = max(ids.values(), default=-1) + 1
    ids.update(_added_ids(document))
    ids.update({str(k): v for k, v in _object(folder / "added_tokens.json", unreadable).items() if isinstance(v, int)})
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        ids.update({token_text(token): int(number) for number, token in decoder.items() if str(number).isdigit()})
    return TokenizerFiles(folder, config, named.special_map, ids, unreadable, own_end)


def _object(path: Path, unreadable: dict[str, str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return load_object(path)
    except (OSError, ValueError) as error:
        unreadable[path.name] = str(error)
        return {}


def _own_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return {text: number for text, number in vocabulary.items() if isinstance(number, int)}
    if isinstance(vocabulary, list):  # Unigram: pairs of text and score, the place is the id
        return {str(pair[0]): number for number, pair in enumerate(vocabulary) if isinstance(pair, list) and pair}
    return {}


def _added_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {token_text(token): token["id"] for token in tokens if isinstance(token.get("id"), int)}
