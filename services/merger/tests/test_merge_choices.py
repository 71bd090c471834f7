"""Several adapters by TIES and DARE, and adapters of a quantised training: both bases measured, the better taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from loraline.core.errors import LoralineError
from loraline.merger.engines.dequantised import round_trip
from loraline.merger.merging import AdapterInput, MergeOptions, MergeOutcome, MergeWatch, merge_folders
from loraline.merger.spec import MergeBounds

WIDE = MergeBounds(max_kl=5.0, max_diff=50.0)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def merge(tmp_path: Path, base: Path, inputs: list[AdapterInput], **options: Any) -> tuple[Path, MergeOutcome]:
    out = tmp_path / "work" / "model"
    return out, merge_folders(base, inputs, out, MergeOptions(**options))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("ranks", [(4, 4), (4, 8)])
def test_combined_adapters_are_those_of_peft(tmp_path, shared_base, make_adapter, method, ranks):
    base = shared_base("llama")
    one = make_adapter(base, name="one", evidence=False, r=ranks[0])
    two = make_adapter(base, name="two", seed=2, evidence=False, r=ranks[1])
    inputs = [AdapterInput(one, 0.7), AdapterInput(two, 1.3)]
    out, outcome = merge(tmp_path, base, inputs, combine=method, density=0.6)
    kind = {"ties": "ties", "dare": "dare_linear"}[method] + ("_svd" if ranks[0] != ranks[1] else "")
    assert outcome.merge_path.endswith(f"2 adapters combined through peft by {kind}, density 0.6")
    assert outcome.measurements[-1][1]
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), one, adapter_name="a")
    model.load_adapter(str(two), "b")
    torch.manual_seed(0)
    rank = sum(ranks) if kind.endswith("svd") else None
    model.add_weighted_adapter(["a", "b"], [0.7, 1.3], "c", combination_type=kind, density=0.6, svd_rank=rank)
    model.set_adapter("c")
    expected = model.merge_and_unload().state_dict()
    for name, value in tensors_of(out).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_combination_is_the_same_each_time(tmp_path, shared_base, make_adapter):
    base = shared_base("llama")
    inputs = [AdapterInput(make_adapter(base, name=n, seed=s, evidence=False)) for n, s in (("one", 1), ("two", 2))]
    first, _ = merge(tmp_path / "first", base, inputs, combine="dare")
    second, _ = merge(tmp_path / "second", base, inputs, combine="dare")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_dora_cannot_be_combined(tmp_path, shared_base, make_adapter):
    base = shared_base("llama")
    inputs = [
        AdapterInput(make_adapter(base, name="one", evidence=False, use_dora=True)),
        AdapterInput(make_adapter(base, name="two", evidence=False)),
    ]
    with pytest.raises(LoralineError) as error:
        merge(tmp_path, base, inputs, combine="ties")
    assert error.value.reason == "NOT_SUPPORTED"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_round_trip_is_the_trainers(shared_base, kind):
    base = shared_base("llama", dtype=torch.bfloat16, **SIZES)
    weight = tensors_of(base)["model.layers.0.mlp.up_proj.weight"]
    back = round_trip(weight, kind)
    assert back.dtype == weight.dtype
    error = (back - weight).float().abs()
    assert 0 < error.mean() < 0.15 * weight.float().abs().mean()
    if kind == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
        )
        seen = loaded.model.layers[0].mlp.up_proj(torch.eye(64, dtype=torch.bfloat16)).T
        assert (seen - back).float().abs().max() < 0.01


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_both_bases_are_measured_and_the_better_is_published(tmp_path, shared_base, make_adapter, kind):
    base = shared_base("llama", dtype=torch.bfloat16, shard="60KB", **SIZES)
    one = AdapterInput(make_adapter(base, evidence=False), trained_quantised=kind)
    out, outcome = merge(tmp_path, base, [one])
    (worse, _), (better, within) = outcome.measurements
    assert {worse.subject, better.subject} == {
        "merged bf16 into the original base", "merged bf16 into the dequantized base",
    }  # fmt: skip
    assert better.mean_kl <= worse.mean_kl
    assert within
    assert outcome.merge_base == "dequantized"
    weight = tensors_of(base)["model.layers.0.mlp.gate_proj.weight"]  # not trained: the round trip of the base alone
    assert torch.equal(tensors_of(out)["model.layers.0.mlp.gate_proj.weight"], round_trip(weight, kind))
    assert torch.equal(tensors_of(out)["lm_head.weight"], tensors_of(base)["lm_head.weight"])
    assert [path.name for path in out.parent.iterdir() if path.is_dir()] == ["model"]


def test_the_caller_may_choose(tmp_path, shared_base, make_adapter):
    base = shared_base("llama", dtype=torch.bfloat16, **SIZES)
    one = AdapterInput(make_adapter(base, evidence=False), trained_quantised="nf4")
    _, original = merge(tmp_path / "a", base, [one], merge_base="original")
    assert original.merge_base == "original"
    assert any("as that was asked for" in remark for remark in original.remarks)
    out, dequantised = merge(tmp_path / "b", base, [one], merge_base="dequantized")
    assert dequantised.merge_base == "dequantized"
    assert len(dequantised.measurements) == 1
    both, _ = merge(tmp_path / "c", base, [one])
    assert (both / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_dequantised_base_needs_a_quantised_training(tmp_path, shared_base, make_adapter):
    base = shared_base("llama", dtype=torch.bfloat16)
    with pytest.raises(LoralineError) as error:
        merge(tmp_path, base, [AdapterInput(make_adapter(base, evidence=False))], merge_base="dequantized")
    assert error.value.reason == "NOT_SUPPORTED"


def test_shards_of_the_rival_are_not_resumed_as_the_first_merge(tmp_path, shared_base, make_adapter):
    """A process that dies while the better weights move in leaves a mixture; the next attempt writes all anew."""
    base = shared_base("llama", dtype=torch.bfloat16, shard="60KB", **SIZES)
    one = AdapterInput(make_adapter(base, evidence=False), trained_quantised="nf4")
    out, first = merge(tmp_path, base, [one])
    assert first.merge_base == "dequantized"
    before = tensors_of(out)
    seen: list[str] = []
    again = merge_folders(base, [one], out, MergeOptions(), MergeWatch(stage=seen.append))
    assert again.written.resumed_shards == []
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(out).items())
