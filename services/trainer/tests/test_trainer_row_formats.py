"""Rows in other formats, and rows with more than is learned: refused by name with the way to convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.trainer.preference_rows import parse_pair
from loraline.trainer.rows import load_rows
from loraline.trainer.testing import chat, write_rows

CALL = {
    "role": "assistant",
    "content": "Let me look.",
    "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}],
}


def refused(tmp_path: Path, row: dict[str, Any]) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        load_rows(write_rows(tmp_path, [chat("a", "b"), row]) / "train.jsonl")
    assert caught.value.reason == "DATASET_ROWS_INVALID"
    assert list(caught.value.fields) == ["train.jsonl:2"]
    return caught.value


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q", "completion": "A"}, "prompt and completion"),
        ({"instruction": "Q", "input": "", "output": "A"}, "instruction and output"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "conversations"),
        ({"question": "Q", "answer": "A"}, "question and answer"),
    ],
)
def test_other_formats_are_named_with_their_conversion(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    error = refused(tmp_path, row)
    assert f"has {said} in place of messages" in error.fields["train.jsonl:2"]
    assert "ConvertDataset" in error.message and "`convert`" in error.message


@pytest.mark.parametrize("row", [{"messages": []}, {"text": "Q A"}])
def test_rows_in_no_known_format_are_not_sent_to_the_conversion(tmp_path: Path, row: dict[str, Any]) -> None:
    error = refused(tmp_path, row)
    assert error.fields == {"train.jsonl:2": "has no messages"}
    assert "ConvertDataset" not in error.message


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_calls_of_tools_beside_text_are_not_dropped_silently(tmp_path: Path, key: str) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, {**chat("", "A")["messages"][1], key: CALL["tool_calls"]}]}
    assert f"{key}, which would not be learned, in messages[1]" in refused(tmp_path, row).fields["train.jsonl:2"]


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_an_empty_list_of_calls_is_as_good_as_none(tmp_path: Path, nothing: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": nothing}]}
    ]
    assert load_rows(write_rows(tmp_path, rows) / "train.jsonl")[0].messages == chat("Q", "A")["messages"]


def test_calls_of_tools_in_pairs_are_told_too() -> None:
    told = parse_pair({"prompt": "Q", "chosen": [CALL], "rejected": "B"})
    assert told == "has tool_calls, which would not be learned, in chosen[0]"
