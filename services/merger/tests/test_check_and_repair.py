"""Sound folders have no findings; a base names what drifted; copies hold no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from loraline.core.errors import LoralineError
from loraline.merger.check.folder import check_folder
from loraline.merger.model_jobs import check_everything, check_rendering, copy_model
from loraline.merger.repair import repair_folder

FAMILIES = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2", "mixtral",
    "qwen2-moe", "qwen3-moe", "gpt-neox", "opt", "stablelm", "olmo2", "falcon", "gptj",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_folders_have_no_findings(shared_base, family):
    folder = shared_base(family, dtype=torch.bfloat16, shard="20KB")
    found = [finding.code for finding in check_everything(folder, folder)]
    found = [code for code in found if code != "TOKENIZER_REPLACED"]  # of a toy tokenizer under a model's name
    assert found == (["DIMENSIONS_NOT_CHECKED"] if family == "falcon" else [])


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(shared_base):
    """transformers 5 gives Qwen2 models its own way of splitting text, whatever tokenizer.json says."""
    assert "TOKENIZER_REPLACED" in [finding.code for finding in check_rendering(shared_base("qwen2"))]
    assert check_rendering(shared_base("llama")) == []


@pytest.fixture
def folder(tmp_path: Path, shared_base) -> Path:
    return shutil.copytree(shared_base("llama"), tmp_path / "copy")


def test_base_names_the_fields_that_drifted(folder, shared_base):
    sound = shared_base("llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 500000.0, "rms_norm_eps": 1e-3}))
    findings = [f for f in check_folder(folder, sound) if f.code == "CONFIG_DIFFERS_FROM_BASE"]
    assert {finding.message.split()[0] for finding in findings} >= {"rms_norm_eps"}
    repair_folder(folder, sound)
    assert json.loads(path.read_text()) == json.loads((sound / "config.json").read_text())


def test_tokenizer_that_no_library_loads(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing", "vocab": {}}}')
    assert [finding.code for finding in check_rendering(folder)] == ["TOKENIZER_NOT_LOADABLE"]


def test_copies_hold_neither_code_nor_pickles_and_share_the_weights(folder, tmp_path):
    for name in ("evil.py", "optimizer.pt", ".hidden"):
        (folder / name).write_bytes(b"x")
    copy_model(folder, tmp_path / "second")
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert not names & {"evil.py", "optimizer.pt", ".hidden"}
    assert (tmp_path / "second" / "model.safetensors").stat().st_nlink == 2
    (folder / "license.txt").symlink_to("/etc/hostname")
    with pytest.raises(LoralineError) as error:
        copy_model(folder, tmp_path / "third")
    assert error.value.reason == "UNSAFE_PATH"
