"""Readers, shapes, classification and bad inputs of conversion."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.datagen.convert import readers
from loraline.datagen.convert.engine import ConvertCounts, ConvertSettings, convert
from loraline.datagen.convert.files import find_files
from loraline.datagen.convert.rules import Evidence, classify
from loraline.datagen.rows import Row, row_digest

Write = Callable[..., Path]
MAREVA = ConvertSettings("澜音", ("Mareva",))


def rows_of(folder: Path, settings: ConvertSettings = MAREVA, counts: ConvertCounts | None = None) -> list[Row]:
    return list(convert(find_files(folder), settings, counts or ConvertCounts()))


def pairs(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]


def failure(folder: Path, settings: ConvertSettings = MAREVA) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        rows_of(folder, settings)
    return caught.value


def test_the_persona_material_has_the_counts_of_its_files(persona: Path) -> None:
    """Counted by hand from the files: 112 + 63 + 61 + 56 pairs and 46 conversations with 60 answers; 82 settings."""
    counts = ConvertCounts()
    rows = rows_of(persona, counts=counts)
    dialogue = [row for row in rows if row.kind == "dialogue"]
    answers = [message for row in dialogue for message in row.messages if message["role"] == "assistant"]
    assert (len(dialogue), len(answers)) == (338, 352)
    unique = {row_digest(row.messages): row for row in dialogue}.values()
    assert len(unique) == 334
    assert sum(message["role"] == "assistant" for row in unique for message in row.messages) == 348
    settings = [row for row in rows if row.kind != "dialogue"]
    assert Counter(row.kind for row in settings) == {"settings_qa": 52, "background": 30}
    assert all(row.source.startswith("settings/") for row in settings)
    assert all(row.source.startswith("dialogue/") for row in dialogue)
    assert counts.ignored_files == ["README.md"]
    assert counts.outcomes == {}
    assert all(m["content"] == m["content"].strip() for row in rows for m in row.messages)
    assert not any(m["content"].startswith(("(", "（")) for row in dialogue for m in row.messages)


@pytest.mark.parametrize(
    ("record", "prompt", "answer", "format_"),
    [
        ({"instruction": "Do it.", "input": "this", "output": "done"}, "Do it.\nthis", "done", "text"),
        ({"instruction": "Do it.", "input": "", "output": "done"}, "Do it.", "done", "text"),
        ({"Input": " q ", "Output": " a\r\nb "}, "q", "a\nb", "text"),
        ({"prompt": "q", "completion": "a"}, "q", "a", "text"),
        ({"question": "q", "answer": 7}, "q", "7", "text"),
        ({"key": "daily life", "value": "She bakes."}, "daily life", "She bakes.", "text"),
        ({"title": "Her name", "input": "", "output": "Mareva."}, "Her name", "Mareva.", "text"),
        ({"问题": "你好", "回答": "好"}, "你好", "好", "text"),
        ({"input": "go", "output": {"act": "走", "n": 1}}, "go", '{"act": "走", "n": 1}', "json"),
        ({"input": "go", "output": '{"act": 1}'}, "go", '{"act": 1}', "json"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q", "a", "text"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "Mareva", "value": "a"}]}, "q", "a", "text"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "q", "a", "text",
        ),
    ],
)  # fmt: skip
def test_every_shape(write: Write, record: Any, prompt: str, answer: str, format_: str) -> None:
    for name, text in (("a_DOT_jsonl", json.dumps(record)), ("a_DOT_json", json.dumps([record]))):
        folder = write(**{name: text})
        (row,) = rows_of(folder)
        assert pairs([row]) == [(prompt, answer)]
        assert row.format == format_
        next(folder.iterdir()).unlink()


def test_multi_turn_conversations_stay_whole(write: Write) -> None:
    turns = [("system", "s"), ("human", "1"), ("gpt", "2"), ("human", "3"), ("gpt", "4"), ("gpt", "5"), ("human", "6")]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    counts = ConvertCounts()
    (row,) = rows_of(write(a_DOT_jsonl=json.dumps(record)), counts=counts)
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4\n5"),
    ]  # fmt: skip
    assert counts.notes == {"turns_joined": 1, "unanswered_turn_dropped": 1}


def test_files_as_people_save_them(write: Write) -> None:
    folder = write(
        bom_DOT_csv=b'\xef\xbb\xbfspeaker_line,reply,mood\r\n"Hi, you",Hello.  ,calm\r\n\r\nBye,"So\r\nlong",\r\n',
        two_DOT_csv="Is it far?,Not at all.\nIs it near?,Yes!\n",
        named_DOT_csv="visitor;keeper\nGood day;And you\n",
        tabs_DOT_tsv="question\tanswer\nwhat, then?\tthis\n",
        wide_DOT_json=json.dumps([{"input": "wide", "output": "yes"}]).encode("utf-16"),
        wrapped_DOT_json=json.dumps({"data": [{"input": "w", "output": "x"}], "by": "me"}),
        facts_DOT_json=json.dumps({"tea": "With sugar.", "salt": "A lot."}),
        lines_DOT_jsonl='\ufeff{"input": "l", "output": "u\u2028v"}\r\n\r\n',
    )
    rows = {row.source: pairs([row])[0] for row in rows_of(folder)}
    assert rows == {
        "bom.csv:2": ("Hi, you", "Hello."),
        "bom.csv:4": ("Bye", "So\nlong"),
        "two.csv:1": ("Is it far?", "Not at all."),
        "two.csv:2": ("Is it near?", "Yes!"),
        "named.csv:2": ("Good day", "And you"),
        "tabs.tsv:2": ("what, then?", "this"),
        "wide.json:1": ("wide", "yes"),
        "wrapped.json:1": ("w", "x"),
        "facts.json:1": ("tea", "With sugar."),
        "facts.json:2": ("salt", "A lot."),
        "lines.jsonl:1": ("l", "u\u2028v"),
    }


def test_json_records_are_named_by_the_line_they_begin_on(write: Write) -> None:
    text = '[\n  {"input": "a",\n   "output": "b"},\n\n  {"input": "c", "output": "d"}, {"input": "e", "output": "f"}]'
    assert [row.source for row in rows_of(write(a_DOT_json=text))] == ["a.json:2", "a.json:5", "a.json:5"]


SCRIPT = """（风声。）

旅人：雷来了。
渔夫： 快跑！
澜音（笑）：别怕。
灯还亮着。

(A bell rings.)
Traveller: Are you there?

Mareva: Always.
Traveller: Good night.
"""


def test_scripts(write: Write) -> None:
    folder = write(night_DOT_txt=SCRIPT)
    counts = ConvertCounts()
    rows = rows_of(folder, counts=counts)
    assert [(row.source, *pairs([row])[0]) for row in rows] == [
        ("night.txt:3", "旅人: 雷来了。\n渔夫: 快跑！", "别怕。\n灯还亮着。"),
        ("night.txt:9", "Are you there?", "Always."),
    ]
    assert counts.notes == {"unanswered_turn_dropped": 1}
    assert failure(folder, ConvertSettings()).reason == "CHARACTER_MISSING"
    assert failure(folder, ConvertSettings("Bob")).reason == "CHARACTER_SILENT"
    unanswered = failure(write(night_DOT_txt=SCRIPT + "Mareva: Night.\n\nTraveller: Hello?\n"))
    assert (unanswered.reason, unanswered.metadata["line"]) == ("SCRIPT_UNANSWERED", "15")
    assert failure(write(night_DOT_txt="Once upon a time\n")).reason == "SHAPE_UNKNOWN"


@pytest.mark.parametrize(
    ("asked", "folders", "kind", "rule"),
    [
        ("背景：灯塔", (), "background", "heading_in_input"),
        ("Character: Mareva", (), "background", "heading_in_input"),
        ("澜音的母亲是谁？", (), "settings_qa", "question_about_character"),
        ("What does Mareva fear most?", (), "settings_qa", "question_about_character"),
        ("晚上好，澜音。", (), "dialogue", "plain_dialogue"),
        ("澜音，你会唱歌吗？", (), "dialogue", "plain_dialogue"),
        ("Mareva, is it late?", (), "dialogue", "plain_dialogue"),
        ("潮钟是谁做的？", ("raw", "settings"), "settings_qa", "question_in_settings_folder"),
        ("潮钟是谁做的？", ("raw", "dialogue"), "dialogue", "plain_dialogue"),
        ("灯塔", ("settings",), "background", "topic_in_settings_folder"),
        ("", ("settings",), "background", "no_input_in_settings_folder"),
        ("", ("dialogue",), "dialogue", "no_input"),
        ("What are marevas?", (), "dialogue", "plain_dialogue"),
    ],
)
def test_classification(asked: str, folders: tuple[str, ...], kind: str, rule: str) -> None:
    decided = classify(Evidence(asked, "input_output", "", folders, MAREVA.names))
    assert (decided.kind, decided.name) == (kind, rule)


def test_rows_without_a_question(write: Write) -> None:
    folder = write(
        dialogue__a_DOT_jsonl='{"input": "", "output": "小水手"}\n{"output": "x"}\n{"input":"q","output":"y"}'
    )
    counts = ConvertCounts()
    assert pairs(rows_of(folder, counts=counts)) == [("q", "y")]
    assert counts.outcomes == {"no_prompt": 2}
    settings = ConvertSettings("澜音", default_prompt="Speak, {character}.", system_prompt="Be {character}.")
    rows = rows_of(folder, settings)
    assert pairs(rows) == [("Speak, 澜音.", "小水手"), ("Speak, 澜音.", "x"), ("q", "y")]
    assert rows[0].messages[0] == {"role": "system", "content": "Be 澜音."}


@pytest.mark.parametrize(
    ("name", "content", "reason", "line"),
    [
        ("a_DOT_json", '[{"input": 1},\n{]', "JSON_INVALID", "2"),
        ("a_DOT_json", "[" * 100_000, "JSON_INVALID", None),
        ("a_DOT_json", '"text"', "SHAPE_UNKNOWN", "1"),
        ("a_DOT_json", '[{"input": "a", "output": "b"},\n{"colour": "blue"}]', "SHAPE_UNKNOWN", "2"),
        ("a_DOT_jsonl", '{"input": "a", "output": "b"}\n\n[1]\n', "SHAPE_UNKNOWN", "3"),
        ("a_DOT_jsonl", '{"input": "a", "output": " "}', "CONTENT_EMPTY", "1"),
        ("a_DOT_jsonl", '{"input": ["a"], "output": "b"}', "CONTENT_NOT_TEXT", "1"),
        ("a_DOT_jsonl", '{"input": "a", "output": "\\ud800"}', "TEXT_BROKEN", "1"),
        ("a_DOT_jsonl", '{"messages": [{"role": "user", "content": "q"}]}', "ROW_WITHOUT_ASSISTANT", "1"),
        ("a_DOT_jsonl", '{"messages": [{"role": "tool", "content": "q"}]}', "ROLE_UNKNOWN", "1"),
        ("a_DOT_jsonl", '{"messages": []}', "TURNS_INVALID", "1"),
        ("a_DOT_csv", "question,answer\na,b\nc,d,e\n", "CSV_COLUMNS", "3"),
        ("a_DOT_csv", 'question,answer\na,"b\n', "CSV_INVALID", "2"),
        ("a_DOT_jsonl", b'{"input": "a"}\n' + "你".encode("gb18030"), "FILE_ENCODING", "2"),
        ("a_DOT_parquet", "PAR0", "PARQUET_INVALID", None),
    ],
)
def test_bad_files_name_file_line_and_remedy(
    write: Write, name: str, content: str | bytes, reason: str, line: str | None
) -> None:
    error = failure(write(**{name: content}))
    assert (error.reason, error.metadata.get("line")) == (reason, line)
    assert error.message.startswith(name.replace("_DOT_", "."))
    assert "skip_bad_records" in error.message
    counts = ConvertCounts()
    skipping = ConvertSettings("澜音", skip_bad_records=True)
    rows_of(write(**{name: content}), skipping, counts)
    assert counts.outcomes["bad_record"] >= 1
    assert counts.bad_records[0].startswith(name.replace("_DOT_", "."))


def test_places_that_cannot_be_converted(write: Write, tmp_path: Path) -> None:
    empty = write()
    assert failure(empty).reason == "NO_SOURCE_FILES"
    (empty / "notes.docx").write_text("x")
    assert "notes.docx" in failure(empty).message
    for subpath, reason in (
        ("nothing", "SOURCE_NOT_FOUND"),
        ("../x", "SUBPATH_INVALID"),
        ("notes.docx", "FILE_TYPE_UNKNOWN"),
    ):
        with pytest.raises(LoralineError) as caught:
            find_files(empty, subpath)
        assert caught.value.reason == reason
    outside = tmp_path / "outside.jsonl"
    outside.write_text('{"input": "a", "output": "b"}')
    (empty / "a.jsonl").symlink_to(outside)
    assert failure(empty).reason == "PATH_NOT_ALLOWED"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_read_permission(write: Write) -> None:
    folder = write(a_DOT_jsonl='{"input": "a", "output": "b"}')
    (folder / "a.jsonl").chmod(0)
    assert failure(folder).reason == "FILE_UNREADABLE"


def test_a_file_that_cannot_be_read_names_itself(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(a_DOT_jsonl='{"input": "a", "output": "b"}')

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    error = failure(folder)
    assert (error.reason, error.metadata["file"]) == ("FILE_UNREADABLE", "a.jsonl")


def test_parquet(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write()
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "pyarrow", None)
        (folder / "a.parquet").write_bytes(b"PAR1")
        error = failure(folder)
        assert error.reason == "PARQUET_NEEDS_PYARROW"
        assert "loraline-datagen[parquet]" in error.message
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": ["1", "2"]}), folder / "a.parquet")
    assert [row.source for row in rows_of(folder)] == ["a.parquet:1", "a.parquet:2"]
    assert ".parquet" in readers.READERS
