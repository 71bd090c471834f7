"""Control tokens in people's text: found by the trainer and by inference with the same rule (docs/adr/0009).

Chat templates put messages between control tokens such as `<|im_end|>`, and a tokenizer reads the template's and the
message's text as one. A message that spells such a token could end its own turn and speak as another role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraline.core.errors import LoralineError, invalid_argument


class SpecialTokens:
    """The control tokens of one tokenizer (of transformers; nothing of it is imported here)."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._ids = {int(number) for number in tokenizer.all_special_ids}
        self._ids |= {number for number, token in added.items() if getattr(token, "special", False)}
        # What is in no vocabulary becomes the unknown token, which says nothing about the text.
        self._ids.discard(tokenizer.unk_token_id)
        self._unknown = str(tokenizer.unk_token or "")

    def first_in(self, text: str) -> str:
        """Return the first control token that a text would become; empty when there is none."""
        if self._unknown and self._unknown in text:
            return self._unknown
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        found = next((number for number in ids if number in self._ids), None)
        return "" if found is None else str(self._tokenizer.convert_ids_to_tokens(found))

    def problems(self, messages: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """Return `messages[2].content` -> what is wrong, for the messages that spell a control token."""
        found = {f"messages[{i}].content": self.first_in(message["content"]) for i, message in enumerate(messages)}
        return {path: f"spells the control token {token!r}" for path, token in found.items() if token}

    def refusal(self, messages: Sequence[Mapping[str, str]]) -> LoralineError | None:
        """Return INVALID_ARGUMENT that names the messages; None when all are plain text."""
        problems = self.problems(messages)
        if not problems:
            return None
        listed = "; ".join(f"{path} {problem}" for path, problem in problems.items())
        message = (
            f"{listed}. The model would read it as the end of a turn or a change of role, not as text. "
            "Leave it out or write it otherwise, such as with a space inside."
        )
        error = invalid_argument("SPECIAL_TOKEN_IN_TEXT", message)
        error.fields = problems
        return error
