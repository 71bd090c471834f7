"""Rows and base models that no run can start from, each with its own error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from loraline.core.errors import LoralineError
from loraline.trainer.engines import training
from loraline.trainer.engines.encoding import ChatEncoder, eos_ids_of
from loraline.trainer.engines.lengths import LengthRule
from loraline.trainer.engines.loading import Precision, load_model, load_tokenizer
from loraline.trainer.engines.preparing import prepare
from loraline.trainer.outcome import count_parameters
from loraline.trainer.rows import Mixture, Row
from loraline.trainer.testing import chat
from loraline.trainer.testing_runs import Watcher, inputs, spec

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOUD = CHATML.replace("{{ m.content }}", "{{ m.content | upper if 'shout' in messages[0].content else m.content }}")
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins here') }}{% endif %}" + CHATML


def encoder(base: Path, template: str) -> ChatEncoder:
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, eos_ids_of(tokenizer, None))


def refused(rows: list[Row], made: ChatEncoder) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        prepare(Mixture(rows, [], len(rows)), made, LengthRule(128), allow_unlearned_eos=False)
    return caught.value


def copy_of(base: Path, target: Path) -> Path:
    shutil.copytree(base, target)
    return target


GOOD = Row("train.jsonl:1", chat("Who goes there?", "Aye")["messages"])


def test_a_row_whose_mask_cannot_be_proven_is_named_and_the_good_one_is_not(small_base: Path) -> None:
    """The template writes answers otherwise once a question says shout."""
    bad = Row("train.jsonl:2", chat("Please shout", "Aye")["messages"])
    error = refused([GOOD, bad], encoder(small_base, LOUD))
    assert (error.reason, list(error.fields)) == ("MASK_NOT_PROVEN", ["train.jsonl:2"])
    assert "messages[1]" in error.fields["train.jsonl:2"]
    assert "prefix_difference" in error.message


def test_a_row_that_the_template_refuses_is_named_with_the_templates_own_words(small_base: Path) -> None:
    made = encoder(small_base, STRICT)
    system = [{"role": "system", "content": "Be kind."}, *GOOD.messages]
    with pytest.raises(LoralineError) as caught:
        made.render(system)
    assert caught.value.reason == "CHAT_TEMPLATE_REFUSED"
    assert "a user begins here" in caught.value.message
    error = refused([GOOD, Row("train.jsonl:2", system)], made)
    assert list(error.fields) == ["train.jsonl:2"]
    assert "a user begins here" in error.fields["train.jsonl:2"]


def test_a_base_without_an_end_of_sequence_token_is_refused(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    tokenizer.eos_token = None  # type: ignore[assignment]
    with pytest.raises(LoralineError) as caught:
        eos_ids_of(tokenizer, None)
    assert (caught.value.reason, list(caught.value.fields)) == ("EOS_MISSING", ["base_model"])
    # One that the model's generation_config.json names is as good.
    assert eos_ids_of(tokenizer, [end]) == {end}


def test_a_tokenizer_of_another_model_is_refused_before_the_weights_are_loaded(
    small_base: Path, harbour: Path, tmp_path: Path
) -> None:
    base = copy_of(small_base, tmp_path / "mixed")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens([f"<harbour-{number}>" for number in range(448)])
    tokenizer.save_pretrained(base)
    (base / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(LoralineError) as caught:
        training.run(inputs(base, harbour), spec(max_steps=1), tmp_path / "work", Watcher())
    assert caught.value.reason == "VOCABULARY_MISMATCH"
    assert str(len(tokenizer)) in caught.value.message and "448" in caught.value.message


@pytest.mark.parametrize("how", ["cut short", "flipped header"])
def test_weights_that_are_torn_are_refused(small_base: Path, tmp_path: Path, how: str) -> None:
    base = copy_of(small_base, tmp_path / "torn")
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] if how == "cut short" else b"\xff" * 8 + content[8:])
    with pytest.raises(LoralineError) as caught:
        count_parameters(base)
    assert caught.value.reason == "MODEL_UNREADABLE"
    assert weights.name in caught.value.message and list(caught.value.metadata) == ["file"]


@pytest.mark.parametrize("left", [5, 2000], ids=["header", "weights"])
def test_torn_weights_are_refused_when_they_are_loaded(small_base: Path, tmp_path: Path, left: int) -> None:
    base = copy_of(small_base, tmp_path / "torn")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(LoralineError) as caught:
        load_model(base, Precision("fp32", "none", ""))
    assert caught.value.reason == "MODEL_UNREADABLE"


def test_weights_of_another_shape_are_refused(small_base: Path, tmp_path: Path) -> None:
    """Otherwise transformers would go on with random weights in their place."""
    from safetensors.torch import load_file

    base = copy_of(small_base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:10].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoralineError) as caught:
        load_model(base, Precision("fp32", "none", ""))
    assert caught.value.reason == "MODEL_UNREADABLE"
