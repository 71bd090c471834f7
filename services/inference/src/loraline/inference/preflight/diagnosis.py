"""What is known of why an engine cannot start: found before, or recognised in its own words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from loraline.core.diagnostics import find
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.preflight import Finding, recognised
from loraline.core.preflight.machine import disk, package_manager
from loraline.inference.config import InferenceSettings
from loraline.inference.engines.port import EngineFacts
from loraline.inference.preflight.engine import check_engine
from loraline.inference.preflight.gpu import too_little_memory
from loraline.inference.readiness import Readiness
from loraline.inference.unused_settings import not_followed

_log = structlog.get_logger(__name__)
_MOST_OF_A_CAUSE = 300
_HOPELESS = frozenset({"GPU_MEMORY_TOO_SMALL"})
"""Found before, these end a start: the engine would take minutes to say the same in fewer words."""


class Diagnoses:
    """The problems of the last start, and of the engine's last end, for GetCapabilities."""

    def __init__(self, settings: InferenceSettings, readiness: Readiness, data_dir: Path):
        self._settings = settings
        self._data_dir = data_dir
        self._readiness = readiness
        self._told_of: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.lost: Finding | None = None
        """Why the engine of this model was last started again; kept when it runs again, so that people learn of it."""

    async def before(self, engine: str, described: str, doubts: Iterable[Finding] = ()) -> None:
        """Look at the machine; `doubts` are what is known of the model.

        FAILED_PRECONDITION MODEL_LOAD_FAILED names what the engine cannot start without.
        """
        self.findings = list(doubts)
        if engine == "vllm":
            found = await asyncio.to_thread(self._look)
            self.findings += [finding for finding in found if finding.level != "ok"]
        for finding in self.findings:
            _log.warning("preflight", check=finding.check, reason=finding.reason, said=finding.said)
        for finding in self.findings:
            if finding.reason in _HOPELESS:
                message = f"{described} cannot be loaded with {engine}: {finding.said}"
                raise failed_precondition("MODEL_LOAD_FAILED", message, engine=engine, cause=finding.reason)

    def _look(self) -> list[Finding]:
        """Look at the engine's needs, and at what vLLM stumbles over later: a full disk, packages half installed."""
        return [*check_engine(self._settings), disk(self._data_dir), package_manager()]

    def settings_in_force(self, facts: EngineFacts) -> None:
        """Say in the log, once for each, which settings that were given the running engine does not follow."""
        for name, why in not_followed(self._settings, facts).items():
            if self._told_of.get(name) != why:
                self._told_of[name] = why
                _log.warning("setting_not_followed", setting=name.upper(), said=f"{name.upper()} {why}.")

    def known(self) -> list[Finding]:
        """Return the findings, and before them the cause of a load that failed otherwise, where it has an entry."""
        cause, why = self._readiness.cause, self._readiness.why_not
        findings = [*filter(None, [self.lost]), *self.findings]
        if not cause or find(cause) is None or any(finding.reason == cause for finding in findings):
            return findings
        return [Finding("model", "failed", why, cause), *findings]

    def died(self, why: str, words: str) -> str:
        """Take note of what ended a running engine; return in one sentence why nothing is answered now.

        `why` is what was seen from here; `words` are the engine's own, empty where it left none.
        """
        known = recognised(words, "engine") if words else None
        reason = known.reason if known is not None else "ENGINE_DEAD"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.lost = Finding("engine", "warning", f"{why} at {when}{f': {words}' if words else '.'}", reason)
        first = words.partition("\n")[0][:_MOST_OF_A_CAUSE].rstrip(" .")
        cure = known.explained().rpartition("→ ")[2] if known is not None else ""
        cause = f" ({first})" if first else ""
        return " ".join(filter(None, (f"{why}{cause} and is being started again.", cure)))

    def failed(self, engine: str, described: str, error: Exception) -> LoralineError:
        """Return FAILED_PRECONDITION MODEL_LOAD_FAILED, with the cause and its cure where the words are known."""
        said = f"{type(error).__name__}: {error}"
        message = f"{described} cannot be loaded with {engine}: {said.rstrip(' .')}."
        known = recognised(said, "engine")
        if known is None:
            message += " The log has the engine's own words above this line."
            return failed_precondition("MODEL_LOAD_FAILED", message, model=described, engine=engine)
        self.findings = [known, *(finding for finding in self.findings if finding.reason != known.reason)]
        advice = too_little_memory(said, self._settings.gpu_memory_utilization)
        cure = known.explained().rpartition("→ ")[2]
        message = " ".join(filter(None, (message, advice, cure)))
        return failed_precondition("MODEL_LOAD_FAILED", message, model=described, engine=engine, cause=known.reason)
