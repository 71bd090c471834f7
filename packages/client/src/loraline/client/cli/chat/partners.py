"""Who answers: this platform's inference service, or any server that speaks OpenAI's HTTP API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from loraline.api.inference.v1 import inference_pb2
from loraline.client.cli.chat.talk import Talk
from loraline.client.sync import Loraline

Pieces = Iterator[inference_pb2.ChatResponse]


class Partner(Protocol):
    """Answers talks in pieces. Errors are LoralineApiError."""

    def ask(self, talk: Talk, question: str) -> Pieces:
        """Yield the answer as it comes."""
        ...

    def models(self) -> list[str]:
        """Return the names that can be asked."""
        ...

    def reset(self, talk: Talk) -> None:
        """Forget what the server keeps of a talk."""
        ...


class ServicePartner:
    """Inference over gRPC."""

    def __init__(self, client: Loraline):
        self._client = client

    def ask(self, talk: Talk, question: str) -> Pieces:
        """Yield the answer as it comes."""
        sampling = inference_pb2.SamplingParameters(
            max_tokens=talk.max_tokens, temperature=talk.temperature, seed=talk.seed
        )
        return self._client.inference.chat(
            talk.model,
            talk.messages(question),
            sampling=sampling,
            structured=inference_pb2.StructuredOutput(json_only=True) if talk.json_only else None,
            session=talk.session,
            language=talk.language,
        )

    def models(self) -> list[str]:
        """Return the names that can be asked, aliases too."""
        found = []
        for model in self._client.inference.models():
            aliases = [f"{model.name.partition(':')[0]}@{alias}" for alias in model.aliases]
            found += [model.name, *aliases]
        return found

    def reset(self, talk: Talk) -> None:
        """Clear the talk's session."""
        if talk.session:
            self._client.inference.reset_session(talk.session)
