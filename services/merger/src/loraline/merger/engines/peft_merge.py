"""The merge through peft, for adapters that are more than `scale * B @ A`. Holds the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loraline.core.errors import unsupported
from loraline.merger.engines.deltas import MergedRows
from loraline.merger.engines.models import attach_adapters, load_causal_lm
from loraline.merger.weights.layout import WeightFiles

# Constant buffers that old checkpoints stored; models of today compute them and have no such entry.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def merge_with_peft(weights: WeightFiles, adapter: Path) -> MergedRows:
    """Let peft merge, and return what changed under the base's own names.

    Raises UNIMPLEMENTED when a changed weight has no counterpart of the same shape in the base's files, such as after
    the vocabulary grew.
    """
    model = attach_adapters(load_causal_lm(weights.folder, "auto"), [(adapter, 1.0)])
    merged = model.merge_and_unload()
    state: dict[str, torch.Tensor] = dict(merged.state_dict())
    prefix = getattr(merged, "base_model_prefix", "")
    changed: dict[str, torch.Tensor] = {}
    for shard in weights.shards:
        with safe_open(shard.path, framework="pt") as reader:
            for tensor in shard.tensors:
                value = _find(state, tensor.name, prefix)
                if value is None or tuple(value.shape) != tensor.shape:
                    if tensor.name.endswith(_BUFFERS):
                        continue
                    raise _no_counterpart(tensor.name, value)
                if not _equal(value, reader.get_tensor(tensor.name)):
                    changed[tensor.name] = value
    return MergedRows(changed)


def _find(state: dict[str, torch.Tensor], name: str, prefix: str) -> torch.Tensor | None:
    value = state.get(name)
    return state.get(f"{prefix}.{name}") if value is None and prefix else value


def _equal(value: torch.Tensor, base: torch.Tensor) -> bool:
    return torch.equal(value.to(base.dtype), base)


def _no_counterpart(name: str, value: Any) -> Exception:
    shape = "no counterpart" if value is None else f"the shape {list(value.shape)}"
    return unsupported(
        f"Merging this adapter, after which {name} has {shape} in memory,",
        "Serve the adapter unmerged, or train it without added tokens.",
    )
