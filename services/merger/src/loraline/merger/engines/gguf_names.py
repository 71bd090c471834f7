"""GGUF's names and keys for the architectures that are exported, from its published specification and constants."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from loraline.core.errors import LoralineError, unsupported

# transformers' model type -> GGUF's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that GGUF's metadata holds."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    epsilon: float
    rope_base: float
    rope_scaling: Mapping[str, Any]


def read_sizes(config: Mapping[str, Any]) -> Sizes:
    """Read config.json. UNIMPLEMENTED for architectures and position scalings that are not exported."""
    architecture = ARCHITECTURES.get(str(config.get("model_type")), "")
    if not architecture:
        raise unsupported(
            f"A GGUF of model type {config.get('model_type')}", f"Exported are {', '.join(sorted(ARCHITECTURES))}."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or (kind == "llama3" and architecture != "llama"):
        raise unsupported(f"A GGUF with position scaling {kind}", "Serve the model with inference.")
    window = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if window and config.get("sliding_window"):
        raise unsupported("A GGUF of a model with a sliding window", "Serve the model with inference.")
    heads = int(config["num_attention_heads"])
    return Sizes(
        architecture,
        int(config["num_hidden_layers"]),
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or config["hidden_size"] // heads),
        int(config["max_position_embeddings"]),
        float(config["rms_norm_eps"]),
        float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope if kind != "default" else {},
    )


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor; UNIMPLEMENTED for tensors that these architectures do not have."""
    if name in _TOP:
        return _TOP[name]
    match = _LAYER.match(name)
    if not match or match[2] not in _IN_LAYER:
        raise unexpected_tensor(name)
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def unexpected_tensor(name: str) -> LoralineError:
    """UNIMPLEMENTED for a tensor without a counterpart in GGUF."""
    return unsupported(f"A GGUF of a model with the tensor {name}", "Serve the model with inference.")


def reorder(name: str, values: numpy.ndarray, sizes: Sizes) -> numpy.ndarray:
    """Return query and key weights in the row order that GGUF's llama architecture expects; others as they are.

    transformers rotates the two halves of a head against each other, llama.cpp neighbouring pairs: row i of the first
    half and row i of the second become rows 2i and 2i + 1.
    """
    if sizes.architecture != "llama" or not re.search(r"attn_[qk]\.(weight|bias)$", name):
        return values
    heads = sizes.heads if "attn_q." in name else sizes.kv_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def rope_factors(sizes: Sizes) -> numpy.ndarray | None:
    """Return the divisors of the rotary frequencies for Llama 3's scaling; None for other models.

    After the formula published with Llama 3.1: short wavelengths stay, long ones are slowed by `factor`, between them
    the two are blended.
    """
    if sizes.rope_scaling.get("rope_type", sizes.rope_scaling.get("type")) != "llama3":
        return None
    scaling = sizes.rope_scaling
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(scaling["original_max_position_embeddings"])
    exponents = numpy.arange(0, sizes.head_dim, 2, dtype=numpy.float64) / sizes.head_dim
    wavelengths = 2 * math.pi * sizes.rope_base**exponents
    blend = (original / wavelengths - low) / (high - low)
    middle = 1 / ((1 - blend) / factor + blend)
    factors = numpy.where(wavelengths < original / high, 1.0, numpy.where(wavelengths > original / low, factor, middle))
    return factors.astype(numpy.float32)
