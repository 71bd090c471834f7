"""What a tokenizer cannot write is refused in answers and told of prompts."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from loraline.core.errors import LoralineError
from loraline.trainer.engines.characters import check_characters, lost_characters
from loraline.trainer.rows import Row
from loraline.trainer.testing import chat
from loraline.trainer.testing_templates import FAMILIES, tokenizer

SCRIPTS = "Aye, 潮声作证 밤바다 🙂👩‍👩‍👧 ﷽ é ÿ ﬁ Ａ ½ ①"


def narrow() -> PreTrainedTokenizerFast:
    """A tokenizer that knows printable ASCII, and nothing to fall back to."""
    letters = ["<unk>", "</s>", *(chr(code) for code in range(33, 127))]
    made = Tokenizer(WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row(f"train.jsonl:{line}", chat(*pair)["messages"]) for line, pair in enumerate(pairs, start=1)]


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_write_every_script(name: str) -> None:
    assert lost_characters(SCRIPTS, tokenizer(FAMILIES[name], marks=False)) == set()


def test_unknown_characters_in_answers_are_refused_by_row_and_in_prompts_told() -> None:
    assert lost_characters("Aye 潮 🙂!", narrow()) == {"潮", "🙂"}
    assert check_characters(rows(("Who?", "Aye 1"), ("Late?", "No.")), narrow()) == ""
    told = check_characters(rows(("Who? 🙂", "Aye"), ("Who?", "Aye")), narrow())
    assert "1 of 2 rows" in told and "🙂" in told
    with pytest.raises(LoralineError) as caught:
        check_characters(rows(("Who?", "Aye"), ("Who? 潮", "밤 Aye")), narrow())
    assert caught.value.reason == "SPECIAL_CHARACTERS_LOST"
    assert caught.value.fields == {"train.jsonl:2": "answers with 밤"}


def test_rejected_answers_are_learned_from_and_looked_at_too() -> None:
    asked, better = chat("Who?", "Aye")["messages"]
    pairs = [
        Row(f"train.jsonl:{line}", [asked, better], [asked, {**better, "content": worse}])
        for line, worse in enumerate(("No", "No 🙂"), start=1)
    ]
    with pytest.raises(LoralineError) as caught:
        check_characters(pairs, narrow())
    assert caught.value.reason == "SPECIAL_CHARACTERS_LOST"
    assert caught.value.fields == {"train.jsonl:2": "answers with 🙂"}
