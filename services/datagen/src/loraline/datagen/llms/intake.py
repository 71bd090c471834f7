"""From recorded answers to accepted rows: salvage, schema, the gate's rules, duplicates, all counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from loraline.datagen.digest_set import DigestSet
from loraline.datagen.llms.ledger import CallRecord
from loraline.datagen.llms.novelty import InstructionPool
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import ItemError
from loraline.datagen.llms.salvage import Item, salvage
from loraline.datagen.llms.schemas import compiled, required_keys
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.quality.rules.language import is_written_in
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.rows import Row, row_digest

SHOWN_UNPARSABLE = 20
REFUSES = re.compile(r"\s*(?:I(?:'m| am) sorry|Sorry,|I can(?:'t|not) |As an AI\b|죄송|抱歉|对不起)", re.IGNORECASE)


class Intake:
    """Takes records in the order of the ledger, live or when it is read again, with the same result both times.

    `accept` gets each row and may answer False: the dataset has it already, and another one is wanted. `unparsable`
    gets each answer that held no item, with the reason. `check` turns down rows for which the gate would refuse the
    dataset; without one it is that of the default gate.
    """

    def __init__(
        self, settings: LlmSettings, name: str, accept: Callable[[Row], Any],
        unparsable: Callable[[CallRecord, str], None] | None = None, check: RowCheck | None = None,
    ):  # fmt: skip
        self._settings, self.name, self._accept = settings, name, accept
        self._unparsable = unparsable or (lambda _record, _why: None)
        self._check = check or RowCheck(CheckSettings(language=settings.language, forbid=settings.forbid))
        self._validator = compiled(settings.recipe.item_schema)
        self._keys = required_keys(settings.recipe.item_schema)
        self._seen = DigestSet()
        self.pool = InstructionPool([prompt for prompt, _ in settings.few_shots])
        self.facts: Mapping[str, Any] = {}
        """What the data card tells of the run's settings."""
        self.outcomes: Counter[str] = Counter()
        self.rungs: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.unparsable: list[dict[str, Any]] = []
        self.accepted = 0
        self.candidates = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cost = 0.0
        self.budget_pauses = 0
        self.candidate_pauses = 0
        self.answers = self.reused = 0
        """Answers taken in, and those of them that another job had paid for."""

    @property
    def complete(self) -> bool:
        """Whether all rows wanted are there."""
        return self.accepted >= self._settings.rows

    @property
    def candidates_left(self) -> int:
        """Candidates that may still be asked for; each pause for them that was resumed granted them once more."""
        return self._settings.budget * (self.candidate_pauses + 1) - self.candidates

    def take(self, record: CallRecord) -> int:
        """Take one record in; return how many items its answer held."""
        if record.outcome == "budget":
            self.budget_pauses += 1
            return 0
        if record.outcome == "candidates":
            self.candidate_pauses += 1
            return 0
        if record.outcome == "timeout":
            self.outcomes["timeout"] += 1
            return 0
        self.candidates += record.size
        self.cost += record.cost
        if record.outcome != "answered":
            self.outcomes[record.outcome] += record.size
            return 0
        self.models[record.model] += 1
        self.answers += 1
        self.reused += bool(record.paid_by)
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        return self._take_answer(record)

    def _take_answer(self, record: CallRecord) -> int:
        found = salvage(record.content, self._keys, cut=record.finish_reason == "length")
        self.rungs[found.rung] += 1
        if not found.items:
            self.outcomes["unparsable_answer"] += 1
            self._unparsable(record, found.why)
            if len(self.unparsable) < SHOWN_UNPARSABLE:
                self.unparsable.append({"call": record.call + 1, "reason": found.why, "text": record.content[:500]})
        for number, item in enumerate(found.items):
            outcome = self._take_item(item, record, number, repaired=number in found.repaired)
            if outcome:
                self.outcomes[outcome] += 1
        return len(found.items)

    def _take_item(self, item: Item, record: CallRecord, number: int, *, repaired: bool) -> str:
        """Accept an item's row, or return why it is left out."""
        if not self._validator.is_valid(item):
            return "rejected_schema"
        recipe, texts = self._settings.recipe, self._settings.texts
        source = f"{self.name}:call-{record.call + 1}.{number + 1}"
        place = record.call % len(texts) if texts else 0
        try:
            messages, written = recipe.row_of(item, texts.text(place) if texts else "")
            for message in messages:
                message["content"].encode("utf-8")
        except (ItemError, UnicodeEncodeError):
            return "rejected_content"
        mended = self._check.mended(messages)
        source = texts.name(place) if texts else source
        row = Row(mended, self._settings.row_kind, f"llm:{record.model}", source, written, repaired=repaired)
        problem = self._problem(row)
        if problem:
            return problem
        return self._accept_new(row, mended=mended != messages)

    def _accept_new(self, row: Row, *, mended: bool) -> str:
        """Accept a row that is fit for training, unless it is there already or too many."""
        digest = row_digest(row.messages)
        if digest in self._seen:
            return "duplicate"
        if self.complete:
            return "surplus"
        self._seen.add(digest)
        if self._accept(row) is False:  # another source of the dataset has it
            return "duplicate"
        self.accepted += 1
        if self._settings.recipe.extends:
            self.pool.add(row.messages[0]["content"])
        if row.repaired:
            self.outcomes["repaired"] += 1
        if mended:
            self.outcomes["mended"] += 1
        return ""

    def _problem(self, row: Row) -> str:
        fault = self._check.fault(row)
        if fault:
            return f"rejected_{fault.lower()}"
        language, recipe, messages = self._settings.language, self._settings.recipe, row.messages
        asked = [] if self._settings.texts else [m["content"] for m in messages if m["role"] == "user"]
        if language and not all(is_written_in(text, language) for text in asked):
            return "rejected_wrong_language"
        if recipe.extends:
            if REFUSES.match(messages[-1]["content"]):
                return "rejected_refusal"
            if self.pool.too_like(messages[0]["content"]):
                return "rejected_similar"
        return ""
