"""A chat template as what it writes around each role's content, found by rendering it and proven by rendering more.

A Jinja template is a program and can't be translated in general. Most write fixed text before and after each message,
though. That text is measured here, with marked contents; then conversations of several shapes are written from it and
must equal what the template renders, to the character. Templates that do more are refused, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loraline.core.errors import LoralineError, unsupported

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""Messages and whether the assistant's turn is opened -> text."""

_SYSTEM, _USER, _ANSWER, _SECOND = "Qsystem7x", "Quser7x", "Qanswer7x", "Qsecond7x"


@dataclass(frozen=True)
class ChatShape:
    """The fixed texts of a chat template."""

    opening: str
    """Before everything: the begin token, or nothing."""
    system: tuple[str, str] | None
    """None where the template refuses system messages."""
    default_system: str
    """Written where the conversation has no system message."""
    user: tuple[str, str]
    answer: tuple[str, str]
    generation: str
    """Opens the assistant's turn."""
    folded: bool = False
    """The system message stands inside the first user message: `system` is then what goes before and after it there."""

    def write(self, messages: Sequence[Message], generation: bool) -> str:
        """Write a conversation; the proof is that the template renders the same."""
        text, rest = self.opening, list(messages)
        has_system = bool(rest) and rest[0]["role"] == "system"
        system = rest.pop(0)["content"] if has_system else ""
        around = self.system or ("", "")
        if has_system and not self.folded:
            text += around[0] + system + around[1]
        elif not has_system:
            text += self.default_system
        for number, message in enumerate(rest):
            before, after = self.user if message["role"] == "user" else self.answer
            if has_system and self.folded and number == 0:
                before = around[0] + system + around[1]
            text += before + message["content"] + after
        return text + (self.generation if generation else "")


def find_shape(render: Render, begin: str = "") -> ChatShape:
    """Return the shape of a chat template; `begin` is the tokenizer's begin token.

    Raises UNIMPLEMENTED when the template does more than writing fixed text around contents.
    """
    shape = _measure(render, begin)
    for messages in _proofs():
        for generation in (False, True):
            if generation and messages[-1]["role"] == "assistant":
                continue
            wanted, written = _try(render, messages, generation), shape.write(messages, generation)
            if wanted is not None and wanted != written:
                raise _not_translatable(messages, wanted, written)
    return shape


def _measure(render: Render, begin: str) -> ChatShape:
    user, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    second = {"role": "user", "content": _SECOND}
    alone = render([user], False)
    before_user, after_user = _split(alone, _USER)
    opened = render([user], True)
    if not opened.startswith(alone):
        raise _no_shape("the opened turn is not the conversation with more text")
    turns = render([user, answer, second], False)
    _, rest = _split(turns, _USER)
    to_answer, rest = _split(rest, _ANSWER)
    to_second, _ = _split(rest, _SECOND)
    _, after_answer = _split(render([user, answer], False), _ANSWER)
    answer_before = _without_start(to_answer, after_user, "user message")
    user_before = _without_start(to_second, after_answer, "answer")
    if not before_user.endswith(user_before):
        raise _no_shape("the first user message begins otherwise than later ones")
    shared = _without_end(before_user, user_before)
    # Some templates begin every user message with the begin token; then it is part of the message, not an opening.
    opening = begin if begin and shared.startswith(begin) else ""
    around_user, around_answer = (user_before, after_user), (answer_before, after_answer)
    generation = opened.removeprefix(alone)
    shape = ChatShape(opening, None, shared.removeprefix(opening), around_user, around_answer, generation)
    return _with_system(shape, render)


def _with_system(shape: ChatShape, render: Render) -> ChatShape:
    """Add the text around a system message, and whether it stands inside the first user message."""
    whole = _try(render, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}], False)
    if whole is None:
        return shape
    before, rest = _split(whole, _SYSTEM)
    between, _ = _split(rest, _USER)
    folded = not between.endswith(shape.user[0])
    after = between if folded else _without_end(between, shape.user[0])
    return replace(shape, system=(before.removeprefix(shape.opening), after), folded=folded)


def _proofs() -> list[list[Message]]:
    texts = ["Where is the boat?", "In the harbour.\nBehind the wall.", "And now?", "There: \"x\" {{ 'y' }}", "Why?"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    system = {"role": "system", "content": "Answer briefly.\n- in English"}
    return [*(turns[:n] for n in range(1, 6)), *([system, *turns[:n]] for n in range(1, 6))]


def _try(render: Render, messages: Sequence[Message], generation: bool) -> str | None:
    """Render, or return None where the template refuses such a conversation, as some do with system messages."""
    try:
        return render(messages, generation)
    except LoralineError as error:
        if error.reason == "CHAT_TEMPLATE_TIMEOUT":
            raise
        return None


def _split(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise _no_shape("it leaves a message out or writes it twice")
    return before, after


def _without_start(text: str, start: str, what: str) -> str:
    if not text.startswith(start):
        raise _no_shape(f"what follows a {what} depends on what comes next")
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    return text[: len(text) - len(end)] if end else text


def _no_shape(why: str) -> LoralineError:
    return unsupported(f"Translating this chat template ({why})", "Serve the model with inference, which renders it.")


def _not_translatable(messages: Sequence[Message], wanted: str, written: str) -> LoralineError:
    pairs = enumerate(zip(wanted, written, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(wanted), len(written)))
    roles = ", ".join(message["role"] for message in messages)
    return _no_shape(
        f"for the roles {roles} it renders {wanted[place : place + 40]!r} where fixed text gives "
        f"{written[place : place + 40]!r}"
    )
