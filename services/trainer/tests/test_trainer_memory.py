"""The estimate of memory against what peft and torch really hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer.memory_estimate import adapter_parameters, estimate
from loraline.trainer.spec import training_spec

QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16",
}  # fmt: skip


def spec(**fields: Any):
    return training_spec(pb.TrainRequest(name="x", parameters=pb.TrainingParameters(**fields)))


def test_an_adapter_has_as_many_weights_as_peft_makes(small_base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(small_base), LoraConfig(r=8, target_modules="all-linear")
    )
    made = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    assert adapter_parameters(json.loads((small_base / "config.json").read_text()), 8) == made


def test_a_known_model_needs_what_people_report() -> None:
    """A 7B model: 15 GB of 16-bit weights, a good 4 GB in NF4; rank 16 on all linear layers is 40 million weights."""
    weights = 15_231_233_024
    parts = estimate(QWEN_7B, weights, spec(max_length=1024, batch_size=1, dtype="bf16"))
    assert parts["base_weights"] == weights // 2 * 2
    assert 40e6 * 4 < parts["adapter"] < 41e6 * 4
    four_bit = estimate(QWEN_7B, weights, replace(spec(max_length=1024, batch_size=1), quantization="nf4"))
    assert 4e9 < four_bit["base_weights"] < 4.5e9


def test_each_knob_lowers_the_estimate() -> None:
    def total(**fields: Any) -> int:
        return estimate(QWEN_7B, 15_000_000_000, spec(**{"max_length": 2048, "batch_size": 4, **fields}))["total"]

    first = total()
    assert total(max_length=1024) < first
    assert total(batch_size=1) < first
    assert total(gradient_checkpointing=True) < first
    assert total(quantization=pb.QUANTIZATION_NF4) < first


def test_what_the_config_does_not_tell_is_not_made_up() -> None:
    assert estimate({"model_type": "other"}, 1000, spec()) == {}
    assert estimate({**QWEN_7B, "hidden_size": "wide"}, 1000, spec()) == {}
