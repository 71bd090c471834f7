"""One request from question to last token: limits, prompt, engine, figures. gRPC and HTTP both answer through it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.serving.auth import current_principal
from loraline.core.serving.key_rates import KeyRates
from loraline.inference.admission import Admission
from loraline.inference.config import InferenceSettings
from loraline.inference.engine_errors import engine_gone
from loraline.inference.engines.port import EngineDead, EngineRefused, EngineRequest, Piece, Sampling
from loraline.inference.host import ModelHost
from loraline.inference.language.rules import FOLLOW, rule_of
from loraline.inference.limits import check_limits, invalid_field
from loraline.inference.metrics import InferenceMetrics
from loraline.inference.notices import Circumstances, notices_of
from loraline.inference.question import Figures, Question
from loraline.inference.serving import Target
from loraline.inference.sessions.context import fit, left_out_notice, room_for_prompt
from loraline.inference.sessions.turns import Sessions, Turn
from loraline.inference.structured.shape import AnswerShape, shape_of
from loraline.inference.structured.verdict import failure
from loraline.inference.system_prompts import SystemPrompts

_NO_RULE = "The question's language was not found, so no language rule was applied to the answer."
_LONG_PROMPT = 20_000
"""Characters from which a prompt is tokenized in a thread."""


class Answer:
    """A running answer."""

    def __init__(
        self,
        target: Target,
        request: EngineRequest,
        asked: Question,
        shape: AnswerShape | None,
        most_tokens: int,
        begun: float,
        metrics: InferenceMetrics,
        turn: Turn | None = None,
        notes: Sequence[str] = (),
    ):
        self.model = target.name
        self.shape = shape
        self.figures = Figures(prompt_tokens=len(request.prompt_ids))
        self._target = target
        self._request = request
        self._asked = asked
        self._most_tokens = most_tokens
        no_rule = asked.language == FOLLOW and (shape is None or shape.language == "")
        self._notes = [*([_NO_RULE] if no_rule else []), *notes]
        self._metrics = metrics
        self._begun = begun
        self._turn = turn

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what the engine says; closing it frees the engine's slot."""
        figures = self.figures
        try:
            async with aclosing(self._target.serving.engine.generate(self._request)) as pieces:
                async for piece in pieces:
                    self._target.serving.last_token = time.monotonic()
                    if piece.token_ids and not figures.first_token_seconds:
                        figures.first_token_seconds = time.monotonic() - self._begun
                        self._metrics.first_token.observe(figures.first_token_seconds)
                    figures.completion_tokens += len(piece.token_ids)
                    figures.texts.setdefault(piece.index, []).append(piece.text)
                    if piece.logprobs:
                        figures.logprobs.setdefault(piece.index, []).extend(piece.logprobs)
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
    def ended(self) -> bool:
        """Whether every answer asked for has ended."""
        return len(self.figures.finish) == self._request.sampling.n

    @property
    def notices(self) -> list[str]:
        """What people should know about this answer; read it after the last piece."""
        texts = {index: self.figures.text(index) for index in self.figures.finish}
        session = list(self._turn.notices) if self._turn is not None else []
        return [*session, *self._notes, *notices_of(self._circumstances(), texts, self.figures.finish)]

    def held(self) -> list[Piece]:
        """Return the finished answers, each as one piece."""
        finish = sorted(self.figures.finish.items())
        figures = self.figures
        return [
            Piece(index, figures.text(index), (), reason, None, figures.logprobs.get(index, ()))  # type: ignore[arg-type]
            for index, reason in finish
        ]

    def check_shape(self) -> None:
        """Raise STRUCTURED_ANSWER_CUT, STRUCTURED_ANSWER_INVALID or LANGUAGE_MISMATCH when it is not what was asked."""
        if self.shape is None:
            return
        limit, larger = self._request.sampling.max_tokens, self._circumstances().larger
        for index, reason in self.figures.finish.items():
            error = failure(self.shape, self.figures.text(index), reason, limit, larger)
            if error is None:
                continue
            self._metrics.structured_failures.labels(shape=self.shape.name, reason=error.reason).inc()
            if self._asked.cut_is_error or reason != "length":
                raise error

    def _circumstances(self) -> Circumstances:
        engine, chat_format = self._target.serving.engine, self._target.serving.chat_format
        window, sampling = engine.facts.max_model_len, self._request.sampling
        return Circumstances(
            prompt_tokens=self.figures.prompt_tokens,
            max_tokens=sampling.max_tokens,
            asked_tokens=self._asked.sampling.max_tokens,
            ceiling=min(self._most_tokens, window - self.figures.prompt_tokens),
            window=window,
            plain_prompt=not self._asked.messages,
            has_template=bool(chat_format.template),
            stop_texts=bool(sampling.stop),
            is_json=self.shape is not None and self.shape.asked is not None and self.shape.asked.is_json,
        )

    async def keep(self) -> None:
        """Keep a whole answer in its session, where it has one; call it before the answer's end is told.

        ABORTED SESSION_CHANGED when the session was reset or deleted meanwhile.
        """
        if self._turn is not None and not self._turn.ended:
            await self._turn.keep(self.figures.text())


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
        self.admission = Admission(settings.max_queued_requests, self._slots)
        self.rates = KeyRates()
        self._system_prompts = SystemPrompts.load(settings.system_prompts_file)
        metrics.waiting.set_function(lambda: self.admission.waiting)

    @asynccontextmanager
    async def answer(self, asked: Question) -> AsyncIterator[Answer]:
        """Open the answer to a question. INVALID_ARGUMENT names the field and the limit that it passes."""
        kind, outcome, begun = "none", "ok", time.monotonic()
        self.metrics.in_flight.inc()
        try:
            shape = await _shape(asked)
            async with self._admitted(asked) as (question, turn), self.host.target(question.model) as target:
                kind = target.kind
                lead, notes = self._system_prompts.lead_for(question, target)
                ids = await self._prompt_ids(question, target, turn, lead)
                sampling = _within_window(question.sampling, len(ids), target.serving.engine.facts.max_model_len)
                request = EngineRequest(
                    uuid.uuid4().hex, ids, sampling, target.adapter, shape.decoding if shape else None
                )
                most = self.settings.max_tokens
                answer = Answer(target, request, question, shape, most, begun, self.metrics, turn, notes)
                try:
                    yield answer
                finally:
                    figures = answer.figures
                    self.rates.spend(current_principal(), figures.prompt_tokens + figures.completion_tokens)
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
    async def _admitted(self, question: Question) -> AsyncIterator[tuple[Question, Turn | None]]:
        """Let a question in that is within the limits of the server and of its key, and open its session's turn."""
        check_limits(question.sampling, self.settings)
        try:
            with self.admission.place(question.sampling.n):
                self.rates.admit(current_principal())
                if not question.session or self.sessions is None:
                    yield question, None
                    return
                async with self.sessions.turn(question) as opened:
                    yield opened
        except LoralineError as error:
            if error.reason in ("QUEUE_FULL", "KEY_RATE_LIMITED"):
                self.metrics.refused.labels(reason=error.reason).inc()
            raise

    def _slots(self) -> int:
        """Return how many answers the engine generates at once."""
        return self.host.concurrency or self.settings.max_concurrent_requests

    async def _prompt_ids(
        self, question: Question, target: Target, turn: Turn | None, lead: Sequence[dict[str, str]]
    ) -> list[int]:
        chat_format = target.serving.chat_format
        window = target.serving.engine.facts.max_model_len
        limit = min(self.settings.max_prompt_tokens or window, window - 1)
        if turn is not None:
            room = room_for_prompt(limit, question.sampling.max_tokens, window)
            render = partial(chat_format.prompt_ids, lead=lead)
            ids, left_out = await fit(render, question.lead, question.earlier, question.messages, room)
            if left_out:
                turn.notices.append(left_out_notice(question.session, left_out, len(question.earlier), window))
            name = "messages"
        elif question.messages:
            ids, name = await chat_format.prompt_ids(question.messages, question.tools, lead), "messages"
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
                raise invalid_field("PROMPT_INVALID", message, name)
        _check_ids(ids, target)
        if not ids:
            raise invalid_field("PROMPT_EMPTY", f"{name} gives no token; there is nothing to continue.", name)
        if len(ids) > limit:
            message = (
                f"{name} has {len(ids)} tokens; this server takes at most {limit} (context window {window}). "
                "Shorten it, or leave out earlier turns."
            )
            raise invalid_field("PROMPT_TOO_LONG", message, name)
        return ids


async def _shape(question: Question) -> AnswerShape | None:
    if not question.shaped:
        return None
    rule = rule_of(question.language, question.forbid, question.spoken)
    # A new shape is parsed for milliseconds; a language model's service has a loop to keep free.
    return await asyncio.to_thread(shape_of, question.constraint, rule, question.shape_field)


def _check_ids(ids: Sequence[int], target: Target) -> None:
    """Refuse ids that the embedding has no row for: on a GPU one such prompt would end the engine for everybody."""
    rows = target.serving.engine.facts.vocab_size
    if rows and ids and max(ids) >= rows:
        message = (
            f"The prompt's text becomes token {max(ids)}; {target.serving.name} has 0 to {rows - 1}. That token "
            "was added to the tokenizer alone. Leave it out of the text, or serve the tokenizer of these weights."
        )
        raise failed_precondition("TOKEN_ID_OUT_OF_RANGE", message, token_id=str(max(ids)), rows=str(rows))


def _within_window(sampling: Sampling, prompt_tokens: int, window: int) -> Sampling:
    room = window - prompt_tokens
    return sampling if sampling.max_tokens <= room else Sampling(**{**vars(sampling), "max_tokens": room})


def _refused(request: EngineRequest, error: EngineRefused) -> LoralineError:
    if request.constraint is not None:
        field_name = f"structured.{request.constraint.kind}"
        message = f"The shape of the answer ({request.constraint.kind}) cannot be used: {error}"
        return invalid_field("STRUCTURE_INVALID", message, field_name)
    return invalid_field("REQUEST_REFUSED", f"The engine does not take this request: {error}", "sampling")
