"""Limits that all jobs of a service share: how many calls at a time an endpoint takes, and when it shall be left alone.

Jobs run in processes of their own, so the state of each limit is a small file under a lock, in the data folder that the
jobs of a service share. Each process tells its successes and refusals there and reads its share, at most a few times
a second; in between it counts by itself. A process that is gone is forgotten after some seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

SUCCESSES_FOR_ONE_MORE = 25
CUT = 0.75
BREAKER_AFTER = 5
LONGEST_BREAK_SECONDS = 60.0
MEMBER_SECONDS = 15.0
TURN_SECONDS = 5.0


@dataclass
class LimitState:
    """A limit as all jobs see it: additive increase, multiplicative decrease, a circuit breaker. Times are epochs."""

    limit: float
    successes: int = 0
    cut_at: float = 0.0
    refusals: int = 0
    closed_until: float = 0.0
    tripped: bool = False
    prober: str = ""
    probe_until: float = 0.0
    members: dict[str, float] = field(default_factory=dict)

    def succeeded(self, count: int, ceiling: int) -> None:
        """Count answers: every 25 of them give one call more at a time, up to the ceiling."""
        self.successes += count
        self.refusals, self.tripped, self.prober, self.closed_until = 0, False, "", 0.0
        more, self.successes = divmod(self.successes, SUCCESSES_FOR_ONE_MORE)
        self.limit = min(float(ceiling), self.limit + more)

    def refused(self, started: float, now: float, wait: float) -> bool:
        """Note a refusal of a call that began at `started`; return whether fewer calls at a time follow from it.

        Only the first refusal of a burst cuts: the others began before the cut could be felt.
        """
        burst = started <= self.cut_at
        self.refusals += 0 if burst else 1
        if wait > 0 or self.refusals >= BREAKER_AFTER:
            backoff = 2.0 ** min(max(0, self.refusals - BREAKER_AFTER), 10)
            self.closed_until = max(self.closed_until, now + min(max(wait, backoff), LONGEST_BREAK_SECONDS))
            self.tripped, self.prober = True, ""
        if burst:
            return int(self.limit) > 1
        before, self.limit = int(self.limit), max(1.0, self.limit * CUT)
        self.cut_at, self.successes = now, 0
        return int(self.limit) < before

    def share(self, member: str, now: float) -> int:
        """Return how many calls at a time this member may have; what cannot be divided goes round in turns."""
        self.members[member] = now
        self.members = {name: seen for name, seen in self.members.items() if now - seen < MEMBER_SECONDS}
        names = sorted(self.members)
        whole, rest = divmod(int(self.limit), len(names))
        rank = (names.index(member) + int(now / TURN_SECONDS)) % len(names)
        return whole + (1 if rank < rest else 0)

    def may_probe(self, member: str, now: float, seconds: float) -> bool:
        """Return whether this member is the one that tries whether a closed limit has opened."""
        if self.prober not in ("", member) and now < self.probe_until:
            return False
        self.prober, self.probe_until = member, now + seconds
        return True


class LimitFile:
    """One limit's state on disk. `change` runs under the lock, so it must be quick."""

    def __init__(self, folder: Path, key: str, ceiling: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._path, self._lock, self._ceiling = folder / f"{name}.json", folder / f"{name}.lock", ceiling

    def exchange(self, change: Callable[[LimitState], None]) -> LimitState:
        """Read the state, change it and write it back; a file that cannot be read counts as a fresh one."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # The kernel lets go of it when the process dies.
            state = self._read()
            change(state)
            part = self._path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(asdict(state)), encoding="utf-8")
            part.replace(self._path)
        return state

    def _read(self) -> LimitState:
        try:
            state = LimitState(**json.loads(self._path.read_text(encoding="utf-8")))
            state.limit = min(max(1.0, float(state.limit)), float(self._ceiling))
        except (OSError, ValueError, TypeError):
            return LimitState(float(self._ceiling))
        if not any(time.time() - seen < MEMBER_SECONDS for seen in state.members.values()):
            return LimitState(float(self._ceiling))  # What stood there is stale: nobody has asked for some time.
        return state


class LimitMemory:
    """The same for one process alone, as in a preview."""

    def __init__(self, ceiling: int):
        self._state = LimitState(float(ceiling))

    def exchange(self, change: Callable[[LimitState], None]) -> LimitState:
        """Change the state."""
        change(self._state)
        return self._state
