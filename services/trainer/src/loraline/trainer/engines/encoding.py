"""Rows to token ids with a loss mask: only what the assistant says carries loss.

Where the chat template marks the assistant's words (`{% generation %}`), transformers gives the mask. Elsewhere it is
derived: the prompt before each answer is rendered with the generation prompt, and what follows it, up to and with the
end-of-sequence token, is the answer. Either way the mask is proven per row: the marked tokens must spell the answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument, unsupported
from loraline.trainer.base_models import blank_end

Messages = list[dict[str, str]]
GENERATION_MARKS = "generation_marks"
PREFIX_DIFFERENCE = "prefix_difference"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedRow:
    """A row ready for training."""

    source: str
    messages: Messages
    input_ids: list[int]
    mask: list[int]
    """1 where the token carries loss."""
    truncated: bool = False
    rejected: EncodedRow | None = None
    """The worse answer to the same prompt, where pairs are compared."""

    @property
    def tokens(self) -> int:
        """Tokens that are shown with it."""
        return len(self.input_ids) + (self.rejected.tokens if self.rejected else 0)

    @property
    def labels(self) -> list[int]:
        """The ids where they carry loss, elsewhere -100."""
        return [token if kept else -100 for token, kept in zip(self.input_ids, self.mask, strict=True)]


class MaskNotProven(Exception):
    """The mask of a row could not be shown to cover the answers and nothing else."""


@dataclass
class ChatEncoder:
    """Renders messages with a tokenizer's chat template."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    """Every id that ends an answer: the tokenizer's and the model's."""
    template: str = field(init=False)
    method: str = field(init=False)

    def __post_init__(self) -> None:
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str) or not template.strip():
            message = (
                "The base model's tokenizer has no chat template, so nobody knows how to write a conversation. "
                "Take an instruct model, or put a chat_template.jinja beside its weights."
            )
            raise failed_precondition("CHAT_TEMPLATE_MISSING", message)
        if not self.tokenizer.is_fast:
            raise unsupported("A tokenizer without tokenizer.json", "Convert it with transformers first.")
        self.template = template
        self.method = GENERATION_MARKS if _MARK.search(template) else PREFIX_DIFFERENCE

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    def render_text(self, messages: Messages, *, prompt: bool = False) -> str:
        """Return the conversation as text; with `prompt`, ready for the assistant's next answer."""
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)  # type: ignore[arg-type]
        except Exception as error:
            raise _template_refused(error) from error
        return str(text)

    def render(self, messages: Messages, *, prompt: bool = False) -> list[int]:
        """Return the conversation as ids."""
        return self._tokenize(self.render_text(messages, prompt=prompt))["input_ids"]

    def encode(self, source: str, messages: Messages) -> EncodedRow:
        """Return the row with its mask. Raises MaskNotProven, or LoralineError when the template refuses the row."""
        text = self.render_text(messages)
        tokens = self._tokenize(text)
        ids: list[int] = tokens["input_ids"]
        if self.method == GENERATION_MARKS:
            mask = self._marked(messages, ids)
        else:
            mask = self._by_prefix(messages, text, ids, tokens["offset_mapping"])
        self._prove(messages, ids, mask)
        return EncodedRow(source, messages, ids, mask)

    def ends_of(self, row: EncodedRow) -> list[int]:
        """Return the end-of-sequence token of each answer that is learned with its end.

        It is the last token with loss of an answer, or has nothing but white space behind it; elsewhere in an answer it
        ends nothing.
        """
        found: list[int] = []
        at_end = True
        for token, kept in zip(reversed(row.input_ids), reversed(row.mask), strict=True):
            if not kept:
                at_end = True
            elif at_end:
                if token in self.eos_ids:
                    found.append(token)
                at_end = token not in self.eos_ids and self._is_blank(token)
        return found

    def _is_blank(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token], skip_special_tokens=False)).strip()

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    def _marked(self, messages: Messages, ids: list[int]) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        if list(encoded["input_ids"]) != ids:
            raise MaskNotProven("renders to other tokens with the generation marks than without")
        return [int(value) for value in encoded["assistant_masks"]]

    def _by_prefix(self, messages: Messages, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
        mask = [0] * len(ids)
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self.render_text(messages[:position], prompt=True)
            if not text.startswith(prefix):
                raise MaskNotProven(f"does not begin with its own prompt before messages[{position}]")
            content = message["content"].strip()
            begin = text.find(content, len(prefix))
            if begin < 0:
                content = _after_thinking(content)
                begin = text.find(content, len(prefix))
            if begin < 0:
                raise MaskNotProven(f"does not show the text of messages[{position}] after its prompt")
            end = begin + len(content)
            for index, (start, _) in enumerate(offsets):
                if len(prefix) <= start < end:
                    mask[index] = 1
            self._extend_to_eos(mask, ids, offsets, text, end)
        return mask

    def _extend_to_eos(
        self, mask: list[int], ids: list[int], offsets: list[tuple[int, int]], text: str, end: int
    ) -> None:
        """Mark the end-of-sequence token that follows the answer, with white space between them."""
        following = [index for index, (start, _) in enumerate(offsets) if start >= end]
        for count, index in enumerate(following):
            if ids[index] in self.eos_ids:
                for marked in following[: count + 1]:
                    mask[marked] = 1
                return
            start, stop = offsets[index]
            if text[start:stop].strip():
                return

    def _prove(self, messages: Messages, ids: list[int], mask: list[int]) -> None:
        spans: list[list[int]] = []
        for index, kept in enumerate(mask):
            if kept and (index == 0 or not mask[index - 1]):
                spans.append([])
            if kept:
                spans[-1].append(ids[index])
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise MaskNotProven(f"has {len(answers)} answers but {len(spans)} marked spans")
        for number, (span, answer) in enumerate(zip(spans, answers, strict=True), start=1):
            spelled = _letters(str(self.tokenizer.decode(span, skip_special_tokens=False)))
            if _letters(answer) not in spelled and _letters(_after_thinking(answer)) not in spelled:
                raise MaskNotProven(f"has marked tokens that do not spell answer {number}")


def eos_ids_of(tokenizer: PreTrainedTokenizerBase, generation_eos: int | Iterable[int] | None) -> frozenset[int]:
    """Return every id that ends an answer.

    Raises INVALID_ARGUMENT (EOS_MISSING) when there is none, FAILED_PRECONDITION (EOS_TOKEN_BLANK) for white space.
    """
    own: Any = tokenizer.eos_token_id
    for text in () if own is None else (str(tokenizer.eos_token), str(tokenizer.decode([own]))):
        if not text.strip():
            raise blank_end("the base model", text)
    ids: set[int] = set()
    for value in (own, generation_eos):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    if not ids:
        message = "The base model has no end-of-sequence token, so answers would never end. Set eos_token."
        raise invalid_argument("EOS_MISSING", message, base_model="has no eos_token")
    return frozenset(ids)


def _after_thinking(content: str) -> str:
    return content.rsplit("</think>", 1)[-1].strip()


def _letters(text: str) -> str:
    """Return the text without white space and replacement marks, which decoding may move."""
    return re.sub(r"\s+", "", text)


def _template_refused(error: Exception) -> LoralineError:
    message = f"The base model's chat template refuses the messages: {error}"
    return invalid_argument("CHAT_TEMPLATE_REFUSED", message, messages=str(error))
