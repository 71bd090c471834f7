"""A model folder's config and tokenizer against the rows of its embedding, read from the files alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from loraline.core.preflight import Finding
from loraline.core.preflight.model_folder import check_model_folder, vocabulary_findings

ROWS = 8


def write_folder(folder: Path, embedding: str = "model.embed_tokens.weight", **files: Any) -> Path:
    """Write a whole model folder with one tensor, of 8 rows; `files` are merged into its JSON files."""
    tensor = {"dtype": "F32", "shape": [ROWS, 2], "data_offsets": [0, ROWS * 8]}
    header = json.dumps({embedding: tensor}).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(ROWS * 8))
    vocabulary = {f"t{number}": number for number in range(ROWS)}
    contents: dict[str, dict[str, Any]] = {
        "config": {"architectures": ["LlamaForCausalLM"], "vocab_size": ROWS},
        "tokenizer": {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []},
        "tokenizer_config": {"eos_token": "t7"},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps({**content, **files.get(name, {})}))
    return folder


def added(token_id: int) -> dict[str, Any]:
    return {"added_tokens": [{"id": token_id, "content": "<pad>"}]}


def unigram(size: int) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "vocab": [[f"p{number}", 0.0] for number in range(size)]}}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, []),
        ({"config": {"vocab_size": 9}}, [("failed", "VOCAB_SIZE_MISMATCH", "vocab_size 9; the embedding has 8 rows")]),
        ({"config": {"vocab_size": None, "text_config": {"vocab_size": 7}}}, [("failed", "VOCAB_SIZE_MISMATCH", "7")]),
        ({"config": {"vocab_size": 9, "auto_map": {"AutoModel": "code"}}}, []),  # its own code reads the size
        ({"tokenizer": unigram(8)}, []),
        ({"tokenizer": unigram(9)}, [("failed", "TOKEN_ID_OUT_OF_RANGE", "'p8' the id 8")]),
        ({"tokenizer": added(7)}, []),
        ({"tokenizer": added(8)}, [("warning", "TOKEN_ID_OUT_OF_RANGE", "'<pad>' the id 8")]),
        ({"tokenizer_config": {"eos_token": " "}}, [("warning", "EOS_TOKEN_BLANK", "tokenizer_config.json")]),
        ({"tokenizer_config": {"eos_token": {"content": ""}}}, [("warning", "EOS_TOKEN_BLANK", "blank")]),
        ({"tokenizer_config": {"eos_token": None}}, []),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, files: dict[str, Any], found: list[tuple[str, str, str]]) -> None:
    folder = write_folder(tmp_path / "model", **files)
    told = vocabulary_findings(folder)
    assert [(one.level, one.reason) for one in told] == [(level, reason) for level, reason, _ in found]
    for one, (*_, words) in zip(told, found, strict=True):
        assert words in one.said
        assert one.explained("ko") != one.explained("en")
    assert check_model_folder(folder) == (told or [Finding("model folder", "ok", f"{folder} is whole")])


@pytest.mark.parametrize("name", ["transformer.wte.weight", "gpt_neox.embed_in.weight", "encoder.something.weight"])
def test_the_embedding_is_known_by_its_families_names(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model", name, config={"vocab_size": 9})
    expected = [] if "something" in name else ["VOCAB_SIZE_MISMATCH"]
    assert [one.reason for one in vocabulary_findings(folder)] == expected


def test_two_embeddings_of_other_sizes_tell_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", config={"vocab_size": 9})
    header = json.dumps({"decoder.embed_tokens.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}})
    raw = header.encode()
    (folder / "second.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24))
    assert vocabulary_findings(folder) == []
