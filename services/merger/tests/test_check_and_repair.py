"""Every known defect in a model folder is found by its code, and mended where that is promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraline.merger.check.findings import loadable
from loraline.merger.check.folder import check_folder
from loraline.merger.model_jobs import check_rendering, copy_model
from loraline.merger.repair import repair_folder

WEIGHTS = "model.safetensors"


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        content.update(values)
        path.write_text(json.dumps(content, indent=2))

    return apply


def drop(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def one_more_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 320, "content": "<|extra|>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**token, "normalized": False, "special": True})
    path.write_text(json.dumps(content))


def no_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"a sentencepiece model")


LAYER = "model.layers.1."
CLASS = "TOKENIZER_CLASS_UNKNOWN"
# defect -> (what makes it, the code that must be found, whether RepairModel mends it)
DEFECTS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "vocabulary": (edit("config.json", vocab_size=321), "VOCAB_SIZE_MISMATCH", True),
    "hidden": (edit("config.json", hidden_size=64, head_dim=8), "HIDDEN_SIZE_MISMATCH", True),
    "intermediate": (edit("config.json", intermediate_size=47), "INTERMEDIATE_SIZE_MISMATCH", True),
    "layers too many": (edit("config.json", num_hidden_layers=3), "LAYER_COUNT_MISMATCH", True),
    "layers too few": (edit("config.json", num_hidden_layers=1), "LAYER_COUNT_MISMATCH", True),
    "heads": (edit("config.json", num_attention_heads=8, head_dim=8), "ATTENTION_HEADS_MISMATCH", False),
    "kv heads": (edit("config.json", num_key_value_heads=4), "KV_HEADS_MISMATCH", True),
    "head dim": (edit("config.json", head_dim=16), "ATTENTION_HEADS_MISMATCH", False),
    "untied without head": (weights(without("lm_head.weight")), "TIE_WORD_EMBEDDINGS_MISMATCH", True),
    "head of another size": (
        weights(lambda t: t.update({"lm_head.weight": torch.zeros(319, 32)})), "LM_HEAD_MISMATCH", False,
    ),
    "tensor missing": (weights(without(f"{LAYER}mlp.up_proj.weight")), "MISSING_TENSOR", False),
    "layer missing": (weights(without("model.layers.0.")), "MISSING_LAYER", False),
    "left over quantisation": (
        edit("config.json", quantization_config={"quant_method": "bitsandbytes"}), "QUANTIZATION_LEFT_OVER", True,
    ),
    "no architecture": (edit("config.json", architectures=None), "ARCHITECTURES_MISSING", False),
    "remote code": (edit("config.json", auto_map={"AutoConfig": "x.Y"}), "REMOTE_CODE", False),
    "no config": (drop("config.json"), "FILE_MISSING", False),
    "broken config": (write("config.json", b"{"), "FILE_UNREADABLE", False),
    "broken generation config": (write("generation_config.json", b"[]"), "FILE_UNREADABLE", False),
    "broken tokenizer": (write("tokenizer.json", b"{"), "FILE_UNREADABLE", False),
    "no tokenizer": (drop("tokenizer.json"), "TOKENIZER_MISSING", False),
    "no template": (drop("chat_template.jinja"), "CHAT_TEMPLATE_MISSING", False),
    "blank eos": (edit("tokenizer_config.json", eos_token=" "), "EOS_TOKEN_BLANK", True),
    "blank eos object": (edit("tokenizer_config.json", eos_token={"content": ""}), "EOS_TOKEN_BLANK", True),
    "blank eos in map": (edit("special_tokens_map.json", eos_token="\t"), "EOS_TOKEN_BLANK", True),
    "eos of many tokens": (edit("tokenizer_config.json", eos_token="<eos> of"), "SPECIAL_TOKEN_NOT_SINGLE", False),
    "pad of many tokens": (edit("tokenizer_config.json", pad_token="[PAD]"), "SPECIAL_TOKEN_NOT_SINGLE", False),
    "token beyond the embedding": (one_more_token, "TOKEN_ID_OUT_OF_RANGE", False),
    "eos beyond the embedding": (edit("generation_config.json", eos_token_id=[2, 999]), "TOKEN_ID_OUT_OF_RANGE", True),
    "pad of -1": (edit("config.json", pad_token_id=-1), "TOKEN_ID_OUT_OF_RANGE", True),
    "other eos": (edit("generation_config.json", eos_token_id=0), "EOS_IDS_DISAGREE", True),
    "other pad": (edit("generation_config.json", pad_token_id=5), "PAD_IDS_DISAGREE", True),
    "unnamed vocabulary": (no_tokenizer_json, "TOKENIZER_MODEL_UNNAMED", True),
    "unknown class": (edit("tokenizer_config.json", tokenizer_class="TokenizersBackend"), CLASS, True),
    "truncated weights": (lambda f: write(WEIGHTS, (f / WEIGHTS).read_bytes()[:-9])(f), "CORRUPT_WEIGHTS", False),
    "no weights": (drop(WEIGHTS), "NO_SAFETENSORS", False),
    "pickle beside": (write("pytorch_model.bin", b"\x80\x04."), "PICKLE_WEIGHTS", False),
    "unsafe index": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'), "UNSAFE_PATH", False,
    ),
    "index to nothing": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'), "MISSING_SHARD", False,
    ),
    "broken index": (write("model.safetensors.index.json", b"{}"), "INDEX_UNREADABLE", False),
    "index to another name": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}'), "INDEX_MISMATCH", True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model folder without defects; tests work on copies."""
    return tmp_path_factory.mktemp("sound") / "model"


@pytest.fixture
def folder(tmp_path: Path, make_base, sound: Path) -> Path:
    if not sound.exists():
        copy_model(make_base("llama"), sound)
    copy = tmp_path / "copy"
    copy_model(sound, copy)
    weights_copy = copy / WEIGHTS  # a hard link; the tests write into it
    content = weights_copy.read_bytes()
    weights_copy.unlink()
    weights_copy.write_bytes(content)
    return copy


def test_a_sound_folder_has_no_findings(folder):
    assert check_folder(folder) == []
    assert check_rendering(folder) == []


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gpt2"])
def test_sound_folders_of_other_families(make_base, family):
    assert check_folder(make_base(family, torch.bfloat16, shard="20KB")) == []


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(folder, defect):
    harm, code, mended = DEFECTS[defect]
    harm(folder)
    found = [finding for finding in check_folder(folder) if finding.code == code]
    assert found, [finding.code for finding in check_folder(folder)]
    assert all(finding.message and finding.remedy for finding in found)
    assert found[0].repairable == mended
    repaired = repair_folder(folder)
    assert (code in [finding.code for finding in repaired]) == mended
    assert (code in [finding.code for finding in check_folder(folder)]) != mended


BROKEN_WITHOUT_REPAIR = ["vocabulary", "intermediate", "layers too many", "kv heads"]


@pytest.mark.parametrize("defect", BROKEN_WITHOUT_REPAIR)
def test_repair_makes_the_model_answer_as_before(folder, sound, defect):
    ids = torch.tensor([[1, 5, 9, 33]])
    expected = transformers.AutoModelForCausalLM.from_pretrained(sound)(ids).logits
    DEFECTS[defect][0](folder)
    assert not answers_like(folder, ids, expected)
    assert repair_folder(folder)
    assert loadable(check_folder(folder))
    assert answers_like(folder, ids, expected)


def answers_like(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    except RuntimeError:
        return False
    return logits.shape == expected.shape and torch.allclose(logits, expected, atol=1e-5)


def test_several_defects_at_once(folder):
    for defect in ("blank eos", "vocabulary", "other pad", "unknown class", "left over quantisation"):
        DEFECTS[defect][0](folder)
    repaired = {finding.code for finding in repair_folder(folder)}
    wanted = {
        DEFECTS[d][1] for d in ("blank eos", "vocabulary", "other pad", "unknown class", "left over quantisation")
    }
    assert wanted <= repaired
    assert check_folder(folder) == []


def test_base_names_the_fields_that_drifted(folder, sound):
    edit("config.json", rope_theta=500000.0, rms_norm_eps=1e-3)(folder)
    findings = [f for f in check_folder(folder, sound) if f.code == "CONFIG_DIFFERS_FROM_BASE"]
    assert {finding.message.split()[0] for finding in findings} >= {"rms_norm_eps"}
    repair_folder(folder, sound)
    assert json.loads((folder / "config.json").read_text()) == json.loads((sound / "config.json").read_text())


def test_tokenizer_that_no_library_loads(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing", "vocab": {}}}')
    assert [finding.code for finding in check_rendering(folder)] == ["TOKENIZER_NOT_LOADABLE"]
