"""Inference: ask models, load and promote adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc

from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.calls import WORK_SECONDS, Endpoints, pages
from loraline.client.errors import LoralineApiError
from loraline.client.resources.artifacts import Ref, as_ref

Conversation = str | Sequence[Mapping[str, str] | inference_pb2.Message]


@dataclass(frozen=True)
class Answer:
    """A whole answer. `finish_reason` is STOP, LENGTH or CANCELLED; `seconds` runs from the call to the last token."""

    text: str
    model: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    notices: tuple[str, ...] = ()


class AsyncInference:
    """`client.inference`. Models are named `name`, `name@alias` or `name:vN`; empty means the base."""

    def __init__(self, endpoints: Endpoints):
        self._endpoint = endpoints.of("inference")
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._endpoint.channel
        )  # type: ignore[assignment]

    async def chat(
        self,
        model: str,
        messages: Conversation,
        *,
        sampling: inference_pb2.SamplingParameters | None = None,
        structured: inference_pb2.StructuredOutput | None = None,
        session: str = "",
        profile: str = "",
        language: str = "",
    ) -> AsyncIterator[inference_pb2.ChatResponse]:
        """Yield the pieces of an answer; `messages` is the user's turn as text, or the turns so far."""
        request = inference_pb2.ChatRequest(
            model=model,
            messages=as_messages(messages),
            sampling=sampling,
            structured=structured,
            session=session,
            profile=profile,
            language=language,
        )
        async for piece in self._endpoint.stream(self._stub.Chat, request):
            yield piece

    async def answer(
        self,
        model: str,
        messages: Conversation,
        *,
        sampling: inference_pb2.SamplingParameters | None = None,
        **options: Any,
    ) -> Answer:
        """Return a whole answer; arguments as in `chat`."""
        return collect([piece async for piece in self.chat(model, messages, sampling=sampling, **options)])

    async def generate(
        self,
        model: str,
        prompt: str,
        *,
        sampling: inference_pb2.SamplingParameters | None = None,
        structured: inference_pb2.StructuredOutput | None = None,
    ) -> inference_pb2.GenerateResponse:
        """Complete a prompt as it stands, without a chat template."""
        request = inference_pb2.GenerateRequest(model=model, prompt=prompt, sampling=sampling, structured=structured)
        return await self._endpoint.unary(self._stub.Generate, request, timeout=WORK_SECONDS)

    async def models(self) -> list[inference_pb2.ServedModel]:
        """Return what can be asked, base first."""

        async def page(token: str) -> inference_pb2.ListModelsResponse:
            request = inference_pb2.ListModelsRequest(page_token=token)
            return await self._endpoint.unary(self._stub.ListModels, request)

        return [model async for model in pages(page, lambda reply: reply.models)]

    async def profiles(self) -> list[inference_pb2.Profile]:
        """Return the response profiles, by name."""

        async def page(token: str) -> inference_pb2.ListProfilesResponse:
            request = inference_pb2.ListProfilesRequest(page_token=token)
            return await self._endpoint.unary(self._stub.ListProfiles, request)

        return [profile async for profile in pages(page, lambda reply: reply.profiles)]

    async def load_model(self, model: trainer_pb2.BaseModel, served_name: str = "") -> inference_pb2.ServedModel:
        """Replace the base model that the engine serves."""
        request = inference_pb2.LoadModelRequest(model=model, served_name=served_name)
        return (await self._endpoint.unary(self._stub.LoadModel, request, timeout=WORK_SECONDS)).model

    async def load_adapter(self, adapter: Ref) -> inference_pb2.ServedModel:
        """Load an adapter; FAILED_PRECONDITION with figures when it is not what answers."""
        request = inference_pb2.LoadAdapterRequest(adapter=as_ref(adapter))
        return (await self._endpoint.unary(self._stub.LoadAdapter, request, timeout=WORK_SECONDS)).model

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter out, by its served name with version or alias."""
        request = inference_pb2.UnloadAdapterRequest(name=name)
        await self._endpoint.unary(self._stub.UnloadAdapter, request, idempotent=False)

    async def set_alias(self, adapter: Ref, alias: str) -> inference_pb2.SetAliasResponse:
        """Load an adapter, prove it, then move an alias to it."""
        request = inference_pb2.SetAliasRequest(adapter=as_ref(adapter), alias=alias)
        return await self._endpoint.unary(self._stub.SetAlias, request, timeout=WORK_SECONDS)

    async def rollback(self, name: str, alias: str) -> inference_pb2.RollbackResponse:
        """Move an alias back to where it pointed before."""
        request = inference_pb2.RollbackRequest(name=name, alias=alias)
        return await self._endpoint.unary(self._stub.Rollback, request, idempotent=False, timeout=WORK_SECONDS)

    async def capabilities(self) -> inference_pb2.GetCapabilitiesResponse:
        """Return what the server can serve."""
        return await self._endpoint.unary(self._stub.GetCapabilities, inference_pb2.GetCapabilitiesRequest())

    async def create_session(
        self, model: str = "", *, system_prompt: str = "", category: str = "", ttl: timedelta | None = None
    ) -> inference_pb2.Session:
        """Open a session that keeps its history on the server; its name goes into `chat`'s `session`."""
        request = inference_pb2.CreateSessionRequest(model=model, system_prompt=system_prompt, category=category)
        if ttl is not None:
            request.ttl.FromTimedelta(ttl)
        return (await self._endpoint.unary(self._stub.CreateSession, request, idempotent=False)).session

    async def session(self, name: str) -> inference_pb2.Session:
        """Return one of the key's sessions with its history."""
        return (await self._endpoint.unary(self._stub.GetSession, inference_pb2.GetSessionRequest(name=name))).session

    async def sessions(self) -> list[inference_pb2.Session]:
        """Return the key's sessions, newest first, without their histories."""

        async def page(token: str) -> inference_pb2.ListSessionsResponse:
            request = inference_pb2.ListSessionsRequest(page_token=token)
            return await self._endpoint.unary(self._stub.ListSessions, request)

        return [session async for session in pages(page, lambda reply: reply.sessions)]

    async def reset_session(self, name: str) -> inference_pb2.Session:
        """Clear a session's history."""
        request = inference_pb2.ResetSessionRequest(name=name)
        return (await self._endpoint.unary(self._stub.ResetSession, request)).session

    async def delete_session(self, name: str) -> None:
        """Delete a session."""
        request = inference_pb2.DeleteSessionRequest(name=name)
        await self._endpoint.unary(self._stub.DeleteSession, request, idempotent=False)


def as_messages(messages: Conversation) -> list[inference_pb2.Message]:
    """Return a conversation given as text, dictionaries or messages."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    try:
        return [turn if isinstance(turn, inference_pb2.Message) else inference_pb2.Message(**turn) for turn in turns]
    except UnicodeEncodeError:  # what Python makes of input that is no UTF-8
        text = "The message is no valid text: it holds bytes that are not UTF-8."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "NOT_TEXT", text) from None


def collect(pieces: Sequence[inference_pb2.ChatResponse]) -> Answer:
    """Join the pieces of a stream; an empty stream gives an empty answer."""
    last = pieces[-1] if pieces else inference_pb2.ChatResponse()
    return Answer(
        text="".join(piece.delta for piece in pieces),
        model=next((piece.model for piece in pieces if piece.model), ""),
        finish_reason=inference_pb2.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_"),
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        seconds=last.timings.total.ToTimedelta().total_seconds(),
        notices=tuple(last.notices),
    )
