"""Long files are read piece by piece and give what short ones give."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraline.core.errors import LoralineError
from loraline.datagen.convert import json_list, readers, text
from loraline.datagen.convert.engine import ConvertCounts, ConvertSettings, convert
from loraline.datagen.convert.files import find_files
from loraline.datagen.convert.json_list import JsonListReader

Write = Callable[..., Path]
Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "PIECE", 7)
    monkeypatch.setattr(text, "_PIECE", 5)
    monkeypatch.setattr(readers, "STREAM_BYTES", 0)


@settings(deadline=None, max_examples=300)
@given(st.lists(Values, max_size=8), st.sampled_from([None, 1, "\t"]), st.booleans(), st.integers(1, 40))
def test_a_list_in_pieces_is_the_list(values: list[Any], indent: Any, ascii_only: bool, piece: int) -> None:
    written = "\n " + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + "\n"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_list, "PIECE", piece)
        found = list(JsonListReader(io.StringIO(written)).elements())
    assert [value for _, value in found] == values
    lines = written.split("\n")
    for line, value in found:
        begin = json.dumps(value, indent=indent, ensure_ascii=ascii_only)[0]
        assert begin in lines[line - 1]


@settings(deadline=None, max_examples=300)
@given(st.lists(Values, min_size=1, max_size=4), st.data(), st.integers(1, 20))
def test_a_damaged_list_is_never_taken_for_a_whole_one(values: list[Any], data: st.DataObject, piece: int) -> None:
    written = json.dumps(values)
    at = data.draw(st.integers(0, len(written) - 1))
    damaged = written[:at] + data.draw(st.sampled_from(["", ",", "]", "}", "x", '"'])) + written[at + 1 :]
    try:
        expected = json.loads(damaged)
    except json.JSONDecodeError:
        expected = None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_list, "PIECE", piece)
        reader = JsonListReader(io.StringIO(damaged))
        if isinstance(expected, list):
            assert [value for _, value in reader.elements()] == expected
        else:
            with pytest.raises(json.JSONDecodeError):
                list(reader.elements())


def rows_of(folder: Path) -> list[str]:
    return [row.to_line() for row in convert(find_files(folder), ConvertSettings("澜音", ("Mareva",)), ConvertCounts())]


def test_the_persona_material_is_the_same_in_small_pieces(persona: Path, request: pytest.FixtureRequest) -> None:
    whole = rows_of(persona)
    request.getfixturevalue("small_pieces")
    assert rows_of(persona) == whole


@pytest.mark.usefixtures("small_pieces")
def test_bad_places_in_long_files_are_named(write: Write) -> None:
    good = '{"input": "你好", "output": "好"}'
    for name, content, reason, line in (
        ("a_DOT_json", f"[\n{good},\n{good}\n{good}]", "JSON_INVALID", "4"),
        ("a_DOT_json", f"[\n{good},\n{good}", "JSON_INVALID", "3"),
        ("a_DOT_json", f"[\n{good}]\n\nx", "JSON_INVALID", "4"),
        ("a_DOT_json", "[" * 100_000, "JSON_INVALID", None),
        ("a_DOT_jsonl", f"{good}\n{good}\n".encode() + "你".encode("gb18030"), "FILE_ENCODING", "3"),
        ("a_DOT_txt", "A: 你\n".encode() * 9 + b"\xe4\xbd", "FILE_ENCODING", "10"),
        ("a_DOT_csv", "question,answer\n" + "a,b\n" * 9 + 'c,"d\n', "CSV_INVALID", "11"),
    ):
        folder = write(**{name: content})
        with pytest.raises(LoralineError) as caught:
            rows_of(folder)
        assert (caught.value.reason, caught.value.metadata.get("line")) == (reason, line), content[:60]
        assert caught.value.message.startswith(name.replace("_DOT_", "."))
        next(folder.iterdir()).unlink()


@pytest.mark.parametrize("name", ["a_DOT_jsonl", "a_DOT_json", "a_DOT_csv"])
def test_memory_does_not_grow_with_the_file(write: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "STREAM_BYTES", 100_000)
    monkeypatch.setattr(json_list, "PIECE", 10_000)
    monkeypatch.setattr(text, "_PIECE", 10_000)
    peaks: list[int] = []
    for rows in (2_000, 20_000):
        records = [
            {"prompt": f"How many boats on day {n}?", "completion": "Count them again. " * 4} for n in range(rows)
        ]
        if name == "a_DOT_csv":
            content = "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in records)
        elif name == "a_DOT_json":
            content = json.dumps(records)
        else:
            content = "\n".join(json.dumps(record) for record in records)
        folder = write(**{name: content})
        del records, content
        source = find_files(folder)
        tracemalloc.start()
        assert sum(1 for _ in convert(source, ConvertSettings(), ConvertCounts())) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000
