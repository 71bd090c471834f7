"""Parameters of a request's JSON body, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.engines.port import Sampling


def sampling(body: Mapping[str, Any], max_tokens: int, default: Sampling | None = None) -> Sampling:
    """Read OpenAI's sampling parameters; what is unset is `default`'s, or OpenAI's own."""
    unset = default or Sampling(temperature=1.0)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(text, str) for text in stop):
        raise wrong("stop", "must be a text or a list of at most 16 texts")
    return Sampling(
        max_tokens=max_tokens,
        temperature=number(body, "temperature", unset.temperature, 0, 2),
        top_p=number(body, "top_p", unset.top_p, 1e-9, 1),
        top_k=max(0, integer(body, "top_k", -1) or 0),
        stop=tuple(stop),
        seed=integer(body, "seed", -(2**63)),
        repetition_penalty=number(body, "repetition_penalty", unset.repetition_penalty, 1e-9, 100),
        presence_penalty=number(body, "presence_penalty", unset.presence_penalty, -2, 2),
        frequency_penalty=number(body, "frequency_penalty", unset.frequency_penalty, -2, 2),
        n=integer(body, "n", 1) or 1,
        ignore_eos=flag(body, "ignore_eos"),
    )


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Return true or false; false when it is unset."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "must be true or false")
    return bool(value)


def text(body: Mapping[str, Any], name: str) -> str:
    """Return a text, empty for none. INVALID_ARGUMENT INVALID_PARAMETER otherwise, as of all of these."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, "must be a text")
    return value or ""


def integer(body: Mapping[str, Any], name: str, least: int) -> int | None:
    """Return a whole number of at least `least`, or None."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least or value >= 2**63:
        raise wrong(name, f"must be a whole number of at least {least}")
    return value


def number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """Return a number within bounds, or its default."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise wrong(name, f"must be a number from {least:g} to {most:g}")
    return float(value)


def wrong(name: str, problem: str) -> LoralineError:
    """Return the refusal of a parameter."""
    message = f"{name} {problem}."
    return invalid_argument("INVALID_PARAMETER", message, **{name: message})
