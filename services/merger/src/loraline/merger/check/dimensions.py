"""config.json against the shapes of the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loraline.merger.check.families import GPT2_LIKE, Family, Layout, Shapes, find_layout
from loraline.merger.check.findings import Finding

CONFIG = "config.json"
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT_UP = re.compile(r"\.experts\.\d+\.(w1|up_proj)\.weight$")


def check_dimensions(config: Mapping[str, Any], tensors: Shapes) -> list[Finding]:
    """Compare every size that config.json gives with the tensors; see the codes in the README."""
    if config.get("quantization_config"):
        return []
    layout = find_layout(tensors)
    if layout is None:
        message = f"Dimensions of model type {config.get('model_type')} are not compared; its tensor names are unknown."
        return [Finding("DIMENSIONS_NOT_CHECKED", "info", CONFIG, message, "Load it once to be sure.")]
    findings = [*_simple_sizes(config, layout), *_attention(config, layout), *_layers(config, layout)]
    return [*findings, *_head(config, layout), *_experts(config, layout)]


def _simple_sizes(config: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    family = layout.family
    yield from _compare(config, "vocab_size", layout.rows, "VOCAB_SIZE_MISMATCH", "rows of the embedding")
    yield from _compare(config, family.hidden, layout.hidden, "HIDDEN_SIZE_MISMATCH", "columns of the embedding")
    intermediate = layout.intermediate
    if intermediate is not None and config.get(family.intermediate) is not None:
        where = "output rows of the first feed-forward weight"
        yield from _compare(config, family.intermediate, intermediate, "INTERMEDIATE_SIZE_MISMATCH", where)


def _compare(config: Mapping[str, Any], name: str, found: int, code: str, where: str) -> Iterator[Finding]:
    said = config.get(name)
    if said != found:
        message = f"{name} is {said}, but the weights have {found} ({where})."
        yield Finding(code, "error", CONFIG, message, f"Set {name} to {found}, or take the base's config.", True)


def head_dim(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the size of an attention head as config.json says it, given or derived; None when it cannot be told."""
    given, hidden, heads = config.get("head_dim"), config.get(family.hidden), config.get(family.heads)
    if isinstance(given, int) and given > 0:
        return given
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def _attention(config: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    family, size = layout.family, head_dim(config, layout.family)
    heads = config.get(family.heads)
    if not isinstance(heads, int) or heads < 1 or size is None:
        yield Finding("HEADS_MISSING", "error", CONFIG, f"{family.heads} is {heads}.", "Take the base's config.")
        return
    kv_heads = config.get(family.kv_heads) if family.kv_heads else None
    kv_heads = heads if kv_heads is None else kv_heads
    query, key, fused = layout.size_of(family.query), layout.size_of(family.key), layout.size_of(family.fused_query)
    remedy = "Take heads and head_dim from the base's config."
    if query is not None and query != heads * size:
        message = f"{family.heads} {heads} × head_dim {size} = {heads * size}, but {family.query} has {query} rows."
        yield Finding("ATTENTION_HEADS_MISMATCH", "error", CONFIG, message, remedy)
    elif key is not None and key != kv_heads * size:
        message = (
            f"{family.kv_heads} {kv_heads} × head_dim {size} = {kv_heads * size}, but {family.key} has {key} rows."
        )
        mendable = key % size == 0
        yield Finding("KV_HEADS_MISMATCH", "error", CONFIG, message, f"Set it to {key // size}.", mendable)
    if fused is not None and fused != (heads + 2 * kv_heads) * size:
        message = f"{heads} heads and {kv_heads} key heads of {size} do not make {fused}, as {family.fused_query} has."
        yield Finding("ATTENTION_HEADS_MISMATCH", "error", CONFIG, message, remedy)


def _layers(config: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    name, count = layout.family.layer_count, max(layout.layers) + 1
    yield from _compare(config, name, count, "LAYER_COUNT_MISMATCH", "layers in the weights")
    gaps = sorted(set(range(count)) - set(layout.layers))
    if gaps:
        message = f"The weights have no tensors of layer {gaps[0]} ({len(gaps)} such)."
        yield Finding("MISSING_LAYER", "error", "", message, "Copy the missing shard, or save the model again.")
    names = {frozenset(layer) for layer in layout.layers.values()}
    if len(names) > 1 and not config.get("layer_types") and layout.family is not GPT2_LIKE:
        every = frozenset.union(*names)
        number, layer = next((n, tensors) for n, tensors in sorted(layout.layers.items()) if every - set(tensors))
        missing = sorted(every - set(layer))[0]
        message = f"Layer {number} lacks {missing}, which other layers have."
        yield Finding(
            "MISSING_TENSOR", "warning", "", message, "Save the model again, unless its layers differ on purpose."
        )


def _head(config: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    tied, head, name = config.get("tie_word_embeddings"), layout.head, layout.family.head
    if head is None and tied is False:
        message = f"tie_word_embeddings is false, but the weights have no {name}."
        remedy = "Set tie_word_embeddings to true, if the base has it so; else save the model again."
        yield Finding("TIE_WORD_EMBEDDINGS_MISMATCH", "error", CONFIG, message, remedy)
    if head is not None and head.shape != layout.embedding.shape:
        message = f"{name} is {list(head.shape)}, the embedding is {list(layout.embedding.shape)}."
        yield Finding("LM_HEAD_MISMATCH", "error", "", message, "Save the model again; one of them was resized alone.")
    if head is not None and tied is True:
        message = f"tie_word_embeddings is true, yet the weights have {name}: some libraries use it, others do not."
        remedy = "Set tie_word_embeddings to false if the two weights differ; else remove the second."
        yield Finding("HEAD_IGNORED", "warning", CONFIG, message, remedy)


def _experts(config: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    name = next((one for one in _EXPERT_COUNTS if one in config), "")
    said = config.get(name)
    found = {
        int(match[1])
        for layer in layout.layers.values()
        for name in layer
        if (match := re.search(r"\.experts\.(\d+)\.", name))
    }
    if found and isinstance(said, int) and said != max(found) + 1:
        yield from _compare(config, name, max(found) + 1, "EXPERT_COUNT_MISMATCH", "experts in the weights")
    width = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    rows = {
        tensor.shape[0]
        for layer in layout.layers.values()
        for tensor_name, tensor in layer.items()
        if _EXPERT_UP.search(tensor_name)
    }
    if len(rows) == 1:
        yield from _compare(
            config, width, rows.pop(), "EXPERT_SIZE_MISMATCH", "output rows of an expert's first weight"
        )
    chosen = config.get("num_experts_per_tok")
    if found and isinstance(chosen, int) and chosen > max(found) + 1:
        message = f"num_experts_per_tok is {chosen}, but the weights have {max(found) + 1} experts."
        yield Finding("EXPERTS_PER_TOKEN_INVALID", "error", CONFIG, message, "Take the base's config.")
