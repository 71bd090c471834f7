"""The toy base: its tokenizer covers every character, the same seed gives the same bytes, others can load it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from loraline.core.errors import LoralineError
from loraline.trainer.engines.tiny_tokenizer import END, PAD, save_tokenizer, train_tokenizer
from loraline.trainer.tiny.texts import corpus_dialogues, folder_texts

PERSONA = Path(__file__).parents[3] / "examples" / "persona" / "raw"
HARD = ["小水手，快进来！潮声作证", "By the tide-bell 🙂 👩‍👩‍👧", "한국어 텍스트", "鑫龘 rare", "a\tb  c\n\n d", "é ﬁ"]


def corpus() -> list[str]:
    return [text for pair in corpus_dialogues() for text in pair]


def test_any_text_survives_and_specials_are_one_token() -> None:
    tokenizer = train_tokenizer(corpus(), 1024)
    for text in HARD:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.pad_token == PAD
    assert 1000 < len(tokenizer) <= 1024


def test_characters_of_the_texts_are_whole() -> None:
    texts = [*corpus(), *folder_texts(PERSONA)]
    tokenizer = train_tokenizer(texts, 2048)
    whole = {str(tokenizer.decode([number])) for number in range(len(tokenizer))}
    assert {character for text in texts for character in text} <= whole
    assert len(tokenizer("小水手")["input_ids"]) == 1


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tokenizer(train_tokenizer(corpus(), 700), tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_saved_class_is_one_that_others_know(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = train_tokenizer(corpus(), 700)
    save_tokenizer(made, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == {"eos_token": END, "pad_token": PAD}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD:
        assert loaded(text)["input_ids"] == made(text)["input_ids"]
    assert loaded.chat_template == made.chat_template


def test_texts_are_read_from_every_shape() -> None:
    texts = list(folder_texts(PERSONA))
    joined = "\n".join(texts)
    assert "小水手" in joined
    assert "\ufeff" not in joined
    assert not [text for text in texts if text.startswith('{"')]


def test_a_text_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("潮".encode("gbk"))
    with pytest.raises(LoralineError) as caught:
        list(folder_texts(tmp_path))
    assert caught.value.reason == "TEXT_NOT_UTF8"
    assert "old.txt" in caught.value.message


@pytest.mark.slow
def test_the_toy_base_learns_and_repeats_itself_exactly(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from loraline.trainer.engines.tiny_model import TinyModelSettings, create_tiny_model

    settings = TinyModelSettings(steps=12, vocab_size=700, seed=3)
    losses: list[float] = []
    made = create_tiny_model(tmp_path / "one", settings, report=lambda step, total, loss: losses.append(loss))
    create_tiny_model(tmp_path / "two", settings)
    digests = [
        hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == 704
    assert sum(weights.numel() for weights in model.parameters()) == made.parameters
    generation = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)
