"""The token loop of the transformers engine: sample, constrain, turn into text, stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.port import (
    Constraint,
    EngineFacts,
    EngineRefused,
    EngineRequest,
    Piece,
    Sampling,
    TokenLogprob,
)
from loraline.inference.engines.text_stream import TextStream


class Decoder:
    """Continues one prompt on a loaded model, in the calling thread."""

    def __init__(self, model: Any, chat_format: ChatFormat, facts: EngineFacts, grammars: Any):
        self._model = model
        self._format = chat_format
        self._facts = facts
        self._grammars = grammars
        self._eos = frozenset(chat_format.eos_token_ids)

    def run(self, request: EngineRequest, waited: float, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Yield pieces of every answer, one answer after the other; ends early when cancelled."""
        import torch

        generator = torch.Generator(device=self._model.device)
        if request.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.sampling.seed)
        for index in range(request.sampling.n):
            yield from self._answer(index, request, generator, waited, cancelled)

    def _answer(
        self, index: int, request: EngineRequest, generator: Any, waited: float, cancelled: Callable[[], bool]
    ) -> Iterator[Piece]:
        import torch

        sampling = request.sampling
        text = TextStream(self._format, sampling.stop)
        shape = _Shape(self._grammars, request.constraint, self._facts.vocab_size)
        limit = min(sampling.max_tokens, self._facts.max_model_len - len(request.prompt_ids))
        ids, fed, cache = list(request.prompt_ids), request.prompt_ids, None
        for produced in range(1, limit + 1):
            if cancelled():
                return
            with torch.inference_mode():
                tokens = torch.tensor([fed], device=self._model.device)
                output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1].float()
                token = _pick(logits, ids, len(request.prompt_ids), sampling, shape, generator)
                told = self._told(logits, token, sampling.logprobs)
            ids.append(token)
            fed = [token]
            shape.accept(token)
            ended = token in self._eos and not sampling.ignore_eos
            delta, stopped = ("", False) if ended else text.push(token)
            if ended or stopped or shape.complete:
                yield Piece(index, delta + ("" if stopped else text.finish()), [token], "stop", waited, told)
                return
            if produced == limit:
                yield Piece(index, delta + text.finish(), [token], "length", waited, told)
                return
            yield Piece(index, delta, [token], logprobs=told)

    def _told(self, logits: Any, token: int, most: int | None) -> list[TokenLogprob]:
        """Return the log-probability of a token and of the `most` likeliest ones, as the model gave them."""
        import torch

        if most is None:
            return []
        figures = torch.log_softmax(logits[0], dim=-1)
        values, ids = torch.topk(figures, min(most, figures.shape[-1]))
        name = self._format.tokenizer.decode
        top = tuple((name([int(i)]), float(value)) for value, i in zip(values, ids, strict=True))
        return [TokenLogprob(name([token]), float(figures[token]), top)]


class _Shape:
    """The constraint's state: which tokens may come next."""

    def __init__(self, grammars: Any, constraint: Constraint | None, vocab_size: int):
        self._matcher: Any = None
        self._bitmask: Any = None
        if constraint is None:
            return
        if grammars is None:
            raise EngineRefused("structured answers need xgrammar on this engine: pip install xgrammar")
        import xgrammar

        try:
            self._matcher = xgrammar.GrammarMatcher(_compile(grammars, constraint))
        except (RuntimeError, ValueError) as error:
            raise EngineRefused(str(error).strip()) from error
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher is not None and self._matcher.is_terminated()

    def mask(self, logits: Any) -> None:
        """Forbid, in place, what the constraint does not allow next."""
        if self._matcher is not None:
            import xgrammar

            self._matcher.fill_next_token_bitmask(self._bitmask)
            xgrammar.apply_token_bitmask_inplace(logits, self._bitmask.to(logits.device))

    def accept(self, token: int) -> None:
        """Move on by one token."""
        if self._matcher is not None:
            self._matcher.accept_token(token)


def _compile(grammars: Any, constraint: Constraint) -> Any:
    import json

    if constraint.kind == "json_object":
        # An object, not any JSON value; compact, since small models loop on whitespace.
        return grammars.compile_json_schema(
            '{"type": "object"}', any_whitespace=False, separators=(",", ":"), strict_mode=False
        )
    if constraint.kind == "json_schema":
        return grammars.compile_json_schema(json.dumps(constraint.value), any_whitespace=False, separators=(",", ":"))
    if constraint.kind == "regex":
        return grammars.compile_regex(constraint.value)
    if constraint.kind == "choices":
        return grammars.compile_grammar(
            "root ::= " + " | ".join(json.dumps(c, ensure_ascii=False) for c in constraint.value)
        )
    return grammars.compile_grammar(constraint.value)


def _pick(logits: Any, ids: list[int], prompt_length: int, sampling: Sampling, shape: _Shape, generator: Any) -> int:
    """Sample one token from the logits [1, vocabulary]."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    seen: Any = torch.tensor([ids], device=logits.device)
    if sampling.repetition_penalty != 1.0:
        logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, logits)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.zeros_like(logits)
        answer = seen[:, prompt_length:]
        counts.scatter_add_(1, answer, torch.ones_like(answer, dtype=logits.dtype))
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    logits = logits.clone()
    shape.mask(logits)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = TopKLogitsWarper(min(sampling.top_k, logits.shape[-1]))(seen, logits)
    if sampling.top_p < 1.0:
        logits = TopPLogitsWarper(sampling.top_p)(seen, logits)
    return int(torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator))
