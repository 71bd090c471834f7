"""From recorded answers to accepted rows: salvage, schema, duplicates, all counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator

from loraline.datagen.llms.ledger import CallRecord
from loraline.datagen.llms.prompting import LlmSettings
from loraline.datagen.llms.recipes import ItemError
from loraline.datagen.llms.salvage import salvage
from loraline.datagen.rows import Row, row_digest


class Intake:
    """Takes records in the order of the ledger, live or when it is read again, with the same result both times."""

    def __init__(self, settings: LlmSettings, name: str, accept: Callable[[Row], None]):
        self._settings, self._name, self._accept = settings, name, accept
        self._validator = Draft202012Validator(settings.recipe.item_schema)
        self._seen: set[bytes] = set()
        self.outcomes: Counter[str] = Counter()
        self.rungs: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.accepted = 0
        self.candidates = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def complete(self) -> bool:
        """Whether all rows wanted are there."""
        return self.accepted >= self._settings.rows

    def take(self, record: CallRecord) -> int:
        """Take one record in; return how many items its answer held."""
        if record.outcome == "timeout":
            self.outcomes["timeout"] += 1
            return 0
        self.candidates += record.size
        if record.outcome == "set_aside":
            self.outcomes["set_aside"] += record.size
            return 0
        self.models[record.model] += 1
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        found = salvage(record.content)
        self.rungs[found.rung] += 1
        if not found.items:
            self.outcomes["unparsable_answer"] += 1
        for number, item in enumerate(found.items, start=1):
            self._take_item(item, record, number)
        return len(found.items)

    def _take_item(self, item: dict[str, Any], record: CallRecord, number: int) -> None:
        if not self._validator.is_valid(item):
            self.outcomes["rejected_schema"] += 1
            return
        try:
            messages = self._settings.recipe.to_messages(item)
            for message in messages:
                message["content"].encode("utf-8")
        except (ItemError, UnicodeEncodeError):
            self.outcomes["rejected_content"] += 1
            return
        if not all(message["content"].strip() for message in messages):
            self.outcomes["rejected_empty"] += 1
            return
        digest = row_digest(messages)
        if digest in self._seen:
            self.outcomes["duplicate"] += 1
            return
        if self.complete:
            self.outcomes["surplus"] += 1
            return
        self._seen.add(digest)
        self.accepted += 1
        recipe = self._settings.recipe
        source = f"{self._name}:call-{record.call + 1}.{number}"
        self._accept(Row(messages, recipe.name, f"llm:{record.model}", source, recipe.format))
