"""Datasets for the tests of the rules: the persona example's rows, and rows put among them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraline.datagen.convert.engine import ConvertCounts, ConvertSettings, convert
from loraline.datagen.convert.files import find_files
from loraline.datagen.quality.checks import DatasetCheck, check_folder
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.rows import row_digest

PERSONA = Path(__file__).parents[3] / "examples" / "persona" / "raw"


def row(prompt: str, answer: str, system: str = "", **fields: Any) -> dict[str, Any]:
    """Return a row of one question and its answer."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


@functools.cache
def _persona() -> tuple[str, ...]:
    settings = ConvertSettings("澜音", ("Mareva",))
    found = convert(find_files(PERSONA), settings, ConvertCounts())
    return tuple({row_digest(made.messages): made.to_line() for made in found}.values())


def persona() -> list[dict[str, Any]]:
    """Return the example's 416 different rows; the first 396 are taken for training."""
    return [json.loads(line) for line in _persona()]


def check(
    folder: Path,
    train: Sequence[Any],
    validation: Sequence[Any] = (),
    settings: CheckSettings | None = None,
) -> DatasetCheck:
    """Write the rows (text is written as it is) and check them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train), ("validation.jsonl", validation)):
        lines = [made if isinstance(made, str) else json.dumps(made, ensure_ascii=False) for made in rows]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return check_folder(folder, settings, folder)


def found(checked: DatasetCheck) -> Mapping[str, list[str]]:
    """Return the rows of every finding but that the dataset is small."""
    return {finding.code: finding.rows for finding in checked.findings if finding.code != "FEW_ROWS"}
