"""The failures that cost days: each shown to happen in transformers with the folder as it is, and gone after repair.

A loader that is handed no path, answers that never end, token ids beyond the embedding. test_vllm_loads.py shows the
same folders to vLLM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

from loraline.core.errors import LoralineError
from loraline.core.model_files.pieces import piece_ids
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.merger.check.findings import loadable
from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders
from loraline.merger.model_jobs import check_everything, check_rendering
from loraline.merger.repair import repair_folder

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
NO_PATH = "expected str, bytes or os.PathLike object, not NoneType"
TEXTS = ("where is the boat? 14", "the keeper", "비가 와요")
MOST = 12


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def codes(folder: Path) -> list[str]:
    return [finding.code for finding in check_everything(folder, None)]


# How tokenizer_config.json leads loaders past tokenizer.model -> what becomes of it in the installed transformers.
LED_PAST: dict[str, tuple[dict[str, Any], str]] = {
    "a class with other files": ({"tokenizer_class": "MarianTokenizer"}, "no path"),
    "a class for another kind": ({"tokenizer_class": "Qwen2Tokenizer"}, "other ids"),
    "a class for any kind": ({"tokenizer_class": "PreTrainedTokenizerFast"}, "other ids"),
    "no class": ({}, "other ids"),
    # transformers 4 fails with the same TypeError here (4.53.2; docs/merger-defects.md), 5 looks for the file anyway.
    "null for a path": ({"tokenizer_class": "LlamaTokenizer", "vocab_file": None}, ""),
    "null and no class": ({"vocab_file": None, "tokenizer_file": None}, "other ids"),
}


@pytest.fixture
def llama2(tmp_path, shared_llama2) -> Callable[..., Path]:
    """Return a function that gives a folder whose one vocabulary is tokenizer.model."""

    def get(**config: Any) -> Path:
        folder = shutil.copytree(shared_llama2, tmp_path / f"llama2-{len(list(tmp_path.iterdir()))}")
        said = json.loads((folder / TOKENIZER).read_text())
        del said["tokenizer_class"]
        (folder / TOKENIZER).write_text(json.dumps({**said, **config}))
        return folder

    return get


@pytest.mark.parametrize("how", LED_PAST)
def test_a_tokenizer_model_that_loaders_are_led_past(llama2, sentencepiece_model, how):
    config, harm = LED_PAST[how]
    folder = llama2(**config)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    expected = [processor.encode(text) for text in TEXTS]
    if harm == "no path":
        with pytest.raises(TypeError, match=NO_PATH):
            transformers.AutoTokenizer.from_pretrained(folder)
    else:
        assert (ids(folder) == expected) == (not harm)
    assert "TOKENIZER_MODEL_UNNAMED" in codes(folder)
    assert repair_folder(folder)
    assert ids(folder) == expected
    assert codes(folder) == []
    said = json.loads((folder / TOKENIZER).read_text())
    assert said["tokenizer_class"] == "LlamaTokenizer"
    assert "vocab_file" not in said  # transformers 4 would look for it where the server was started


def ids(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


def test_a_class_that_config_does_not_tell_is_taken_from_the_base(llama2):
    base, folder = llama2(tokenizer_class="LlamaTokenizer"), llama2(tokenizer_class="MarianTokenizer")
    edit(folder / CONFIG, model_type="olmo2", architectures=["Olmo2ForCausalLM"])
    assert not repair_folder(folder)
    assert "TOKENIZER_MODEL_UNNAMED" in {finding.code for finding in repair_folder(folder, base)}
    assert json.loads((folder / TOKENIZER).read_text())["tokenizer_class"] == "LlamaTokenizer"


def test_a_sound_tokenizer_model_needs_no_name_and_is_checked_like_any_other(llama2, sentencepiece_model):
    folder = llama2(tokenizer_class="LlamaTokenizer")
    assert codes(folder) == []
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    pieces = {processor.id_to_piece(number): number for number in range(processor.vocab_size())}
    assert piece_ids(sentencepiece_model) == pieces == read_tokenizer(folder).ids
    edit(folder / TOKENIZER, eos_token="<end>")
    edit(folder / GENERATION, eos_token_id=7)
    assert "SPECIAL_TOKEN_NOT_SINGLE" in codes(folder)
    edit(folder / TOKENIZER, eos_token="</s>")
    assert codes(folder) == ["EOS_IDS_DISAGREE"]


@pytest.mark.parametrize("content", [b"", b"a sentencepiece model", b"\xff" * 64, b"IQ== 0\n", b"\x0a\x7fshort"])
def test_other_files_under_the_name_have_no_pieces(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert piece_ids(tmp_path / "tokenizer.model") == {}


def test_a_class_that_splits_otherwise_is_told_where_nothing_else_shows_it(llama2):
    """A class that we do not know of: the ids themselves tell."""
    folder = llama2(tokenizer_class="NllbTokenizer")
    found = [finding.code for finding in check_rendering(folder)]
    assert found in (["TOKENIZER_REPLACED"], ["TOKENIZER_NOT_LOADABLE"]), found


def test_a_merge_repairs_the_copy(tmp_path, llama2, make_adapter):
    base = llama2(tokenizer_class="MarianTokenizer")
    adapter = make_adapter(base, evidence=False)
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    assert [repair.code for repair in outcome.repairs] == ["TOKENIZER_MODEL_UNNAMED"]
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == 2
    with pytest.raises(TypeError, match=NO_PATH):
        transformers.AutoTokenizer.from_pretrained(base)


# name -> the harm by file, and who says where to stop: the files of the model, or the caller with the tokenizer's id.
ENDLESS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "blank eos": ({TOKENIZER: {"eos_token": " "}}, "tokenizer"),
    "empty eos": ({TOKENIZER: {"eos_token": ""}}, "tokenizer"),
    "blank eos, and no id": ({TOKENIZER: {"eos_token": " "}, GENERATION: {"eos_token_id": None}}, "files"),
    "an id of another token": ({GENERATION: {"eos_token_id": 0}}, "files"),
    "ids of other tokens": ({GENERATION: {"eos_token_id": [0, 7]}, CONFIG: {"eos_token_id": 7}}, "files"),
    "no id": ({GENERATION: {"eos_token_id": None}, CONFIG: {"eos_token_id": None}}, "files"),
}


@pytest.mark.parametrize("how", ENDLESS)
def test_answers_that_never_end_end_after_repair(tmp_path, shared_base, end_answers, how):
    harms, who = ENDLESS[how]
    folder = shutil.copytree(shared_base("llama"), tmp_path / "model")
    end_answers(folder)
    right = answer(folder, who)
    for file, values in harms.items():
        edit(folder / file, **values)
    before = answer(folder, who)
    assert len(before) == MOST
    assert before[:4] == [*right, *right]  # it said the end token again and again, and nobody stopped
    assert repair_folder(folder)
    assert answer(folder, who) == right == [70, 2]
    assert codes(folder) == []


def answer(folder: Path, who: str) -> list[int]:
    """Return the ids that greedy generation gives, at most MOST."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([tokenizer.encode("Where is the boat?")])
    stop = {"eos_token_id": tokenizer.eos_token_id} if who == "tokenizer" else {}
    said = model.generate(prompt, max_new_tokens=MOST, do_sample=False, pad_token_id=0, **stop)
    return said[0, prompt.shape[1] :].tolist()


def grown_tokenizer(folder: Path) -> None:
    """Add tokens until one that the question has is beyond the rows of the embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*(f"<|extra {number}|>" for number in range(len(tokenizer), 320)), "boat"])
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))


def logits(folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the boat?"}], tokenize=True, return_dict=False
    )
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits


def test_ids_beyond_the_embedding(tmp_path, shared_base, make_adapter):
    """On a GPU the look-up is a device-side assert, on a CPU an IndexError."""
    base = shared_base("llama")
    folder = shutil.copytree(base, tmp_path / "model")
    grown_tokenizer(folder)
    with pytest.raises(IndexError, match="index out of range in self"):
        logits(folder)
    found = check_everything(folder, base)
    assert "TOKEN_ID_OUT_OF_RANGE" in {finding.code for finding in found}
    assert not loadable(found)
    adapter = make_adapter(folder, evidence=False)
    with pytest.raises(LoralineError) as refused:
        merge_folders(folder, [AdapterInput(adapter)], tmp_path / "work" / "merged", MergeOptions())
    assert refused.value.reason == "MODEL_DEFECTIVE"
    assert refused.value.metadata["codes"] == "TOKEN_ID_OUT_OF_RANGE"
    assert "TOKEN_ID_OUT_OF_RANGE" in {finding.code for finding in repair_folder(folder, base)}
    assert loadable(check_everything(folder, base))
    assert torch.equal(logits(folder), logits(base))
