"""How a run that cannot go on ends: paused when there is something to keep, failed when there is not."""

from __future__ import annotations

from loraline.core.errors import LoralineError, failed_precondition, unavailable
from loraline.core.jobs.handlers import JobPaused
from loraline.datagen.llms.hooks import Hooks
from loraline.datagen.llms.intake import Intake
from loraline.datagen.llms.prompting import LlmSettings

PAID_ONCE = (
    "What the model answered is recorded: a new job with the same recipe, seed and name of the source starts from it "
    "and pays for none of it again."
)


class Endings:
    """The words and the kinds of the ends of one run."""

    def __init__(self, settings: LlmSettings, intake: Intake, hooks: Hooks):
        self._settings, self._intake, self._hooks = settings, intake, hooks

    def kept(self) -> str:
        """Say how many rows there are."""
        return f"{self._intake.accepted} of {self._settings.rows} rows are kept."

    def keeping(self, error: LoralineError, others: str = "") -> LoralineError | JobPaused:
        """Return a pause when there are rows to keep and people can mend the endpoint, else the error.

        `others` tells how the run's other endpoints fare.
        """
        if not self._intake.accepted or not error.reason.startswith("ENDPOINT_"):
            return error
        told = f"{others} " if others else ""
        return self._paused(error.reason, f"{error.message} {told}{self.kept()} To go on: {self._hooks.go_on}")

    def used_up(self) -> LoralineError | JobPaused:
        """Return the end of a run that has asked for all the candidates it may."""
        intake = self._intake
        counts = ", ".join(f"{count} {name}" for name, count in sorted(intake.outcomes.items())) or "no items"
        told = (
            f"{intake.name}: {intake.accepted} of {self._settings.rows} rows came out of {intake.candidates} "
            f"candidates, the most that max_candidates_ratio allows ({counts}). Give more topics, personas or styles, "
            "a clearer brief, or a larger max_candidates_ratio."
        )
        if intake.accepted:
            return self._paused(
                "LLM_CANDIDATES_EXHAUSTED", f"{told} {self.kept()} To ask for {self._settings.budget} candidates more: "
                f"{self._hooks.go_on} {PAID_ONCE}",
            )  # fmt: skip
        return failed_precondition(
            "LLM_CANDIDATES_EXHAUSTED", f"{told} {PAID_ONCE}", accepted="0", candidates=str(intake.candidates)
        )  # fmt: skip

    def budget_reached(self, allowed: float) -> JobPaused:
        """Return the pause of a run that has spent what it may, `allowed` US dollars."""
        return self._paused(
            "BUDGET_REACHED", f"The calls cost {self._intake.cost:.4f} US dollars of {allowed:.4f} that max_cost_usd "
            f"allows; one more could go above it. {self.kept()} To spend max_cost_usd once more: {self._hooks.go_on} "
            f"{PAID_ONCE}",
        )  # fmt: skip

    def too_slow(self, names: str) -> LoralineError | JobPaused:
        """Return the end of a run whose endpoints answer not even for single items."""
        return self.keeping(unavailable(
            "ENDPOINT_TIMEOUT",
            f"The endpoint {names} did not answer within {self._settings.timeout_seconds:g} s, not even for single "
            "items. Set a longer request_timeout, or mend the endpoint.", endpoint=names,
        ))  # fmt: skip

    def _paused(self, reason: str, message: str) -> JobPaused:
        self._hooks.count("datagen_pauses", 1, reason=reason, endpoint="", model="")
        return JobPaused(reason, message)
