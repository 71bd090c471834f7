"""The merge through peft, for adapters that are more than factors of linear layers. Holds the whole model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from loraline.core.errors import LoralineError, unsupported
from loraline.merger.engines.deltas import MergedRows
from loraline.merger.engines.models import attach_adapters, load_causal_lm
from loraline.merger.weights.layout import WeightFiles

# Constant buffers that old checkpoints stored; models of today compute them and have no such entry.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class PeftMerge:
    """What peft's merge changed, under the base's own tensor names."""

    rows: MergedRows
    shapes: dict[str, tuple[int, ...]]
    """Tensors whose shape changed: embeddings of a grown vocabulary."""
    added: dict[str, tuple[int, ...]]
    """The output embedding, where the merge made it differ from the input's."""


def merge_with_peft(weights: WeightFiles, adapter: Path) -> PeftMerge:
    """Let peft merge, and return what changed.

    Where input and output embedding are one weight and training made them two, both are kept: peft alone would add
    what was learned for one side to the other side as well. Raises UNIMPLEMENTED when a weight has no counterpart in
    the base's files.
    """
    model = attach_adapters(load_causal_lm(weights.folder, "auto"), [(adapter, 1.0)])
    _untie(model.get_base_model())
    merged = model.merge_and_unload()
    head = _name_of_head(merged)
    state: dict[str, torch.Tensor] = dict(revert_weight_conversion(merged, merged.state_dict()))
    prefix = getattr(merged, "base_model_prefix", "")
    changed: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names: set[str] = set()
    for shard in weights.shards:
        with safe_open(shard.path, framework="pt") as reader:
            for tensor in shard.tensors:
                names.add(tensor.name)
                value = _find(state, tensor.name, prefix)
                if value is None and tensor.name.endswith(_BUFFERS):
                    continue
                if value is None or tuple(value.shape[1:]) != tensor.shape[1:] or value.dim() != len(tensor.shape):
                    raise _no_counterpart(tensor.name, value)
                if tuple(value.shape) != tensor.shape:
                    shapes[tensor.name] = tuple(value.shape)
                if tuple(value.shape) != tensor.shape or not _equal(value, reader.get_tensor(tensor.name)):
                    changed[tensor.name] = value
    added: dict[str, tuple[int, ...]] = {}
    if head and head not in names and not torch.equal(state[head], merged.get_input_embeddings().weight):
        changed[head], added[head] = state[head], tuple(state[head].shape)
    return PeftMerge(MergedRows(changed), shapes, added)


def _untie(model: Any) -> None:
    """Give the output embedding a weight of its own, so that merging one side leaves the other alone."""
    inner, outer = _plain(model.get_input_embeddings()), _plain(model.get_output_embeddings())
    if outer is not None and getattr(inner, "weight", None) is getattr(outer, "weight", 0):
        outer.weight = torch.nn.Parameter(outer.weight.detach().clone(), requires_grad=False)


def _plain(module: Any) -> Any:
    """Return the layer inside peft's wrappers."""
    for name in ("original_module", "base_layer"):
        while hasattr(module, name):
            module = getattr(module, name)
    return module


def _name_of_head(model: Any) -> str:
    head = model.get_output_embeddings()
    named = model.named_parameters(remove_duplicate=False)
    return next((n for n, p in named if head is not None and p is head.weight and "embed_tokens" not in n), "")


def _find(state: dict[str, torch.Tensor], name: str, prefix: str) -> torch.Tensor | None:
    value = state.get(name)
    return state.get(f"{prefix}.{name}") if value is None and prefix else value


def _equal(value: torch.Tensor, base: torch.Tensor) -> bool:
    return torch.equal(value.to(base.dtype), base)


def _no_counterpart(name: str, value: Any) -> LoralineError:
    shape = "no counterpart" if value is None else f"the shape {list(value.shape)}"
    return unsupported(
        f"Merging this adapter, after which {name} has {shape} in memory,",
        "Serve the adapter unmerged, or train other modules.",
    )
