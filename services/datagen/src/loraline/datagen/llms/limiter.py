"""One process's view of a shared limit: a count of its own calls against its share."""

from __future__ import annotations

import secrets
import time

from loraline.datagen.llms.limits import LimitFile, LimitMemory, LimitState

SYNC_SECONDS = 0.5
PROBE_SECONDS = 150.0


class Limiter:
    """Says whether another call may start now. `closed` seconds pass before calls go on; then one goes first, alone."""

    def __init__(self, store: LimitFile | LimitMemory, ceiling: int):
        self._store, self._ceiling = store, ceiling
        self._member = secrets.token_hex(6)
        self._running = self._successes = self._share = 0
        self._alone = True
        """The first call of a run, and the first after a break, goes alone: it shows whether all is well."""
        self._synced_at = 0.0
        self._state = LimitState(float(ceiling))
        self._join()

    def _join(self) -> None:
        def join(state: LimitState) -> None:
            # A break may be stale by now; this run finds out with one call.
            state.closed_until = 0.0
            self._share = state.share(self._member, time.time())

        self._state = self._store.exchange(join)

    @property
    def in_force(self) -> int:
        """Calls at a time that the endpoint takes now, of all jobs together."""
        return int(self._state.limit)

    @property
    def opens_in(self) -> float:
        """Seconds until calls may start again; 0 when they may."""
        return max(0.0, self._state.closed_until - time.time())

    def free(self) -> bool:
        """Return whether a call may start."""
        self._sync()
        if self._state.closed_until > time.time():
            return False
        if self._alone:
            return self._running == 0 and self._may_probe()
        return self._running < self._share

    def _may_probe(self) -> bool:
        if not self._state.tripped:
            return self._share > 0
        granted = False

        def ask(state: LimitState) -> None:
            nonlocal granted
            granted = not state.tripped or state.may_probe(self._member, time.time(), PROBE_SECONDS)

        self._state = self._store.exchange(ask)
        return granted

    def begin(self) -> float:
        """Count a call that starts; return its time, for `refused`."""
        self._running += 1
        return time.time()

    def end(self) -> None:
        """Count a call that has ended, however."""
        self._running -= 1

    def succeeded(self) -> None:
        """Note an answer."""
        self._successes += 1
        if self._alone or self._state.tripped:
            self._alone = False
            self._sync(now=True)

    def refused(self, started: float, wait: float = 0.0) -> bool:
        """Note a refusal or a time-out; return whether fewer calls at a time are an answer to it.

        To a call that went alone they are none: then it is not the speed that is refused.
        """
        slower, alone = False, self._alone

        def note(state: LimitState) -> None:
            nonlocal slower
            slower = state.refused(started, time.time(), wait)
            self._share = state.share(self._member, time.time())

        self._state = self._store.exchange(note)
        self._alone = self._alone or self._state.tripped
        return slower and not alone

    def go_alone(self) -> None:
        """Let the next call go first and alone."""
        self._alone = True

    def leave(self) -> None:
        """Give the share to the other jobs."""

        def leave(state: LimitState) -> None:
            state.members.pop(self._member, None)

        self._store.exchange(leave)

    def _sync(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if not now and moment - self._synced_at < SYNC_SECONDS:
            return
        self._synced_at = moment
        count, self._successes = self._successes, 0

        def tell(state: LimitState) -> None:
            if count:
                state.succeeded(count, self._ceiling)
            self._share = state.share(self._member, time.time())

        self._state = self._store.exchange(tell)
        self._alone = self._alone or self._state.tripped
