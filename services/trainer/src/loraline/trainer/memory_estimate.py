"""How much memory a run will need, from config.json and the settings alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraline.trainer.spec import TrainingSpec

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "": 2}
_KEPT_OF_WIDTH, _KEPT_OF_MLP = 8, 4
"""Numbers per token and layer that are kept for the backward pass, in units of the model's width and of its MLP's:
norms, queries, keys, values and sums; gate, its activation, the other half and their product. Counted on what autograd
holds (7.3 and 4.0; the attention matrix is never whole in memory). An MLP without a gate keeps half as much: four
widths of it make the 34 bytes a unit of width in 16 bits of Korthikanti et al. 2022, "Reducing Activation
Recomputation"."""
_LOGIT_COPIES = 3
"""Logits, their float32 copy's softmax, and the gradient."""


def estimate(config: Mapping[str, Any], weights_bytes: int, spec: TrainingSpec) -> dict[str, int]:
    """Return bytes by part: `base_weights`, `adapter`, `gradients`, `optimizer`, `activations`, `logits`, `total`.

    An upper bound for full-length batches, good to about a third; libraries' own buffers (about 1 GB of CUDA context)
    are not in it. Parts that the config does not tell are left out, and so is the total then.
    """
    width, layers = _int(config, "hidden_size"), _int(config, "num_hidden_layers")
    vocabulary = _int(config, "vocab_size")
    if not (width and layers and vocabulary):
        return {}
    size = _BYTES[spec.dtype]
    # Of a pair both answers are shown.
    tokens = spec.batch_size * spec.max_length * (2 if spec.preference else 1)
    stored = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    parameters = weights_bytes // (4 if stored == "float32" else 2)
    per_weight = {"nf4": 0.56, "int8": 1.05}.get(spec.quantization, size)
    # All weights that are trained are held in float32; they are what is trained, and nothing comes beside them.
    trained = parameters if spec.full else adapter_parameters(config, spec.lora.r)
    per_weight = 4 if spec.full else per_weight
    kept_layers = 1 if spec.gradient_checkpointing else layers
    inner = _int(config, "intermediate_size") or 4 * width
    activations = tokens * (_KEPT_OF_WIDTH * width + _KEPT_OF_MLP * inner) * kept_layers * size
    if spec.gradient_checkpointing:
        activations += tokens * width * size * layers
    parts = {
        "base_weights": int(parameters * per_weight),
        # peft keeps an adapter in float32: weights, gradients, and AdamW's two moments.
        "adapter": 0 if spec.full else trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "activations": activations,
        "logits": tokens * vocabulary * 4 * _LOGIT_COPIES,
    }
    return {**parts, "total": sum(parts.values())}


def adapter_parameters(config: Mapping[str, Any], rank: int) -> int:
    """Return the weights of a LoRA adapter on all linear layers: rank · (inputs + outputs) each."""
    width, layers = _int(config, "hidden_size"), _int(config, "num_hidden_layers")
    heads = _int(config, "num_attention_heads") or 1
    head = _int(config, "head_dim") or width // heads
    keys = (_int(config, "num_key_value_heads") or heads) * head
    inner = _int(config, "intermediate_size") or 4 * width
    attention = 2 * (width + heads * head) + 2 * (width + keys)
    return rank * layers * (attention + 3 * (width + inner))


def _int(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
