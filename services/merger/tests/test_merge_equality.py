"""The streamed merge against peft, bit for bit, and against base+adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from loraline.core.errors import LoralineError
from loraline.merger.adapter import open_adapter
from loraline.merger.engines import streaming
from loraline.merger.engines.deltas import LoraRows
from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders
from loraline.merger.plan import make_plan
from loraline.merger.weights.header import Form
from loraline.merger.weights.layout import open_weights

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 32}},
    "all_linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["input_layernorm"]},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def peft_result(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(folder)
    assert found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_same_bits_as_peft(tmp_path, make_base, make_adapter, family, kind, dtype):
    base = make_base(family, dtype)
    adapter = make_adapter(base, evidence=False, **KINDS[kind])
    outcome = merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert outcome.merge_path.startswith("streaming")
    assert outcome.written.merged_tensors == {"all_linear": 14, "norms": 8}.get(kind, 6)
    assert_same_bits(tmp_path / "work" / "model", peft_result(base, adapter))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gpt2"])
def test_other_families(tmp_path, make_base, make_adapter, family):
    base = make_base(family, torch.bfloat16)
    settings = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = make_adapter(base, **settings)
    outcome = merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert outcome.merge_path.startswith("streaming")
    assert_same_bits(tmp_path / "work" / "model", peft_result(base, adapter))


def test_blocks_of_rows_give_the_same_bits(tmp_path, make_base, make_adapter, monkeypatch):
    monkeypatch.setattr("loraline.merger.engines.streaming.BLOCK_ELEMENTS", 5 * 32)
    monkeypatch.setattr("loraline.merger.engines.streaming._ROWS", 1)
    for family in ("llama", "gpt2"):
        base = make_base(family, torch.bfloat16, name=f"base-{family}")
        settings = {"fan_in_fan_out": True} if family == "gpt2" else {}
        adapter = make_adapter(base, name=f"adapter-{family}", **settings)
        out = tmp_path / family / "model"
        merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
        assert_same_bits(out, peft_result(base, adapter))


@pytest.mark.parametrize(
    ("family", "settings", "path"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "streaming: whole tensors on 7"),
        ("llama", {"bias": "lora_only"}, "peft: "),
        ("llama", {"target_modules": ["embed_tokens"]}, "peft: "),
        ("llama", {"init_lora_weights": "pissa"}, "peft: init_lora_weights is pissa"),
        ("gpt2", {"use_dora": True, "fan_in_fan_out": True}, "peft: DoRA on weights stored as (in, out)"),
    ],
)
def test_what_cannot_be_streamed_goes_through_peft_and_says_so(
    tmp_path, make_base, make_adapter, family, settings, path
):
    base = make_base(family, torch.float32, **({"attention_bias": True} if family == "llama" else {}))
    adapter = make_adapter(base, evidence=False, **settings)
    outcome = merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert outcome.merge_path.startswith(path)
    assert_same_bits(tmp_path / "work" / "model", peft_result(base, adapter))


def test_layout_and_untouched_bytes_are_the_bases(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16, shard="20KB")
    adapter = make_adapter(base, layers_to_transform=[1])
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    same = [name for name in shards if (out / name).read_bytes() == (base / name).read_bytes()]
    assert 0 < len(same) < len(shards)
    assert outcome.written.bytes_written == sum((out / name).stat().st_size for name in shards)


def test_logits_equal_base_and_adapter(tmp_path, make_base, make_adapter):
    base = make_base("qwen2", torch.float32)
    adapter = make_adapter(base)
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    ids = torch.tensor([[3, 9, 27, 81, 200]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits.clone()
    expected = PeftModel.from_pretrained(plain, adapter)(ids).logits
    assert torch.allclose(merged, expected, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-1)
    (recorded, fits), (measured, within) = outcome.measurements
    assert fits
    assert within
    assert recorded.max_abs_logprob_diff < 1e-3
    assert measured.max_abs_logprob_diff < 1e-3 < 0.1 < measured.base_to_adapter_diff
    assert measured.top1_agreement == 1


def test_weighted_sum_of_two_adapters(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.float32)
    one, two = make_adapter(base, name="one"), make_adapter(base, name="two", seed=2, r=8, target_modules=["v_proj"])
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(one, 0.5), AdapterInput(two, 2.0)], out, MergeOptions())
    merged, plain = tensors_of(out), tensors_of(base)
    first, second = peft_result(base, one), peft_result(base, two)
    for name, tensor in merged.items():
        expected = plain[name] + 0.5 * (first[name] - plain[name]) + 2 * (second[name] - plain[name])
        assert torch.allclose(tensor, expected, atol=1e-5), name
    assert outcome.measurements[-1][0].max_abs_logprob_diff < 1e-3


def test_asked_type(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16, shard="20KB")
    adapter = make_adapter(base)
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions(dtype="fp32"))
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.float32}
    changed = [file for file in outcome.synced if file.difference]
    assert [file.path for file in changed] == ["config.json"]
    assert "DTYPE_CHANGED" in changed[0].difference
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert next(model.parameters()).dtype == torch.float32


def test_too_narrow_type_is_refused(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base, size=2000)
    with pytest.raises(LoralineError) as error:
        merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions(dtype="fp16"))
    assert error.value.reason == "MERGE_NOT_FINITE"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_as_peft_in_tensors_of_several_blocks(tmp_path, make_base, make_adapter, dtype):
    base = make_base(
        "llama", dtype, hidden_size=1024, intermediate_size=1100, num_attention_heads=16, num_key_value_heads=4,
        num_hidden_layers=1,
    )  # fmt: skip
    adapter = make_adapter(base, evidence=False, r=16, target_modules="all-linear")
    assert streaming.rows_at_a_time((1100, 1024)) < 1100
    weights = open_weights(base)
    plan = make_plan(weights, [(open_adapter(adapter), 1.0)], "")
    streaming.write_merged(weights, LoraRows([adapter], plan), Form(), tmp_path / "w" / "model", fingerprint="x")
    assert_same_bits(tmp_path / "w" / "model", peft_result(base, adapter))
