"""A model folder's tokenizer and chat template: messages to ids, the same in both engines."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.core.evidence.specials import SpecialTokens

RENDER_SECONDS = 10.0
"""A template that takes longer is not a template but an attack, or a mistake."""


class ChatFormat:
    """Renders conversations with the served model's own tokenizer and template."""

    def __init__(self, tokenizer: Any, folder: Path):
        self.tokenizer = tokenizer
        self.folder = folder
        self._specials = SpecialTokens(tokenizer)

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> ChatFormat:
        """Read the tokenizer of a model folder; FAILED_PRECONDITION TOKENIZER_UNREADABLE otherwise. Blocking."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            message = (
                f"The tokenizer in {folder.name} cannot be read: {error}. Publish the model with its tokenizer files."
            )
            raise failed_precondition("TOKENIZER_UNREADABLE", message) from error
        return cls(tokenizer, folder)

    @property
    def template(self) -> str:
        """Text of the chat template; empty when the model has none."""
        template = getattr(self.tokenizer, "chat_template", None)
        return template if isinstance(template, str) else ""

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the template's text in UTF-8; empty without a template."""
        return hashlib.sha256(self.template.encode()).hexdigest() if self.template else ""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's and those of generation_config.json and config.json."""
        ids: set[int] = set()
        if isinstance(self.tokenizer.eos_token_id, int):
            ids.add(self.tokenizer.eos_token_id)
        for name in ("generation_config.json", "config.json"):
            found = _read_json(self.folder / name).get("eos_token_id")
            ids.update(item for item in (found if isinstance(found, list) else [found]) if isinstance(item, int))
        return tuple(sorted(ids))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a plain prompt, with the special tokens that the tokenizer puts around one."""
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template puts tools into the prompt; many pass over them in silence."""
        tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}
        messages = [{"role": "user", "content": "probe"}]
        try:
            without = self.render(messages, generation_prompt=True)
            return self.render(messages, generation_prompt=True, tools=[tool]) != without
        except LoralineError:
            return False

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Return the ids of a conversation. INVALID_ARGUMENT when the template refuses it. Blocking."""
        if not self.template:
            message = (
                "The served model has no chat template, so a conversation cannot be turned into a prompt. "
                "Serve a model whose tokenizer has one, or use Generate with a plain prompt."
            )
            raise failed_precondition("NO_CHAT_TEMPLATE", message)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:
            message = f"The model's chat template refuses these messages: {error}."
            raise invalid_argument("TEMPLATE_REFUSED", message, messages=str(error)) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        lead: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Return the ids that ask for the next answer, rendered off the event loop and under a time limit.

        `lead` are the operator's own words before the messages; they are not looked through.
        INVALID_ARGUMENT SPECIAL_TOKEN_IN_TEXT names a message or tool whose text would become control tokens.
        """
        rendering = asyncio.to_thread(self._question, messages, tools, lead)
        try:
            return await asyncio.wait_for(rendering, RENDER_SECONDS)
        except TimeoutError:
            raise _too_slow() from None

    def _question(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]],
        lead: Sequence[Mapping[str, Any]],
    ) -> list[int]:
        refusal = self._specials.refusal(messages)
        if refusal is not None:
            raise refusal
        for path, text in _texts_about_tools(messages, tools):
            if token := self._specials.first_in(text):
                error = invalid_argument("SPECIAL_TOKEN_IN_TEXT", f"{path} spells the control token {token!r}.")
                error.fields = {path: f"spells the control token {token!r}"}
                raise error
        return self.render([*lead, *messages], generation_prompt=True, tools=tools)


def _texts_about_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    for position, tool in enumerate(tools):
        yield f"tools[{position}]", json.dumps(tool, ensure_ascii=False)
    for position, message in enumerate(messages):
        if message.get("tool_calls"):
            yield f"messages[{position}].tool_calls", json.dumps(message["tool_calls"], ensure_ascii=False)


def _too_slow() -> LoralineError:
    message = f"The chat template took more than {RENDER_SECONDS:.0f} s. Shorten the conversation or mend the template."
    return failed_precondition("TEMPLATE_TOO_SLOW", message)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
