"""The estimate of memory against what peft and torch really hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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


def tiny(inner: int) -> tuple[dict[str, Any], Any]:
    """Return a small model's config and the model with an adapter of rank 4 on all linear layers, in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=448, hidden_size=128, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    return config.to_dict(), model.train()


def test_gradients_and_optimizer_are_what_a_step_of_adamw_leaves() -> None:
    """Byte for byte; AdamW's counters of steps, four bytes a matrix, are not reckoned."""
    import torch

    config, model = tiny(352)
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(0, 448, (2, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [part for state in optimizer.state.values() for part in state.values() if part.dim() > 0]
    parts = estimate(config, 1_000_000, spec(dtype="fp32", lora=pb.LoraParameters(r=4)))
    assert parts["optimizer"] == sum(part.nbytes for part in moments)
    assert parts["gradients"] == sum(weights.grad.nbytes for weights in model.parameters() if weights.grad is not None)
    assert parts["adapter"] == sum(weights.nbytes for weights in trained)


@pytest.mark.parametrize("inner", [256, 352, 677])
def test_activations_beside_what_a_forward_pass_keeps(inner: int) -> None:
    """What autograd holds for the backward pass up to the head, every storage once, the weights aside.

    For MLPs of two widths of the model up to the 5.3 of Qwen2.5-7B.
    """
    import torch

    config, model = tiny(inner)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    held: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)  # so that no storage is freed and given to another
        return tensor

    ids = torch.randint(0, 448, (4, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(input_ids=ids, attention_mask=torch.ones_like(ids))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    kept = sum(size for place, size in storages.items() if place not in weights)
    parts = estimate(config, 1_000_000, spec(dtype="fp32", batch_size=4, max_length=128))
    assert 0.95 * kept < parts["activations"] < 1.25 * kept


def test_both_answers_of_a_pair_are_reckoned() -> None:
    fields: dict[str, Any] = {"max_length": 1024, "batch_size": 2, "dtype": "bf16"}
    rows = estimate(QWEN_7B, 15_000_000_000, spec(**fields))
    asked = pb.TrainRequest(name="x", objective=pb.OBJECTIVE_DPO, parameters=pb.TrainingParameters(**fields))
    pairs = estimate(QWEN_7B, 15_000_000_000, training_spec(asked))
    assert {name: pairs[name] / rows[name] for name in rows if name != "total"} == {
        "base_weights": 1, "adapter": 1, "gradients": 1, "optimizer": 1, "activations": 2, "logits": 2,
    }  # fmt: skip


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
