"""How much each API key may ask: requests and tokens in a minute.

Both are buckets that hold a minute's worth and fill evenly, so a key may ask in bursts. Tokens are known after an
answer only: a key whose answers took more than it had waits until the debt is paid. Every server counts for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from loraline.core.errors import LoralineError, resource_exhausted
from loraline.core.serving.auth import Principal

_MINUTE = 60.0


@dataclass
class _Bucket:
    level: float
    time: float

    def fill(self, per_minute: int, now: float) -> float:
        """Bring the level up to now; a limit that was lowered meanwhile holds at once."""
        self.level = min(float(per_minute), self.level + (now - self.time) * per_minute / _MINUTE)
        self.time = now
        return self.level


class KeyRates:
    """Buckets of the keys that have limits; keys without any cost nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def admit(self, principal: Principal | None) -> None:
        """Count one request. RESOURCE_EXHAUSTED KEY_RATE_LIMITED with the time to wait when the key is at a limit."""
        if principal is None:
            return
        requests, tokens = principal.requests_per_minute, principal.tokens_per_minute
        # Tokens first: a request that is refused for them must not cost one of the requests.
        if tokens and (level := self._level(principal, "tokens", tokens)) <= 0:
            raise _limited(principal, "tokens", tokens, (1 - level) * _MINUTE / tokens)
        if requests:
            level = self._level(principal, "requests", requests)
            if level < 1:
                raise _limited(principal, "requests", requests, (1 - level) * _MINUTE / requests)
            self._buckets[principal.key_id, "requests"].level -= 1

    def spend(self, principal: Principal | None, tokens: int) -> None:
        """Count the tokens of a prompt and its answers."""
        if principal is not None and principal.tokens_per_minute:
            self._level(principal, "tokens", principal.tokens_per_minute)
            self._buckets[principal.key_id, "tokens"].level -= tokens

    def _level(self, principal: Principal, what: str, per_minute: int) -> float:
        now = self._clock()
        bucket = self._buckets.setdefault((principal.key_id, what), _Bucket(float(per_minute), now))
        return bucket.fill(per_minute, now)


def _limited(principal: Principal, what: str, per_minute: int, seconds: float) -> LoralineError:
    message = (
        f"The key {principal.name!r} has used its {per_minute} {what} per minute. "
        f"Try again in {max(1, round(seconds))} s, or have its limit raised."
    )
    error = resource_exhausted("KEY_RATE_LIMITED", message, key=principal.name, limit=f"{per_minute} {what} per minute")
    error.retry_after = timedelta(seconds=max(seconds, 1.0))
    error.quota = {f"{what} per minute": f"{per_minute} for the key {principal.name!r}"}
    return error
