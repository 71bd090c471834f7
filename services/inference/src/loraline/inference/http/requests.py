"""OpenAI's request bodies to questions. What is not supported is refused, never ignored.

As OpenAI's own server does, an unknown parameter is refused with 400 by name; so is a known one that is not supported
here, unless its value asks for nothing. Only `user` and what OpenAI keeps for its own bookkeeping goes unread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import ClientDisconnect, Request

from loraline.core.errors import invalid_argument
from loraline.inference.http import parameters
from loraline.inference.http.shapes import SHAPE_PARAMETERS, asked_shape
from loraline.inference.http.tools import TOOL_PARAMETERS, AskedTools, asked_tools, tool_calls
from loraline.inference.question import Question

_MAX_BODY_BYTES = 16 * 1024 * 1024
_SHARED = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "logprobs",
    *("user", "metadata", "safety_identifier", "prompt_cache_key"),
} | SHAPE_PARAMETERS
_CHAT = _SHARED | TOOL_PARAMETERS | {"messages", "session", "max_completion_tokens", "top_logprobs"}
_COMPLETION = _SHARED | {"prompt"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Parameters that are not supported, with the values that ask for nothing."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_OF_TOOLS = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
_MOST_LOGPROBS = 20
"""Of vLLM, unless an operator raises its max_logprobs; OpenAI's too."""


@dataclass(frozen=True)
class HttpQuestion:
    """A question and how its answer is to be sent."""

    question: Question
    stream: bool
    include_usage: bool
    tools: AskedTools | None = None


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request; INVALID_ARGUMENT otherwise."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BODY_BYTES:
                raise invalid_argument("BODY_TOO_LARGE", f"The request is larger than {_MAX_BODY_BYTES} bytes.")
    except ClientDisconnect:
        raise invalid_argument("BODY_NOT_JSON", "The request broke off before its body was complete.") from None
    try:
        content = json.loads(body)
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        text = f"The request holds half of a surrogate pair ({error.object[error.start]!a}), which is no text."
        raise invalid_argument("BODY_NOT_JSON", text) from None
    except (ValueError, RecursionError) as error:
        raise invalid_argument("BODY_NOT_JSON", f"The request's body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise invalid_argument("BODY_NOT_JSON", "The request's body must be a JSON object.")
    return content


def chat_question(body: Mapping[str, Any], most_tokens: int) -> HttpQuestion:
    """Read a body of /v1/chat/completions. `most_tokens` is the answer's limit when the client sets none."""
    _refuse_unknown(body, _CHAT)
    limits = (parameters.integer(body, name, 1) for name in ("max_completion_tokens", "max_tokens"))
    limit = next((limit for limit in limits if limit), most_tokens)
    top = parameters.integer(body, "top_logprobs", 0) or 0
    told = top if parameters.flag(body, "logprobs") else None
    if top > _MOST_LOGPROBS or (top and told is None):
        raise parameters.wrong("top_logprobs", f"must be at most {_MOST_LOGPROBS}, and needs logprobs")
    question = Question(
        # A session remembers whom it talks to.
        model=parameters.text(body, "model") if body.get("session") else _model(body),
        sampling=replace(parameters.sampling(body, limit), logprobs=told),
        messages=_messages(body.get("messages")),
        session=parameters.text(body, "session"),
        **asked_shape(body),
    )
    return _ended_by_shape(_with_tools(_http_question(body, question), asked_tools(body)))


def completion_question(body: Mapping[str, Any]) -> HttpQuestion:
    """Read a body of /v1/completions; its default of max_tokens is OpenAI's 16."""
    _refuse_unknown(body, _COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and not all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        raise parameters.wrong(
            "prompt", "must be one text or one list of token ids; send several prompts as several requests"
        )
    if not isinstance(prompt, str | list) or not prompt:
        raise parameters.wrong("prompt", "must be a text or a list of token ids, and not empty")
    told = parameters.integer(body, "logprobs", 0)
    if told is not None and told > _MOST_LOGPROBS:
        raise parameters.wrong("logprobs", f"must be at most {_MOST_LOGPROBS}")
    sampling = parameters.sampling(body, parameters.integer(body, "max_tokens", 1) or 16)
    sampling = replace(sampling, logprobs=told)
    question = Question(model=_model(body), sampling=sampling, prompt=prompt, **asked_shape(body))
    return _ended_by_shape(_http_question(body, question))


def _ended_by_shape(asked: HttpQuestion) -> HttpQuestion:
    if asked.question.sampling.ignore_eos and asked.question.shaped:
        why = "cannot be true beside a shape, language or forbid: an answer that has its shape has ended"
        raise parameters.wrong("ignore_eos", why)
    return asked


def _with_tools(asked: HttpQuestion, tools: AskedTools | None) -> HttpQuestion:
    question = asked.question
    about_tools = tools is not None or any(message.keys() - {"role", "content"} for message in question.messages)
    if about_tools and question.session:
        raise parameters.wrong("tools", "cannot be used in a session, which keeps texts only")
    if tools is None:
        return asked
    if tools.forced:
        if question.constraint is not None:
            raise parameters.wrong("tool_choice", f"asks for a call beside {question.shape_field}; take one of them")
        # Half a call is of no use to anyone.
        question = replace(question, constraint=tools.constraint, shape_field="tools", cut_is_error=True)
    if tools.choice != "none":
        question = replace(question, tools=tools.tools)
    return replace(asked, question=question, tools=tools)


def _http_question(body: Mapping[str, Any], question: Question) -> HttpQuestion:
    options = body.get("stream_options") or {}
    unknown = set(options) - {"include_usage", "include_obfuscation"} if isinstance(options, dict) else {"it"}
    if unknown:
        raise parameters.wrong("stream_options", f"has {', '.join(sorted(unknown))}; only include_usage is supported")
    return HttpQuestion(question, bool(body.get("stream")), bool(options.get("include_usage")))


def _refuse_unknown(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or value is None or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
            continue
        raise invalid_argument(
            "UNSUPPORTED_PARAMETER", f"{name} is not supported by this server. Leave it out.", **{name: "unsupported"}
        )


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise parameters.wrong("messages", "must be a list with at least one message")
    return [_message(position, message) for position, message in enumerate(value)]


def _message(position: int, message: Any) -> dict[str, Any]:
    where = f"messages[{position}]"
    if not isinstance(message, dict):
        raise parameters.wrong("messages", f"holds something that is no message at {where}")
    known = ("role", "content", *_OF_TOOLS.get(str(message.get("role")), ()))
    extra = [name for name, value in message.items() if name not in known and value not in (None, [])]
    if extra:
        raise parameters.wrong("messages", f"has {extra[0]} at {where}, which this server does not support")
    role, content = _ROLES.get(str(message.get("role"))), message.get("content")
    if role is None:
        raise parameters.wrong(
            "messages", f"has role {message.get('role')!r} at {where}; known are {', '.join(_ROLES)}"
        )
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise parameters.wrong("messages", f"has a part at {where} that is no text; only text is supported")
        content = "".join(part["text"] for part in content)
    calls = tool_calls(position, message.get("tool_calls")) if message.get("tool_calls") else []
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise parameters.wrong("messages", f"has no text as content at {where}")
    read: dict[str, Any] = {"role": role, "content": content}
    if calls:
        read["tool_calls"] = calls
    if role == "tool":
        read["tool_call_id"] = parameters.text(message, "tool_call_id")
        if not read["tool_call_id"]:
            raise parameters.wrong("messages", f"has a tool's answer without tool_call_id at {where}")
    return read


def _model(body: Mapping[str, Any]) -> str:
    """Return the model's name. A body without one is refused: which model it meant would be a guess."""
    name = parameters.text(body, "model")
    if not name:
        raise parameters.wrong("model", "is missing; name the base or an adapter, as GET /v1/models lists them")
    return name
