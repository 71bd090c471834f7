"""The base as a quantised training saw it: linear weights quantised and dequantised by the trainer's own library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open

from loraline.core.errors import unsupported
from loraline.merger.engines.deltas import RowSource, TransformedBase
from loraline.merger.engines.skeleton import linear_weights
from loraline.merger.weights.layout import WeightFiles

KINDS = ("nf4", "fp4", "int8")
_BLOCK = 64
"""Values that share a scale in 4 bits."""


def round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a matrix as it comes back from `kind`, in its own type.

    4 bits as in QLoRA (arXiv 2305.14314): blocks of 64 values, their scales quantised again. 8 bits as in LLM.int8
    (arXiv 2208.07339): one scale a row. Blocks follow each other over the flat matrix, so its shape does not matter.
    """
    functional = _functional()
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(values, scales).to(weight.dtype)
    flat = weight.reshape(-1, _BLOCK if weight.numel() % _BLOCK == 0 else weight.numel()).contiguous()
    packed, state = functional.quantize_4bit(flat, quant_type=kind, compress_statistics=True)
    return functional.dequantize_4bit(packed, state).reshape(weight.shape).to(weight.dtype)


def prepare(kind: str, stored: torch.dtype) -> Callable[[Any], None]:
    """Return a function that replaces the linear weights of a loaded model by their round trip.

    `stored` is the type of the files: the training quantised from it, also where the model is loaded wider here.
    """

    def apply(model: Any) -> None:
        head = model.get_output_embeddings()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear) and module is not head:
                    weight = module.weight
                    weight.copy_(round_trip(weight.to(stored), kind).to(weight.dtype))

    return apply


def dequantised_rows(weights: WeightFiles, inner: RowSource, kind: str) -> RowSource:
    """Return `inner` over the dequantised base; needs as much memory as the largest weight."""
    names = linear_weights(weights.folder, frozenset(weights.by_name()), routers=True)
    shard_of = {tensor.name: shard.path for shard, tensor in weights.tensors()}

    def transform(name: str) -> torch.Tensor:
        with safe_open(shard_of[name], framework="pt") as reader:
            return round_trip(reader.get_tensor(name), kind)

    return TransformedBase(inner, names, transform)


def main_dtype(weights: WeightFiles) -> torch.dtype:
    """Return the type of most of the linear weights."""
    types = [tensor.dtype for _, tensor in weights.tensors() if len(tensor.shape) == 2]
    name = max(set(types), key=types.count) if types else "F32"
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(name, torch.float32)


def available() -> bool:
    """Whether the library is installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return False
    return True


def _functional() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise unsupported(
            "The dequantised base on this server", "Install loraline-merger[quantization], or use MERGE_BASE_ORIGINAL."
        ) from error
    return functional
