"""Architectures times kinds of adapters: merged logits are those of base+adapter, files are the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from loraline.merger.check.folder import check_folder
from loraline.merger.engines.models import attach_adapters, load_causal_lm
from loraline.merger.merging import AdapterInput, MergeOptions, MergeOutcome, merge_folders
from loraline.merger.spec import MergeBounds

ATTENTION = ["q_proj", "v_proj"]
# architecture -> modules to train
ARCHITECTURES: dict[str, list[str] | str] = {
    "llama": "all-linear", "llama-tied": "all-linear", "mistral": "all-linear", "qwen2": "all-linear",
    "qwen2-untied": "all-linear", "qwen3": "all-linear", "gemma": "all-linear", "gemma2": "all-linear",
    "gemma3": "all-linear", "phi": "all-linear", "phi3": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ATTENTION, "qwen2-moe": [*ATTENTION, "shared_expert.up_proj"], "qwen3-moe": ATTENTION,
    "gpt-neox": "all-linear", "opt": "all-linear", "stablelm": "all-linear", "olmo2": "all-linear",
    "falcon": "all-linear", "gptj": "all-linear",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {".*0.*": 2}, "alpha_pattern": {".*1.*": 32}},
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["HEAD"]},
    "whole embedding": {"modules_to_save": ["EMBEDDING"]},
    "head": {"target_modules": ["HEAD"]},
    "embedding": {"target_modules": ["EMBEDDING"]},
}
EVERYWHERE = ("lora", "rslora", "dora", "whole embedding")
WIDE = ("llama", "llama-tied", "qwen2", "qwen2-untied", "gemma", "phi", "gpt2", "mixtral")
"""Architectures that stand for the others where a kind concerns embeddings or patterns only."""
CASES = [(a, k) for a in ARCHITECTURES for k in KINDS if k in EVERYWHERE or a in WIDE]
NAMES = {"gpt2": ("wte", "lm_head"), "gpt-neox": ("embed_in", "embed_out"), "falcon": ("word_embeddings", "lm_head"),
         "gptj": ("wte", "lm_head")}  # fmt: skip
IDS = torch.tensor([[3, 9, 27, 81, 200, 5]])


def train(base: Path, folder: Path, settings: dict[str, Any], *, rows: int = 0) -> Path:
    """Write an adapter with random factors; `rows` grows the vocabulary first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(str(folder))
    return folder


def named(kind: str, architecture: str) -> dict[str, Any]:
    embedding, head = NAMES.get(architecture, ("embed_tokens", "lm_head"))
    places = {"HEAD": head, "EMBEDDING": embedding}
    found = {"target_modules": ARCHITECTURES[architecture], **KINDS[kind]}
    for key in ("target_modules", "modules_to_save"):
        if isinstance(found.get(key), list):
            found[key] = [places.get(name, name) for name in found[key]]
    return {"fan_in_fan_out": architecture == "gpt2", **found}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.clone()


def assert_equal_answers(base: Path, adapter: Path, merged: Path) -> None:
    plain = load_causal_lm(base, torch.float32)
    before = logits(plain)
    expected = logits(attach_adapters(plain, [(adapter, 1.0)]))
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(merged))
    assert found.shape == expected.shape
    moved = (expected[..., : before.shape[-1]] - before).abs().max()
    assert moved > 0.01
    assert (found - expected).abs().max() < max(2e-4, 1e-4 * float(moved))


def merge(tmp_path: Path, base: Path, adapter: Path) -> tuple[Path, MergeOutcome]:
    out = tmp_path / "work" / "model"
    return out, merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())


def assert_base_files(base: Path, out: Path, outcome: MergeOutcome, allowed: dict[str, set[str]]) -> None:
    """Every file is the base's, but for the named fields of config.json and for the files named."""
    different = {file.path for file in outcome.synced if file.difference}
    assert different == set(allowed)
    for file in outcome.synced:
        if file.path not in allowed:
            assert (out / file.path).read_bytes() == (base / file.path).read_bytes()
    if "config.json" in allowed:
        mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
        assert {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} == allowed[
            "config.json"
        ]


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=[f"{a}-{k.replace(' ', '_')}" for a, k in CASES])
def test_merged_answers_are_those_of_base_and_adapter(tmp_path, shared_base, architecture, kind):
    base = shared_base(architecture)
    adapter = train(base, tmp_path / "adapter", named(kind, architecture))
    out, outcome = merge(tmp_path, base, adapter)
    assert_equal_answers(base, adapter, out)
    untied = [repair.code for repair in outcome.repairs] == ["EMBEDDINGS_UNTIED"]
    assert untied or not outcome.repairs
    assert_base_files(base, out, outcome, {"config.json": {"tie_word_embeddings"}} if untied else {})
    assert [f for f in check_folder(out) if f.severity != "info"] == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["lora", "dora", "whole_embedding"])
def test_sharded_bases_in_16_bit(tmp_path, shared_base, architecture, kind):
    base = shared_base(architecture, dtype=torch.bfloat16, shard="20KB")
    settings = named(kind.replace("_", " "), architecture)
    adapter = train(base, tmp_path / "adapter", settings)
    # Rounding moves single tokens of a mixture to another expert, however small the mean.
    bounds = MergeBounds(max_diff=5.0 if architecture == "mixtral" else 0.0)
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions(bounds=bounds))
    assert len(list(out.glob("*.safetensors"))) >= len(list(base.glob("*.safetensors"))) > 2
    assert {p.name for p in base.glob("*.safetensors")} == {p.name for p in out.glob("*.safetensors")}
    assert outcome.measurements[-1][0].mean_kl < 0.01
    assert [f for f in check_folder(out) if f.severity != "info"] == []


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_trained_experts_are_written_under_the_names_of_the_base(tmp_path, shared_base, architecture):
    base = shared_base(architecture)
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = train(base, tmp_path / "adapter", settings)
    out, outcome = merge(tmp_path, base, adapter)
    assert outcome.merge_path.startswith("peft: target_parameters")
    assert_equal_answers(base, adapter, out)
    assert_base_files(base, out, outcome, {})


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2", "gpt2"])
def test_added_tokens_grow_the_vocabulary_and_nothing_else(tmp_path, shared_base, architecture):
    base = shared_base(architecture)
    embedding, head = NAMES.get(architecture, ("embed_tokens", "lm_head"))
    tied = architecture != "llama"
    modules = {"modules_to_save": [embedding] if tied else [embedding, head], "ensure_weight_tying": tied}
    adapter = train(base, tmp_path / "adapter", {**named("lora", architecture), **modules}, rows=323)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|call|>"]})
    tokenizer.save_pretrained(str(adapter))
    out, outcome = merge(tmp_path, base, adapter)
    assert outcome.merge_path.startswith("peft")
    assert_equal_answers(base, adapter, out)
    different = {file.path for file in outcome.synced if file.difference}
    assert {"config.json", "tokenizer.json"} <= different
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)} == {
        "vocab_size", *(["tie_word_embeddings"] if architecture == "gpt2" else [])  # there peft cannot keep the tie
    }  # fmt: skip
    assert mine["vocab_size"] == 323
    assert transformers.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|call|>") == 301
    assert [f for f in check_folder(out) if f.severity == "error"] == []


def test_trained_rows_of_single_tokens(tmp_path, shared_base):
    base = shared_base("qwen2")
    adapter = train(base, tmp_path / "adapter", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 27]})
    out, outcome = merge(tmp_path, base, adapter)
    assert outcome.merge_path.startswith("peft")
    assert_equal_answers(base, adapter, out)


def test_peft_alone_changes_a_tied_model(tmp_path, shared_base):
    """Why embeddings are written as two weights: peft's own merge adds what the head learned to the input as well."""
    base = shared_base("qwen2")
    adapter = train(base, tmp_path / "adapter", named("head", "qwen2"))
    plain = load_causal_lm(base, torch.float32)
    expected = logits(attach_adapters(plain, [(adapter, 1.0)]))
    peft_model = PeftModel.from_pretrained(load_causal_lm(base, torch.float32), adapter)
    alone = logits(peft_model.merge_and_unload())
    assert (alone - expected).abs().max() > 0.1
    out, _ = merge(tmp_path, base, adapter)
    ours = logits(transformers.AutoModelForCausalLM.from_pretrained(out))
    assert (ours - expected).abs().max() < 2e-4
