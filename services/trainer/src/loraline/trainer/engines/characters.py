"""Characters that a tokenizer cannot write: emoji, Hangul or Han that come back as `<unk>`, or not at all."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from loraline.trainer.rows import Row, rows_error

_SHOWN = 12


def lost_characters(text: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the characters of a text that do not survive encoding and decoding, letter case and width aside.

    Asked for each character alone: what tokens the rest of a row makes does not matter.
    """
    characters = sorted({character for character in text if not character.isspace()})
    if not characters:
        return set()
    encoded = tokenizer(characters, add_special_tokens=False)["input_ids"]
    lost = set()
    for character, ids in zip(characters, encoded, strict=True):
        back = str(tokenizer.decode(ids, skip_special_tokens=False))
        if _folded(character) not in _folded(back):
            lost.add(character)
    return lost


def check_characters(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    """Refuse answers that cannot be learned as they are written; return a warning about prompts, or nothing.

    Raises INVALID_ARGUMENT (SPECIAL_CHARACTERS_LOST) that names rows and characters.
    """
    unique = list({row.source: row for row in rows}.values())
    lost = lost_characters("".join(_texts(unique)), tokenizer)
    if not lost:
        return ""
    problems: dict[str, str] = {}
    prompts = 0
    for row in unique:
        answers = lost & set("".join(_said(row, assistant=True)))
        if answers:
            problems[row.source] = f"answers with {_shown(answers)}"
        prompts += bool(lost & set("".join(_said(row, assistant=False))))
    if problems:
        what = "have characters that the base's tokenizer cannot write; take a base that knows them, or leave them out"
        raise rows_error("SPECIAL_CHARACTERS_LOST", what, problems)
    return (
        f"{prompts} of {len(unique)} rows ask with characters that the base's tokenizer does not know "
        f"({_shown(lost)}): the model cannot tell them apart. Take a base whose tokenizer knows them."
    )


def _texts(rows: Iterable[Row]) -> Iterable[str]:
    return (message["content"] for row in rows for message in _messages(row))


def _said(row: Row, *, assistant: bool) -> Iterable[str]:
    return (message["content"] for message in _messages(row) if (message["role"] == "assistant") == assistant)


def _messages(row: Row) -> list[dict[str, str]]:
    """Return a row's messages; of a pair, those with the rejected answer too, which is learned from as well."""
    return [*row.messages, *(row.rejected or ())]


def _shown(characters: set[str]) -> str:
    shown = "".join(sorted(characters)[:_SHOWN])
    return f"{shown} and {len(characters) - _SHOWN} more" if len(characters) > _SHOWN else shown


def _folded(text: str) -> str:
    """Return a text as tokenizers that normalise see it."""
    return unicodedata.normalize("NFKC", text).casefold().strip()
