"""One request from question to last token: limits, prompt, engine, figures. gRPC and HTTP both answer through it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import grpc

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.config import InferenceSettings
from loraline.inference.engine_errors import engine_gone
from loraline.inference.engines.port import Constraint, EngineDead, EngineRefused, EngineRequest, Piece, Sampling
from loraline.inference.host import ModelHost
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.serving import Target
from loraline.inference.sessions.context import fit, left_out_notice, room_for_prompt
from loraline.inference.sessions.turns import Sessions, Turn

_LONG_PROMPT = 20_000
"""Characters from which a prompt is tokenized in a thread."""


@dataclass(frozen=True)
class Question:
    """What a client asks, whichever way it came in."""

    model: str
    sampling: Sampling
    prompt: str | Sequence[int] = ""
    """A text or token ids to continue; used when there are no messages."""
    messages: Sequence[dict[str, str]] = ()
    constraint: Constraint | None = None
    session: str = ""
    """Session that the messages are a turn of; empty for none."""
    lead: Sequence[dict[str, str]] = ()
    """System prompt of the session, before all that was said."""
    earlier: Sequence[Sequence[dict[str, str]]] = ()
    """Earlier turns of the session; the oldest are left out where the window has no room for all."""


@dataclass
class Figures:
    """Counts and times of an answer; complete after its last piece."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: dict[int, str] = field(default_factory=dict)
    """Answer's index -> `stop` or `length`."""
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    texts: dict[int, list[str]] = field(default_factory=dict)

    def text(self, index: int = 0) -> str:
        """Return an answer's text so far."""
        return "".join(self.texts.get(index, ()))


class Answer:
    """A running answer."""

    def __init__(
        self,
        target: Target,
        request: EngineRequest,
        asked_tokens: int,
        begun: float,
        metrics: InferenceMetrics,
        turn: Turn | None = None,
    ):
        self.model = target.name
        self.constraint = request.constraint
        self.figures = Figures(prompt_tokens=len(request.prompt_ids))
        self._target = target
        self._request = request
        self._asked_tokens = asked_tokens
        self._metrics = metrics
        self._begun = begun
        self._turn = turn

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what the engine says; closing it frees the engine's slot."""
        figures = self.figures
        try:
            async with aclosing(self._target.serving.engine.generate(self._request)) as pieces:
                async for piece in pieces:
                    if piece.token_ids and not figures.first_token_seconds:
                        figures.first_token_seconds = time.monotonic() - self._begun
                        self._metrics.first_token.observe(figures.first_token_seconds)
                    figures.completion_tokens += len(piece.token_ids)
                    figures.texts.setdefault(piece.index, []).append(piece.text)
                    if piece.finish_reason:
                        figures.finish[piece.index] = piece.finish_reason
                        figures.total_seconds = time.monotonic() - self._begun
                        figures.queue_seconds = piece.queue_seconds or figures.queue_seconds
                    yield piece
        except EngineDead as error:
            raise engine_gone() from error
        except EngineRefused as error:
            raise _refused(self._request, error) from error
        finally:
            self._metrics.tokens.labels(direction="prompt").inc(figures.prompt_tokens)
            self._metrics.tokens.labels(direction="completion").inc(figures.completion_tokens)

    @property
    def notices(self) -> list[str]:
        """What people should know about this answer; read it after the last piece."""
        found = list(self._turn.notices) if self._turn is not None else []
        cut = "length" in self.figures.finish.values()
        limit = self._request.sampling.max_tokens
        if cut and limit < self._asked_tokens:
            window = self._target.serving.engine.facts.max_model_len
            found.append(
                f"The answer was cut where the context window of {window} tokens ends; the prompt takes "
                f"{self.figures.prompt_tokens} of them. Shorten the conversation."
            )
        elif cut:
            found.append(f"The answer was cut at max_tokens={limit}. Ask again with max_tokens={limit * 2}.")
        for index in sorted(self.figures.finish):
            if not self.figures.text(index).strip():
                found.append(self._why_empty(index))
        return found

    def check_shape(self) -> None:
        """Raise STRUCTURED_ANSWER_CUT or STRUCTURED_ANSWER_INVALID when a constrained answer is not what was asked."""
        if self.constraint is None:
            return
        for index, reason in self.figures.finish.items():
            text = self.figures.text(index)
            if reason == "length" and not (self.constraint.is_json and _is_json(text)):
                limit = self._request.sampling.max_tokens
                message = (
                    f"The answer was cut at max_tokens={limit} before it was complete. "
                    f"Ask again with max_tokens={limit * 2}, or with a smaller shape."
                )
                raise LoralineError(grpc.StatusCode.OUT_OF_RANGE, "STRUCTURED_ANSWER_CUT", message)
            if self.constraint.is_json and not _is_json(text):
                message = "The answer is no valid JSON although it was constrained to be. Ask again."
                raise LoralineError(grpc.StatusCode.INTERNAL, "STRUCTURED_ANSWER_INVALID", message)

    async def keep(self) -> None:
        """Keep a whole answer in its session, where it has one; call it before the answer's end is told.

        ABORTED SESSION_CHANGED when the session was reset or deleted meanwhile.
        """
        if self._turn is not None and not self._turn.ended:
            await self._turn.keep(self.figures.text())

    def _why_empty(self, index: int) -> str:
        which = f"Answer {index} is empty" if self._request.sampling.n > 1 else "The answer is empty"
        if self.figures.finish[index] == "length":
            return f"{which}: all its tokens are whitespace or special tokens. Is this the format it was trained on?"
        return (
            f"{which}: the model ended it at once. Check that the prompt ends with a question, and that the template "
            "is the one it was trained with; a stop text may also have come first."
        )


class Generation:
    """Checks questions against the server's limits and opens their answers."""

    def __init__(
        self,
        host: ModelHost,
        settings: InferenceSettings,
        metrics: InferenceMetrics,
        sessions: Sessions | None = None,
    ):
        self.host = host
        self.settings = settings
        self.metrics = metrics
        self.sessions = sessions

    @asynccontextmanager
    async def answer(self, asked: Question) -> AsyncIterator[Answer]:
        """Open the answer to a question. INVALID_ARGUMENT names the field and the limit that it passes."""
        kind, outcome, begun = "none", "ok", time.monotonic()
        self.metrics.in_flight.inc()
        try:
            self._check_limits(asked.sampling)
            async with self._turn(asked) as (question, turn), self.host.target(question.model) as target:
                kind = target.kind
                ids = await self._prompt_ids(question, target, turn)
                sampling = _within_window(question.sampling, len(ids), target.serving.engine.facts.max_model_len)
                request = EngineRequest(uuid.uuid4().hex, ids, sampling, target.adapter, question.constraint)
                yield Answer(target, request, question.sampling.max_tokens, begun, self.metrics, turn)
        except LoralineError as error:
            outcome = error.reason
            raise
        except BaseException as error:
            outcome = "INTERNAL" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(model_kind=kind, outcome=outcome).inc()

    @asynccontextmanager
    async def _turn(self, question: Question) -> AsyncIterator[tuple[Question, Turn | None]]:
        if not question.session or self.sessions is None:
            yield question, None
            return
        async with self.sessions.turn(question) as opened:
            yield opened

    def _check_limits(self, sampling: Sampling) -> None:
        limits = self.settings
        if sampling.n > limits.max_n:
            raise _over("sampling.n", "n", sampling.n, limits.max_n, "TOO_MANY_ANSWERS")
        if sampling.max_tokens > limits.max_tokens:
            raise _over(
                "sampling.max_tokens", "max_tokens", sampling.max_tokens, limits.max_tokens, "MAX_TOKENS_TOO_HIGH"
            )
        if sampling.n > 1 and sampling.temperature == 0:
            message = (
                "n above 1 with temperature 0 would give the same answer n times. Raise temperature, or ask for one."
            )
            raise _invalid("GREEDY_WITH_N", message, "sampling.n")

    async def _prompt_ids(self, question: Question, target: Target, turn: Turn | None) -> list[int]:
        chat_format = target.serving.chat_format
        window = target.serving.engine.facts.max_model_len
        limit = min(self.settings.max_prompt_tokens or window, window - 1)
        if turn is not None:
            room = room_for_prompt(limit, question.sampling.max_tokens, window)
            ids, left_out = await fit(chat_format.prompt_ids, question.lead, question.earlier, question.messages, room)
            if left_out:
                turn.notices.append(left_out_notice(question.session, left_out, len(question.earlier), window))
            name = "messages"
        elif question.messages:
            ids, name = await chat_format.prompt_ids(question.messages), "messages"
        elif isinstance(question.prompt, str):
            # Tokenizing megabytes takes seconds, which must not be the event loop's.
            encode = chat_format.encode
            long = len(question.prompt) > _LONG_PROMPT
            ids = await asyncio.to_thread(encode, question.prompt) if long else encode(question.prompt)
            name = "prompt"
        else:
            ids, name = list(question.prompt), "prompt"
            vocab = target.serving.engine.facts.vocab_size
            if not ids or min(ids) < 0 or max(ids) >= vocab:
                message = f"prompt as token ids must hold at least one id, each from 0 to {vocab - 1}."
                raise _invalid("PROMPT_INVALID", message, name)
        if not ids:
            raise _invalid("PROMPT_EMPTY", f"{name} gives no token; there is nothing to continue.", name)
        if len(ids) > limit:
            message = (
                f"{name} has {len(ids)} tokens; this server takes at most {limit} (context window {window}). "
                "Shorten it, or leave out earlier turns."
            )
            raise _invalid("PROMPT_TOO_LONG", message, name)
        return ids


def _within_window(sampling: Sampling, prompt_tokens: int, window: int) -> Sampling:
    room = window - prompt_tokens
    return sampling if sampling.max_tokens <= room else Sampling(**{**vars(sampling), "max_tokens": room})


def _over(path: str, name: str, value: int, limit: int, reason: str) -> LoralineError:
    return _invalid(reason, f"{name} is {value}; this server takes at most {limit}.", path)


def _invalid(reason: str, message: str, path: str) -> LoralineError:
    return invalid_argument(reason, message, **{path.replace(".", "__"): message})


def _refused(request: EngineRequest, error: EngineRefused) -> LoralineError:
    if request.constraint is not None:
        field_name = f"structured.{request.constraint.kind}"
        message = f"The shape of the answer ({request.constraint.kind}) cannot be used: {error}"
        return _invalid("STRUCTURE_INVALID", message, field_name)
    return _invalid("REQUEST_REFUSED", f"The engine does not take this request: {error}", "sampling")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
