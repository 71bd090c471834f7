"""What a check says, and how real messages are recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraline.core.config import CoreSettings
from loraline.core.diagnostics import Language, explain, match
from loraline.core.errors import LoralineError

CHECKS_GROUP = "loraline.checks"
"""Entry points under which packages name their own checks, each a :data:`Check`."""
Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What was looked at, such as `disk`."""
    level: Level
    """`failed`: what needs it will not work. `warning`: it may not, or only some of it."""
    said: str
    """What was found, with figures."""
    reason: str = ""
    """Entry of the diagnostics that explains it; empty when all is well."""

    def explained(self, language: Language = "en") -> str:
        """Return what happened and what to do; empty when all is well."""
        return explain(self.reason, language) if self.reason else ""


@dataclass(frozen=True)
class Place:
    """What is to be looked at."""

    settings: CoreSettings
    model: Path | None = None
    """Model folder to look into; None for none."""


Check = Callable[[Place], Iterable[Finding]]


def ok(check: str, said: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, "ok", said)


def of_error(check: str, error: LoralineError) -> Finding:
    """Return the finding that a typed error is."""
    return Finding(check, "failed", error.message, error.reason)


def recognised(message: str, check: str = "message") -> Finding | None:
    """Return the known failure that a real message (an exception, a log's end) is about; None for an unknown one.

    Of a traceback the last known cause counts, since what follows it only says that something failed.
    """
    found = match(message)
    # That the engine died is what every failed start says in the end; what it died of says more.
    told = [entry for entry in found if entry.reason != "ENGINE_DEAD"] or found
    return Finding(check, "failed", message.strip(), told[0].reason) if told else None
