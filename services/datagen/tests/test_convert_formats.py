"""Every file type with every shape that people keep in it, and what each row was taken for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.datagen.convert.engine import ConvertCounts, ConvertSettings, convert
from loraline.datagen.convert.files import find_files
from loraline.datagen.rows import Row

Write = Callable[..., Path]
SETTINGS = ConvertSettings("澜音", ("Mareva",))
MESSAGES = {"messages": [{"role": "user", "content": "Is it late?"}, {"role": "assistant", "content": "Very."}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Is it late?"}, {"from": "gpt", "value": "Very."}]}
ALPACA = {"instruction": "Is it", "input": "late?", "output": "Very."}
COMPLETION = {"prompt": "Is it late?", "completion": "Very."}
SHAPES = {"messages": MESSAGES, "sharegpt": SHAREGPT, "alpaca": ALPACA, "prompt_completion": COMPLETION}
FLAT = {name: SHAPES[name] for name in ("alpaca", "prompt_completion")}


def rows_of(folder: Path, settings: ConvertSettings = SETTINGS) -> tuple[list[Row], ConvertCounts]:
    counts = ConvertCounts()
    return list(convert(find_files(folder), settings, counts)), counts


def as_csv(record: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(record))
    writer.writeheader()
    writer.writerow(record)
    return out.getvalue()


def as_parquet(records: list[dict[str, Any]], path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "wrapped", "one", "parquet", "csv"])
def test_every_shape_in_every_file_type(write: Write, shape: str, kind: str) -> None:
    record = SHAPES[shape]
    if kind == "csv" and shape not in FLAT:
        pytest.skip("a table has no lists in its cells")
    texts = {
        "jsonl": json.dumps(record), "ndjson": json.dumps(record), "json": json.dumps([record]),
        "wrapped": json.dumps({"version": 1, "data": [record]}), "one": json.dumps(record),
        "csv": as_csv(record) if kind == "csv" else "",
    }  # fmt: skip
    ending = {"wrapped": "json", "one": "json"}.get(kind, kind)
    folder = write() if kind == "parquet" else write(**{f"a_DOT_{ending}": texts[kind]})
    if kind == "parquet":
        as_parquet([record], folder / "a.parquet")
    (row,), counts = rows_of(folder)
    assert [message["role"] for message in row.messages] == ["user", "assistant"]
    assert " ".join(row.messages[0]["content"].split()) == "Is it late?"
    assert row.messages[1]["content"] == "Very."
    assert (row.kind, row.rule, row.format) == ("dialogue", "plain_dialogue", "text")
    assert counts.shapes == {shape: 1}
    assert row.source.startswith(f"a.{ending}:")


@pytest.mark.parametrize(
    ("asked", "kind", "rule"),
    [
        ("背景：灯塔", "background", "heading_in_input"),
        ("澜音的灯是谁点的？", "settings_qa", "question_about_character"),
        ("Where does Mareva sleep?", "settings_qa", "question_about_character"),
        ("今天风大吗？", "dialogue", "plain_dialogue"),
        ("Mareva, are you awake?", "dialogue", "plain_dialogue"),
    ],
)
@pytest.mark.parametrize("shape", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_the_rule_that_decided_is_in_the_row_whatever_the_shape(
    write: Write, shape: str, asked: str, kind: str, rule: str
) -> None:
    record = json.loads(json.dumps(SHAPES[shape]).replace("Is it late?", json.dumps(asked)[1:-1]))
    if shape == "alpaca":
        record["instruction"], record["input"] = "", asked
    (row,), _ = rows_of(write(a_DOT_jsonl=json.dumps(record)))
    assert (row.kind, row.rule) == (kind, rule)
    assert json.loads(row.to_line())["rule"] == rule


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bad_record_of_every_shape_is_named_and_can_be_set_aside(write: Write, shape: str) -> None:
    good = SHAPES[shape]
    bad = json.loads(json.dumps(good).replace('"Very."', '""'))
    folder = write(a_DOT_jsonl="\n".join(map(json.dumps, [good, bad, good])))
    with pytest.raises(LoralineError) as caught:
        rows_of(folder)
    assert caught.value.reason == "CONTENT_EMPTY"
    assert caught.value.metadata == {"file": "a.jsonl", "line": "2"}
    assert caught.value.message.startswith("a.jsonl:2: ")
    rows, counts = rows_of(folder, ConvertSettings("澜音", skip_bad_records=True))
    assert [row.source for row in rows] == ["a.jsonl:1", "a.jsonl:3"]
    assert counts.outcomes == {"bad_record": 1}


def test_bad_parquet_names_file_and_row(write: Write) -> None:
    folder = write()
    as_parquet([COMPLETION, {"prompt": "x", "completion": None}], folder / "a.parquet")
    with pytest.raises(LoralineError) as caught:
        rows_of(folder)
    assert (caught.value.reason, caught.value.metadata["line"]) == ("CONTENT_EMPTY", "2")
    path = folder / "a.parquet"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoralineError) as caught:
        rows_of(folder)
    assert (caught.value.reason, caught.value.metadata["file"]) == ("PARQUET_INVALID", "a.parquet")
