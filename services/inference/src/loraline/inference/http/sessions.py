"""/v1/sessions: the same five calls as over gRPC, in the JSON of their protobuf messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.errors import invalid_argument
from loraline.core.serving.validation import check
from loraline.inference.http.requests import read_body
from loraline.inference.sessions.calls import SessionCalls

M = TypeVar("M", bound=Message)


def session_routes(calls: SessionCalls) -> list[Route]:
    """Return the routes of sessions."""
    routes = _Routes(calls)
    return [
        Route("/v1/sessions", routes.create, methods=["POST"]),
        Route("/v1/sessions", routes.list, methods=["GET"]),
        Route("/v1/sessions/{name}", routes.get, methods=["GET"]),
        Route("/v1/sessions/{name}", routes.delete, methods=["DELETE"]),
        Route("/v1/sessions/{name}/reset", routes.reset, methods=["POST"]),
    ]


class _Routes:
    def __init__(self, calls: SessionCalls):
        self._calls = calls

    async def create(self, request: Request) -> JSONResponse:
        """POST /v1/sessions; the body has CreateSessionRequest's fields, ttl such as "3600s"."""
        asked = _message(await read_body(request), pb.CreateSessionRequest())
        return JSONResponse(_json(await self._calls.create(asked)), 201)

    async def list(self, request: Request) -> JSONResponse:
        """GET /v1/sessions?page_size=&page_token=."""
        page = await self._calls.list(_message(dict(request.query_params), pb.ListSessionsRequest()))
        body = {"object": "list", "data": [_json(session) for session in page.sessions]}
        return JSONResponse({**body, "next_page_token": page.next_page_token})

    async def get(self, request: Request) -> JSONResponse:
        """GET /v1/sessions/{name}, with the history."""
        asked = _message(request.path_params, pb.GetSessionRequest())
        return JSONResponse(_json(await self._calls.get(asked)))

    async def reset(self, request: Request) -> JSONResponse:
        """POST /v1/sessions/{name}/reset."""
        asked = _message(request.path_params, pb.ResetSessionRequest())
        return JSONResponse(_json(await self._calls.reset(asked)))

    async def delete(self, request: Request) -> JSONResponse:
        """DELETE /v1/sessions/{name}."""
        asked = _message(request.path_params, pb.DeleteSessionRequest())
        await self._calls.delete(asked)
        return JSONResponse({"name": asked.name, "object": "session.deleted", "deleted": True})


def _message(content: Mapping[str, Any], message: M) -> M:
    try:
        json_format.ParseDict(dict(content), message)
    except json_format.ParseError as error:
        text = f"The request is no {message.DESCRIPTOR.name}: {error}"
        raise invalid_argument("INVALID_PARAMETER", text) from error
    check(message)
    return message


def _json(session: pb.Session) -> dict[str, Any]:
    content = json_format.MessageToDict(
        session, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {"object": "session", **content}
