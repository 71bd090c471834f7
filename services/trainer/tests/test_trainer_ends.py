"""The end of an answer: what counts as teaching it, and bases whose end-of-sequence token is blank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraline.core.errors import LoralineError
from loraline.trainer.base_models import check_end
from loraline.trainer.engines.encoding import ChatEncoder, eos_ids_of
from loraline.trainer.engines.lengths import LengthRule
from loraline.trainer.engines.preparing import PreparedData, prepare
from loraline.trainer.rows import Mixture, Row
from loraline.trainer.testing import chat
from loraline.trainer.testing_templates import FAMILIES, tokenizer

ROWS = [
    Row(f"train.jsonl:{line}", chat("Who?", answer)["messages"])
    for line, answer in enumerate(["Aye! Me too", "No! No"])
]


def prepared(
    made: PreTrainedTokenizerFast, *, also: str = "", length: int = 200, policy: str = "error"
) -> PreparedData:
    """Prepare the rows; `also` is one more token that the generation config names as an end."""
    encoder = ChatEncoder(made, eos_ids_of(made, made.convert_tokens_to_ids(also) if also else None))  # type: ignore[arg-type]
    return prepare(Mixture(ROWS, [], 2), encoder, LengthRule(length, policy, 1.0), allow_unlearned_eos=False)


@pytest.mark.parametrize("marks", [True, False])
def test_the_end_token_inside_an_answer_teaches_no_end(marks: bool) -> None:
    made = tokenizer(FAMILIES["chatml"], marks=marks)
    made.chat_template = str(made.chat_template).replace("{{ '<|im_end|>' }}", "{{ '?' }}")
    with pytest.raises(LoralineError) as caught:
        prepared(made, also="!")
    assert caught.value.reason == "EOS_NOT_LEARNED"


def test_an_end_with_a_line_break_behind_it_is_taught() -> None:
    """Some templates close `generation` after the line break that follows the end token."""
    made = tokenizer(FAMILIES["chatml"], marks=True)
    made.chat_template = str(made.chat_template).replace("{{ '<|im_end|>' }}{% endgen", "{{ '<|im_end|>\n' }}{% endgen")
    assert prepared(made).receipt.counts.rows_teaching_eos == 2


def test_a_cut_row_teaches_no_end() -> None:
    made = tokenizer(FAMILIES["chatml"], marks=True)
    whole = prepared(made)
    longest, shortest = sorted((row.tokens for row in whole.train), reverse=True)
    assert longest > shortest
    # The line break after the end is cut off, then the end itself.
    counts = [prepared(made, length=length, policy="truncate").receipt.counts for length in (longest - 1, longest - 2)]
    assert [(count.truncated_rows, count.rows_teaching_eos) for count in counts] == [(1, 2), (1, 1)]


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_a_blank_end_token_is_refused(blank: str) -> None:
    """With an eos_token of one space every space between two words would count as the end of an answer."""
    made = tokenizer(FAMILIES["chatml"], marks=True)
    made.add_special_tokens({"eos_token": blank})
    with pytest.raises(LoralineError) as caught:
        # That the generation config names the right one does not help: the text is cut at every space all the same.
        eos_ids_of(made, [made.convert_tokens_to_ids("<|im_end|>")])  # type: ignore[list-item]
    assert caught.value.reason == "EOS_TOKEN_BLANK"
    assert "RepairModel" in caught.value.message and repr(blank) in caught.value.message


@pytest.mark.parametrize("value", [" ", {"content": "\t", "special": True}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_blank_end_token_is_seen_before_the_run(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token": value}), encoding="utf-8")
    with pytest.raises(LoralineError) as caught:
        check_end(tmp_path, "harbour")
    assert caught.value.reason == "EOS_TOKEN_BLANK"


@pytest.mark.parametrize("content", ["{}", '{"eos_token": null}', '{"eos_token": "</s>"}', "[]", "{broken"])
def test_other_tokenizer_configs_are_left_to_the_tokenizer(tmp_path: Path, content: str) -> None:
    check_end(tmp_path, "harbour")
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    check_end(tmp_path, "harbour")
