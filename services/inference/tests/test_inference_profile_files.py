"""Profiles as YAML files: what is wrong in one, and which of two counts. No engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraline.core.errors import LoralineError
from loraline.inference.profiles.registry import Profiles


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("profile", "- a"),
        ("profile", "a: ["),
        ("answer", "name: x\ndescription: d"),
        ("Name", "Name: x\nname: x\ndescription: d\nanswer: {type: object}"),
        ("name", "name: X y\ndescription: d\nanswer: {type: object}"),
        ("answer.type", "name: x\ndescription: d\nanswer: {type: array}"),
        ("answer", "name: x\ndescription: d\nanswer: {type: object, properties: {a: {type: strin}}}"),
        ("language.answer", "name: x\ndescription: d\nanswer: {type: object}\nlanguage: {answer: fr}"),
        ("language.forbid", "name: x\ndescription: d\nanswer: {type: object}\nlanguage: {forbid: [kanji]}"),
        ("stream.field", "name: x\ndescription: d\nanswer: {type: object}\nstream: {field: a, event: b}"),
        ("input", "name: x\ndescription: d\nanswer: {type: object}\ninput: {free_text: false}"),
        ("sampling.max_tokens", "name: x\ndescription: d\nanswer: {type: object}\nsampling: {max_tokens: 0}"),
    ],
)
async def test_wrong_profile_files_name_file_and_field(field: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LoralineError) as caught:
        Profiles.load(tmp_path)
    assert caught.value.reason == "PROFILE_INVALID"
    assert "wrong.yaml" in caught.value.message
    assert list(caught.value.fields) == [field]
    with pytest.raises(LoralineError, match="no folder"):
        Profiles.load(tmp_path / "missing")


async def test_a_profile_of_ones_own_replaces_a_built_in_one(tmp_path: Path) -> None:
    text = "name: extract\ndescription: mine\nanswer: {type: object}"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert Profiles.load(tmp_path).get("extract").description == "mine"
    (tmp_path / "twice.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LoralineError, match=r"mine\.yaml"):
        Profiles.load(tmp_path)
