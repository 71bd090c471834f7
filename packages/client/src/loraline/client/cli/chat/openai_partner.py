"""Any server with OpenAI's /v1/chat/completions, over plain HTTP and with nothing but the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import grpc

from loraline.api.inference.v1 import inference_pb2
from loraline.client.cli.chat.talk import Talk
from loraline.client.errors import SERVER_UNREACHABLE, LoralineApiError

_SECONDS = 600.0
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_FINISH = {"stop": inference_pb2.FINISH_REASON_STOP, "length": inference_pb2.FINISH_REASON_LENGTH}


class OpenAiPartner:
    """A server at a URL such as `http://127.0.0.1:11434` or `https://host/v1`."""

    def __init__(self, url: str, key: str = ""):
        url = url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            text = f"{url!r} is no address of a server. Write --openai http://HOST:PORT/v1."
            raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ADDRESS", text)
        self._url = url if url.partition("://")[2].partition("/")[2] else f"{url}/v1"
        self._key = key
        self._only: str | None = None

    def ask(self, talk: Talk, question: str) -> Iterator[inference_pb2.ChatResponse]:
        """Yield the answer as it comes."""
        if talk.language:
            text = "Language rules are this platform's; ask a server with --openai for the language with /system."
            raise LoralineApiError(grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED", text)
        body: dict[str, Any] = {
            "model": talk.model or self._only_model(),
            "messages": talk.messages(question),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        chosen = {"temperature": talk.temperature, "seed": talk.seed, "max_tokens": talk.max_tokens or None}
        body |= {name: value for name, value in chosen.items() if value is not None}
        if talk.json_only:
            body["response_format"] = {"type": "json_object"}
        with closing(self._open("/chat/completions", body)) as response:
            yield from self._pieces(response, body["model"])

    def models(self) -> list[str]:
        """Return the names that GET /models lists."""
        with closing(self._open("/models", None)) as response:
            return [str(entry["id"]) for entry in self._json(response.read()).get("data", [])]

    def reset(self, talk: Talk) -> None:
        """Do nothing: such servers keep nothing."""

    def _only_model(self) -> str:
        if self._only is None:
            names = self.models()
            if len(names) != 1:
                shown = ", ".join(names[:20]) or "none"
                text = f"Which model? Name one with --model. The server at {self._url} has: {shown}."
                raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "MODEL_MISSING", text, address=self._url)
            self._only = names[0]
        return self._only

    def _pieces(self, response: Any, asked: str) -> Iterator[inference_pb2.ChatResponse]:
        last = inference_pb2.ChatResponse(model=asked)
        for event in self._events(response):
            if "error" in event:
                raise self._failed(grpc.StatusCode.UNKNOWN, event)
            last.model = str(event.get("model") or last.model)
            for choice in event.get("choices") or []:
                text = (choice.get("delta") or {}).get("content") or ""
                if text:
                    yield inference_pb2.ChatResponse(delta=text, model=last.model)
                if choice.get("finish_reason"):
                    last.finish_reason = _FINISH.get(choice["finish_reason"], inference_pb2.FINISH_REASON_STOP)
            usage = event.get("usage") or {}
            last.usage.prompt_tokens = int(usage.get("prompt_tokens") or last.usage.prompt_tokens)
            last.usage.completion_tokens = int(usage.get("completion_tokens") or last.usage.completion_tokens)
            last.notices.extend(event.get("notices") or [])
        if not last.finish_reason:
            text = f"The server at {self._url} broke off in the middle of its answer."
            raise LoralineApiError(grpc.StatusCode.UNAVAILABLE, "ANSWER_BROKEN_OFF", text, address=self._url)
        yield last

    def _events(self, response: Any) -> Iterator[dict[str, Any]]:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            # A server that does not stream: the whole answer is one event.
            whole = self._json(response.read())
            yield {**whole, "choices": [{**choice, "delta": choice.get("message")} for choice in whole["choices"]]}
            return
        try:
            for line in response:
                name, _, value = line.decode("utf-8", "replace").strip().partition(":")
                if name == "data" and value.strip() != "[DONE]":
                    yield self._json(value)
        except OSError:
            return  # cut: whoever reads misses the finish reason

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"content-type": "application/json", "accept": "text/event-stream, application/json"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, content, headers)  # noqa: S310 - http and https only
        try:
            return urllib.request.urlopen(request, timeout=_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
            raise self._failed(code, error.read().decode("utf-8", "replace"), error.code) from None
        except OSError as error:
            cause = str(getattr(error, "reason", error))
            text = f"No server answers at {self._url}: {cause}."
            raise LoralineApiError(grpc.StatusCode.UNAVAILABLE, SERVER_UNREACHABLE, text, address=self._url) from None

    def _failed(self, code: grpc.StatusCode, answer: Any, status: int = 0) -> LoralineApiError:
        if isinstance(answer, str):
            try:
                answer = json.loads(answer)
            except ValueError:
                answer = {"error": answer[:500]}
        error = answer.get("error") if isinstance(answer, dict) else answer
        message = error.get("message") if isinstance(error, dict) else error
        reason = str((error.get("code") if isinstance(error, dict) else "") or f"HTTP_{status}").upper()
        text = f"{message or 'The server refused'} (HTTP {status})" if status else str(message)
        return LoralineApiError(code, reason, text, address=self._url)

    def _json(self, text: str | bytes) -> dict[str, Any]:
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            problem = f"The server at {self._url} answers in another way than OpenAI's API. Is the path right?"
            raise LoralineApiError(grpc.StatusCode.UNKNOWN, "NOT_OPENAI", problem, address=self._url)
        return content
