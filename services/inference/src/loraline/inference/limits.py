"""What one question may ask for, at most."""

from __future__ import annotations

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.port import Sampling


def check_limits(sampling: Sampling, limits: InferenceSettings) -> None:
    """Raise INVALID_ARGUMENT that names the field and the limit that it passes."""
    if sampling.n > limits.max_n:
        raise _over("sampling.n", "n", sampling.n, limits.max_n, "TOO_MANY_ANSWERS")
    if sampling.max_tokens > limits.max_tokens:
        raise _over("sampling.max_tokens", "max_tokens", sampling.max_tokens, limits.max_tokens, "MAX_TOKENS_TOO_HIGH")
    if "" in sampling.stop:
        # One engine would end every answer at once, another refuse it.
        message = "stop holds an empty text, which every answer would begin with. Leave it out."
        raise invalid_field("REQUEST_REFUSED", message, "sampling.stop")
    if sampling.n > 1 and sampling.temperature == 0:
        message = "n above 1 with temperature 0 would give the same answer n times. Raise temperature, or ask for one."
        raise invalid_field("GREEDY_WITH_N", message, "sampling.n")


def invalid_field(reason: str, message: str, path: str) -> LoralineError:
    """INVALID_ARGUMENT for one field, given by its path with dots."""
    return invalid_argument(reason, message, **{path.replace(".", "__"): message})


def _over(path: str, name: str, value: int, limit: int, reason: str) -> LoralineError:
    return invalid_field(reason, f"{name} is {value}; this server takes at most {limit}.", path)
