"""/v1/profiles: their list, and answers as JSON or as server-sent events that a reader may take up again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraline.core.errors import invalid_argument
from loraline.core.serving.auth import current_principal
from loraline.inference.generation import Generation
from loraline.inference.http import parameters
from loraline.inference.http.requests import read_body
from loraline.inference.http.shapes import forbidden
from loraline.inference.http.streaming import EventStream, until_disconnect
from loraline.inference.profiles.asking import Asked, default_sampling, question_of
from loraline.inference.profiles.calls import profiles_page
from loraline.inference.profiles.profile import Profile
from loraline.inference.profiles.registry import Profiles
from loraline.inference.profiles.relay import Relay, Stream
from loraline.inference.profiles.streaming import answer_whole, events
from loraline.inference.question import Question

_NO_CONTENT = 204
_PLAIN_ERROR_SECONDS = 1.0
"""An answer that fails within this time is a plain HTTP error; later ones are events of a stream that began well."""
_RETRY = b"retry: 2000\n\n"
"""How long a browser waits, in ms, before it takes the stream up again."""
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "repetition_penalty")
_KNOWN = {"input", "text", "model", "session", "language", "forbid", "retries", "stream", *_SAMPLING}
_MOST_RETRIES = 5


def profile_routes(generation: Generation, profiles: Profiles, relay: Relay) -> list[Route]:
    """Return the routes of response profiles."""
    routes = _Routes(generation, profiles, relay)
    return [
        Route("/v1/profiles", routes.list, methods=["GET"]),
        Route("/v1/profiles/{name}", routes.get, methods=["GET"]),
        Route("/v1/profiles/{name}", routes.answer, methods=["POST"]),
    ]


class _Routes:
    def __init__(self, generation: Generation, profiles: Profiles, relay: Relay):
        self._generation = generation
        self._profiles = profiles
        self._relay = relay

    async def list(self, request: Request) -> JSONResponse:
        """GET /v1/profiles."""
        return JSONResponse({"object": "list", "data": self._described()})

    async def get(self, request: Request) -> Response:
        """GET /v1/profiles/{name}: its description, or, with Last-Event-ID, the rest of a stream."""
        profile = self._profiles.get(request.path_params["name"])
        if "last-event-id" in request.headers:
            return self._resumed(request)
        return JSONResponse(next(found for found in self._described() if found["name"] == profile.name))

    async def answer(self, request: Request) -> Response:
        """POST /v1/profiles/{name}: a JSON answer, or events where the client accepts text/event-stream."""
        profile = self._profiles.get(request.path_params["name"])
        if "last-event-id" in request.headers:
            return self._resumed(request)
        body = await read_body(request)
        question = _question(profile, body, self._generation.settings.max_tokens)
        accepts = "text/event-stream" in request.headers.get("accept", "")
        if accepts or body.get("stream"):
            return await self._streamed(request, profile, question)
        return await until_disconnect(request, self._whole(profile, question))

    async def _whole(self, profile: Profile, question: Question) -> Response:
        return JSONResponse(await answer_whole(self._generation, profile, question))

    async def _streamed(self, request: Request, profile: Profile, question: Question) -> Response:
        stream = self._relay.open(_owner(), events(self._generation, profile, question))
        gone = await until_disconnect(request, stream.begun(_PLAIN_ERROR_SECONDS))
        if isinstance(gone, Response) or stream.refusal is not None:
            self._relay.drop(stream)
            if stream.refusal is not None:
                raise stream.refusal
            return gone
        return self._reading(stream, 0)

    def _resumed(self, request: Request) -> Response:
        stream, after = self._relay.find(_owner(), request.headers["last-event-id"])
        if stream.ended and after == len(stream.frames):
            return Response(status_code=_NO_CONTENT)  # tells a browser's EventSource to stop coming back
        return self._reading(stream, after)

    def _reading(self, stream: Stream, after: int) -> EventStream:
        reading: AsyncGenerator[bytes, None] = self._relay.read(stream, after)
        return EventStream(_RETRY, reading)

    def _described(self) -> list[dict[str, Any]]:
        page = profiles_page(self._profiles, 0, 10_000)
        return [
            json_format.MessageToDict(
                profile, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for profile in page.profiles
        ]


def _owner() -> str:
    principal = current_principal()
    return principal.key_id if principal is not None else ""


def _question(profile: Profile, body: Mapping[str, Any], most_tokens: int) -> Question:
    unknown = [name for name, value in body.items() if name not in _KNOWN and value is not None]
    if unknown:
        message = f"{unknown[0]} is not a parameter of profiles. There are {', '.join(sorted(_KNOWN))}."
        raise invalid_argument("UNSUPPORTED_PARAMETER", message, **{unknown[0]: message})
    given = body.get("input")
    if given is not None and not isinstance(given, str | dict):
        raise parameters.wrong("input", "must be an object with the profile's fields, or free text")
    if isinstance(given, str) and body.get("text"):
        raise parameters.wrong("text", "stands beside a free text in input; give one of them")
    retries = parameters.integer(body, "retries", 0)
    if retries is not None and retries > _MOST_RETRIES:
        raise parameters.wrong("retries", f"must be at most {_MOST_RETRIES}")
    own = default_sampling(profile, most_tokens)
    sampling = parameters.sampling(body, parameters.integer(body, "max_tokens", 1) or own.max_tokens, own)
    asked = Asked(
        fields=given if isinstance(given, dict) else None,
        text=given if isinstance(given, str) else parameters.text(body, "text"),
        model=parameters.text(body, "model"),
        session=parameters.text(body, "session"),
        language=parameters.text(body, "language"),
        forbid=forbidden(body),
        retries=retries,
        fields_path="input",
        text_path="input" if isinstance(given, str) else "text",
    )
    return question_of(profile, asked, sampling)
