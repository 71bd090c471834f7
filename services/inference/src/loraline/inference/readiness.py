"""Whether requests are answered, and if not, why: still loading, failed for good, or nothing to load."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Literal

from loraline.core.errors import LoralineError, failed_precondition, unavailable

NOTHING_LOADED = "No model is loaded. Load one with LoadModel, or set LORALINE_INFERENCE_MODEL, such as model/tiny."
_LOAD_ANOTHER = "Mend the cause, then load it again, or another: `loraline models load model/NAME`."
State = Literal["empty", "loading", "ready", "failed"]


def cause_of(error: BaseException) -> str:
    """Return the reason to tell of a load that failed: of what it failed at, where that is known."""
    return error.metadata.get("cause", error.reason) if isinstance(error, LoralineError) else ""


class Readiness:
    """What the host is doing; every change is made in the event loop."""

    def __init__(self) -> None:
        self.state: State = "loading"
        self._why = "The service is starting."
        self.cause = ""
        """Reason of what a load failed at; empty otherwise."""
        self._since = time.monotonic()

    @property
    def why_not(self) -> str:
        """Empty when requests are answered; otherwise why not and what to do."""
        return "" if self.state == "ready" else self._why

    def ready(self) -> None:
        """Requests are answered from now on."""
        self._set("ready", "")

    def empty(self) -> None:
        """Nothing is loaded and nothing is about to be."""
        self._set("empty", NOTHING_LOADED)

    def loading(self, why: str) -> None:
        """Something is under way that ends by itself."""
        self._set("loading", why)

    def failed(self, why: str, cause: str = "") -> None:
        """Nothing will change until a person acts; `cause` is the reason of the error that it failed with."""
        self._set("failed", why)
        self.cause = cause

    def refusal(self) -> LoralineError:
        """Return what requests get now: UNAVAILABLE while waiting helps, FAILED_PRECONDITION when it does not."""
        if self.state == "empty":
            return failed_precondition("NO_MODEL_LOADED", NOTHING_LOADED)
        if self.state == "failed":
            return failed_precondition("MODEL_LOAD_FAILED", f"{self._why} {_LOAD_ANOTHER}", cause=self.cause)
        seconds = time.monotonic() - self._since
        error = unavailable("MODEL_NOT_READY", f"{self._why} That began {seconds:.0f} s ago.")
        error.retry_after = timedelta(seconds=2)
        return error

    def _set(self, state: State, why: str) -> None:
        if state != self.state:  # the phases of one load are one wait
            self._since = time.monotonic()
        self.state, self._why, self.cause = state, why, ""
