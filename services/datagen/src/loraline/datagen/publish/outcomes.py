"""What becomes of the rows of a job, told to the service's metrics once however often the job is attempted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

METRIC = "datagen_rows"

ACCEPTED = "accepted"
TOLD_BESIDES = ("repaired", "mended", "surplus")
"""Told besides: of rows that are accepted as well, and of good rows that nobody asked for. No part of the rate."""
REFUSED = (
    "duplicate", "unparsable_answer", "timeout", "set_aside", "filtered", "refused", "bad_record", "no_prompt",
)  # fmt: skip
"""Rows and answers that came to nothing; so did those of the gate's rules, `rejected_<rule in lower case>`."""


class OutcomeCounter:
    """Counts rows of one part of a job by outcome. What was told lies at `path`, which outlives an attempt.

    A part is made anew by each attempt with the same rows, so only what goes beyond the last attempt is told.
    """

    def __init__(self, count: Callable[..., None], path: Path):
        self._count, self._path = count, path
        self._told: Counter[str] = Counter()
        if path.is_file():
            self._told.update(json.loads(path.read_text(encoding="utf-8")))

    def tell(self, outcomes: Mapping[str, int]) -> None:
        """Tell the counts so far."""
        more = {name: count - self._told[name] for name, count in outcomes.items() if count > self._told[name]}
        if not more:
            return
        self._told.update(more)
        unfinished = self._path.with_suffix(".new")
        unfinished.write_text(json.dumps(dict(self._told)), encoding="utf-8")
        unfinished.replace(self._path)
        for name, count in more.items():
            self._count(METRIC, count, outcome=name)
