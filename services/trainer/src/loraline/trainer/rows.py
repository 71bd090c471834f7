"""Dataset rows: reading them, mixing datasets by weight, splitting off validation. Pure; no tokenizer here."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.trainer.preference_rows import calls_of, is_pair, parse_pair

ROLES = ("system", "user", "assistant", "tool")
_OTHER_FORMATS = (
    ("conversations",),
    ("conversation",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
"""Keys of rows that datagen converts: ShareGPT, Alpaca, and pairs of question and answer under other names."""
_INSTEAD = "in place of messages"
_NAMED_ROWS = 10


@dataclass(frozen=True)
class Row:
    """One conversation."""

    source: str
    """Where it stands, such as `train.jsonl:17`."""
    messages: list[dict[str, str]]
    """Messages with role and content; at least one of the assistant."""
    rejected: list[dict[str, str]] | None = None
    """The same with the worse answer at the end, where `messages` ends with the better one; None without pairs."""


@dataclass(frozen=True)
class LoadedDataset:
    """One dataset of a run."""

    train: list[Row]
    """Rows of train.jsonl."""
    validation: list[Row]
    """Rows of validation.jsonl; empty when it brings none."""
    weight: float
    """How often a row is shown in an epoch."""


@dataclass(frozen=True)
class Mixture:
    """What an epoch consists of."""

    train: list[Row]
    """Training rows in order, with repetitions."""
    validation: list[Row]
    """Validation rows; none of them is trained on."""
    unique_rows: int
    """Training rows without repetitions."""


def load_dataset(folder: Path, *, weight: float, label: str = "", pairs: bool = False) -> LoadedDataset:
    """Read a dataset artifact; `label` is put before the file name in each row's source, `pairs` are for DPO.

    Raises NOT_FOUND-like FAILED_PRECONDITION (DATASET_FILE_MISSING, DATASET_EMPTY) or INVALID_ARGUMENT
    (DATASET_ROWS_INVALID) that names the rows.
    """
    file = folder / "train.jsonl"
    if not file.is_file():
        message = f"{label}train.jsonl is missing: this is no dataset ready for training. Generate one from it first."
        raise failed_precondition("DATASET_FILE_MISSING", message)
    train = load_rows(file, label, pairs=pairs)
    if not train:
        message = f"{label}train.jsonl has no rows. Generate the dataset again, or leave it out."
        raise failed_precondition("DATASET_EMPTY", message)
    validation_file = folder / "validation.jsonl"
    validation = load_rows(validation_file, label, pairs=pairs) if validation_file.is_file() else []
    return LoadedDataset(train, validation, weight or 1.0)


def load_rows(file: Path, label: str = "", *, pairs: bool = False) -> list[Row]:
    """Read every row of a JSON Lines file; all bad rows are named in one error."""
    rows: list[Row] = []
    problems: dict[str, str] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            source = f"{label}{file.name}:{number}"
            parsed = _parse(line, pairs=pairs)
            if isinstance(parsed, str):
                problems[source] = parsed
            else:
                rows.append(Row(source, *parsed))
    if problems:
        what = "cannot be trained on"
        if any(problem.endswith(_INSTEAD) for problem in problems.values()):
            what += " before datagen has made messages of them (ConvertDataset, or `convert` in a pipeline file)"
        raise rows_error("DATASET_ROWS_INVALID", what, problems)
    return rows


def rows_error(reason: str, what: str, problems: dict[str, str]) -> LoralineError:
    """Return INVALID_ARGUMENT that names the first rows and counts all of them."""
    shown = dict(list(problems.items())[:_NAMED_ROWS])
    listed = "; ".join(f"{source} {problem}" for source, problem in shown.items())
    rest = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    rows = "1 row" if len(problems) == 1 else f"{len(problems)} rows"
    error = invalid_argument(reason, f"{rows} {what}: {listed}{rest}.")
    error.fields = shown
    error.metadata = {"rows": str(len(problems))}
    return error


def _parse(line: bytes, *, pairs: bool) -> tuple[list[dict[str, str]], list[dict[str, str]] | None] | str:
    """Return the messages, and those with the rejected answer of a pair; or what is wrong with the row."""
    try:
        content: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if pairs:
        return parse_pair(content)
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        return "is a preference pair, which OBJECTIVE_DPO learns from" if is_pair(content) else _instead(content)
    for position, message in enumerate(messages):
        problem = _problem(message)
        if problem:
            return f"has {problem} in messages[{position}]"
    if all(message["role"] != "assistant" for message in messages):
        return "has no assistant turn"
    return [{"role": message["role"], "content": message["content"]} for message in messages], None


def _instead(content: Any) -> str:
    """Return what a row has in place of messages."""
    keys = content.keys() if isinstance(content, dict) else ()
    found = next((names for names in _OTHER_FORMATS if all(name in keys for name in names)), None)
    return f"has {' and '.join(found)} {_INSTEAD}" if found else "has no messages"


def _problem(message: Any) -> str:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return "no known role"
    if not isinstance(message.get("content"), str):
        return "no text as content"
    if calls := calls_of(message):
        return f"{calls}, which would not be learned,"
    return "an empty answer" if message["role"] == "assistant" and not message["content"].strip() else ""


def mix(datasets: Sequence[LoadedDataset], *, validation_fraction: float, seed: int) -> Mixture:
    """Merge the datasets by weight and shuffle; the same seed gives the same order.

    The datasets' own validation rows are used when there are any; else `validation_fraction` of the rows are set apart
    before repetition, so that no validation row is trained on. Equal conversations fall on the same side.
    """
    _check_sources(datasets)
    generator = random.Random(f"mix:{seed}")  # noqa: S311  (a shuffle, no secret)
    validation = [row for dataset in datasets for row in dataset.validation]
    train_parts = [list(dataset.train) for dataset in datasets]
    if not validation and validation_fraction > 0:
        held_out = _draw_held_out([row for part in train_parts for row in part], validation_fraction, generator)
        validation = [row for part in train_parts for row in part if _key(row) in held_out]
        train_parts = [[row for row in part if _key(row) not in held_out] for part in train_parts]
    mixed: list[Row] = []
    for rows, dataset in zip(train_parts, datasets, strict=True):
        mixed.extend(_repeat(rows, dataset.weight, generator))
    if not mixed:
        message = "No row is left to train on. Give more rows, a greater weight or a smaller validation_fraction."
        raise failed_precondition("DATASET_EMPTY", message)
    generator.shuffle(mixed)
    return Mixture(mixed, validation, len({row.source for row in mixed}))


def _check_sources(datasets: Sequence[LoadedDataset]) -> None:
    """Rows are known by their source from here on: two that share one would silently take each other's place."""
    seen: dict[str, tuple[object, object]] = {}
    for row in (row for dataset in datasets for row in (*dataset.train, *dataset.validation)):
        content = (row.messages, row.rejected)
        if seen.setdefault(row.source, content) != content:
            raise ValueError(f"two datasets have a row called {row.source}; load each with a label of its own")


def _key(row: Row) -> str:
    return json.dumps([row.messages, row.rejected], ensure_ascii=False, sort_keys=True)


def _draw_held_out(rows: Iterable[Row], fraction: float, generator: random.Random) -> set[str]:
    keys = sorted({_key(row) for row in rows})
    count = min(len(keys) - 1, max(1, round(fraction * len(keys))))
    return set(generator.sample(keys, max(0, count)))


def _repeat(rows: list[Row], weight: float, generator: random.Random) -> list[Row]:
    whole = math.floor(weight)
    drawn = generator.sample(rows, round((weight - whole) * len(rows)))
    return rows * whole + drawn
