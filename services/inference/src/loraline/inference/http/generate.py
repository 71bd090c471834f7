"""POST /generate: one prompt, one answer, the API key in the body or in a header.

For clients of small home-made servers, which send `{"prompt": …, "api_key": …, "max_tokens": …}` and want a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraline.core.errors import invalid_argument
from loraline.inference.engines.port import Sampling
from loraline.inference.generation import Generation
from loraline.inference.http import parameters
from loraline.inference.http.requests import read_body
from loraline.inference.http.responses import usage
from loraline.inference.http.streaming import until_disconnect
from loraline.inference.question import Question
from loraline.inference.structured.answering import whole

_KNOWN = {
    "prompt",
    "api_key",
    "model",
    "system",
    "raw",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_MAX_TOKENS = 256


def generate_route(generation: Generation) -> Route:
    """Return the route."""

    async def generate(request: Request) -> Response:
        asked = generate_question(await read_body(request), generation.settings.max_tokens)
        return await until_disconnect(request, _answer(generation, asked))

    return Route("/generate", generate, methods=["POST"])


def generate_question(body: Mapping[str, Any], most_tokens: int) -> Question:
    """Read the body. The prompt is asked as a user's message, for that is what it is to a chat model.

    `raw` true has the prompt continued as it stands. INVALID_ARGUMENT names what is not understood.
    """
    for name, value in body.items():
        if name not in _KNOWN and value is not None:
            message = f"{name} is not supported by /generate. Leave it out, or use /v1/chat/completions."
            raise invalid_argument("UNSUPPORTED_PARAMETER", message, **{name: "unsupported"})
    prompt = parameters.text(body, "prompt")
    if not prompt:
        raise parameters.wrong("prompt", "must be a text, and not empty")
    raw, system = body.get("raw", False), parameters.text(body, "system")
    if not isinstance(raw, bool):
        raise parameters.wrong("raw", "must be true or false")
    if raw and system:
        raise parameters.wrong("system", "goes into a chat template, which raw leaves out")
    limit = parameters.integer(body, "max_tokens", 1) or min(_MAX_TOKENS, most_tokens)
    sampling = parameters.sampling(body, limit, Sampling())
    model = parameters.text(body, "model")
    if raw:
        return Question(model, sampling, prompt=prompt)
    lead = [{"role": "system", "content": system}] if system else []
    return Question(model, sampling, messages=[*lead, {"role": "user", "content": prompt}])


async def _answer(generation: Generation, asked: Question) -> Response:
    answer = await whole(generation, asked)
    figures = answer.figures
    return JSONResponse(
        {
            "text": figures.text(),
            "model": answer.model,
            "finish_reason": figures.finish[0],
            "usage": usage(figures),
            "notices": answer.notices,
        }
    )
