"""Which base tensor gets which adapter factors, and by which path the merge goes. No torch here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loraline.core.errors import LoralineError, failed_precondition, unsupported
from loraline.merger.adapter import Adapter, Factors
from loraline.merger.json_files import read_json
from loraline.merger.weights.header import FLOAT_DTYPES, TensorInfo, plain_weights
from loraline.merger.weights.layout import WeightFiles

DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Requested type -> the format's type name."""

# Modules that transformers builds as Conv1D, whose weight is stored as (in, out). peft decides by the module's class
# and overrides fan_in_fan_out by it; a folder of files has no classes, so the model type decides here.
_CONV1D_MODULES = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
}


_EMBEDDING_LEAVES = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings")
_HEADS = {"lm_head.weight", "embed_out.weight"}


@dataclass(frozen=True)
class Addition:
    """One product of factors to add to a base tensor; `transposed` for weights stored as (in, out)."""

    adapter: int
    factors: Factors
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Replacement:
    """A tensor that an adapter saved whole."""

    adapter: int
    key: str


@dataclass(frozen=True)
class MergePlan:
    """What the merge will do."""

    streaming: bool
    reason: str
    additions: dict[str, tuple[Addition, ...]]
    """Base tensor -> what is added to it; only for the streaming path."""
    replacements: dict[str, Replacement]
    """Base tensor -> what takes its place; only for the streaming path."""
    dtypes: dict[str, str]
    """Base tensor -> new type, for those that change theirs."""

    @property
    def merge_path(self) -> str:
        """The path and why, as MergeResult says it."""
        return f"{'streaming' if self.streaming else 'peft'}: {self.reason}"


def make_plan(weights: WeightFiles, adapters: Sequence[tuple[Adapter, float]], dtype: str) -> MergePlan:
    """Plan the merge of weighted adapters into a base; `dtype` is bf16, fp16, fp32 or empty for the base's own.

    Raises FAILED_PRECONDITION (QUANTIZED_BASE, ADAPTER_SHAPE_MISMATCH, ADAPTER_OF_ANOTHER_BASE) or UNIMPLEMENTED.
    """
    config = read_json(weights.folder / "config.json", "CONFIG_UNREADABLE")
    tensors, model_type = weights.by_name(), str(config.get("model_type"))
    # Left over beside plain weights it is repaired in the merged copy.
    if config.get("quantization_config") and not plain_weights(tensors.values()):
        raise failed_precondition(
            "QUANTIZED_BASE",
            "The base is quantised (config.json has quantization_config). Merge into the model it was made from.",
            file="config.json",
        )
    dtypes = new_dtypes(tensors, dtype)
    why_peft = _why_peft(config, tensors, adapters)
    kinds = sorted({kind for adapter, _ in adapters for kind in _kinds(adapter)})
    if (why_peft or kinds) and (len(adapters) > 1 or adapters[0][1] != 1):
        why = why_peft or f"{kinds[0]} cannot be summed"
        raise unsupported(f"Combining adapters where {why}", "Merge that adapter alone, with weight 1.")
    if why_peft:
        return MergePlan(False, why_peft, {}, {}, dtypes)
    additions = _additions(model_type, tensors, adapters)
    replacements = _replacements(tensors, [adapter for adapter, _ in adapters])
    what = f"{' and '.join(kinds) or 'plain LoRA'} on {len(additions.keys() | replacements.keys())} tensors"
    many = f", weighted sum of {len(adapters)} adapters" if len(adapters) > 1 else ""
    return MergePlan(True, what + many, additions, replacements, dtypes)


def _kinds(adapter: Adapter) -> list[str]:
    """Name what the adapter holds besides plain factors; none of it can be weighted or summed."""
    kinds = ["DoRA"] if any(factors.magnitude_key for factors in adapter.factors) else []
    return kinds + (["whole tensors"] if adapter.whole else [])


def _why_peft(
    config: dict[str, object], tensors: dict[str, TensorInfo], adapters: Sequence[tuple[Adapter, float]]
) -> str:
    """Say why the files alone do not suffice for this merge; empty when they do."""
    for adapter, _ in adapters:
        if adapter.peft_only_because:
            return adapter.peft_only_because
        touched = next((leaf for leaf in _EMBEDDING_LEAVES if adapter.touches(leaf)), "")
        if touched and is_tied(config, tensors):
            return f"{touched} is trained and the base's input and output embedding are one weight"
        for name in adapter.whole:
            found = find_tensor(name, tensors)
            if not found or not tensors[found].shape or tensors[found].shape != adapter.shape_of(adapter.whole[name]):
                return f"{name} is trained whole and the base has it in another shape or not at all"
        unmapped = next((f.module for f in adapter.factors if not find_weight(f.module, tensors)), "")
        if unmapped and not _has_fused_names(unmapped, tensors):
            raise no_such_module(unmapped)
        if unmapped:
            return f"the base stores {unmapped} under other names"
        conv1d = _CONV1D_MODULES.get(str(config.get("model_type")), frozenset())
        if any(f.magnitude_key and f.module.rpartition(".")[2] in conv1d for f in adapter.factors):
            return "DoRA on weights stored as (in, out) needs whole columns"
    return ""


def _replacements(tensors: dict[str, TensorInfo], adapters: Sequence[Adapter]) -> dict[str, Replacement]:
    return {
        find_tensor(name, tensors): Replacement(number, key)
        for number, adapter in enumerate(adapters)
        for name, key in adapter.whole.items()
    }


def new_dtypes(tensors: dict[str, TensorInfo], dtype: str) -> dict[str, str]:
    """Return the tensors that change their type for a requested `dtype`; none when it is empty."""
    if not dtype:
        return {}
    wanted = DTYPE_NAMES[dtype]
    return {t.name: wanted for t in tensors.values() if t.dtype in FLOAT_DTYPES and t.dtype != wanted}


def find_weight(module: str, tensors: dict[str, TensorInfo]) -> str:
    """Return the name of a module's weight in the base, or nothing.

    Older checkpoints leave out the outermost name (`transformer.h.0…` is stored as `h.0…`), as from_pretrained allows.
    """
    return find_tensor(f"{module}.weight", tensors)


def find_tensor(name: str, tensors: dict[str, TensorInfo]) -> str:
    """Return the base's own name of a tensor of the model, or nothing."""
    return next((one for one in (name, name.partition(".")[2]) if one in tensors), "")


def _has_fused_names(module: str, tensors: dict[str, TensorInfo]) -> bool:
    """Whether the base has other tensors in the module's block: then names differ, rather than the model."""
    block = module.rpartition(".")[0]
    return bool(block) and any(name.startswith(f"{block}.") for name in tensors)


def _additions(
    model_type: str, tensors: dict[str, TensorInfo], adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, tuple[Addition, ...]]:
    additions: dict[str, tuple[Addition, ...]] = {}
    conv1d = _CONV1D_MODULES.get(model_type, frozenset())
    for number, (adapter, weight) in enumerate(adapters):
        for factors in adapter.factors:
            name = find_weight(factors.module, tensors)
            transposed = factors.module.rpartition(".")[2] in conv1d
            tensor = tensors[name]
            shape = (factors.out_features, factors.in_features)
            if tensor.shape != (shape[::-1] if transposed else shape):
                raise shape_mismatch(factors, tensor)
            if tensor.dtype not in FLOAT_DTYPES:
                raise failed_precondition(
                    "QUANTIZED_BASE",
                    f"{name} is stored as {tensor.dtype}. Merge into the 16-bit model that the base was made from.",
                    tensor=name,
                )
            scale = factors.scale if weight == 1 else factors.scale * weight
            additions[name] = (*additions.get(name, ()), Addition(number, factors, scale, transposed))
    return additions


def is_tied(config: Mapping[str, object], tensors: Collection[str]) -> bool:
    """Whether one weight serves as input and as output embedding."""
    return bool(config.get("tie_word_embeddings")) or not _HEADS & set(tensors)


def no_such_module(module: str) -> LoralineError:
    """FAILED_PRECONDITION for an adapter's module that the base lacks."""
    return failed_precondition(
        "ADAPTER_OF_ANOTHER_BASE",
        f"The adapter trains {module}, which the base does not have. Merge it into the base it was trained on.",
        module=module,
    )


def shape_mismatch(factors: Factors, tensor: TensorInfo) -> LoralineError:
    """FAILED_PRECONDITION for factors that do not fit."""
    return failed_precondition(
        "ADAPTER_SHAPE_MISMATCH",
        f"The adapter's product for {factors.module} is {[factors.out_features, factors.in_features]}, the base's "
        f"{tensor.name} is {list(tensor.shape)}. The adapter is of another base; merge it into its own.",
        module=factors.module,
        tensor=tensor.name,
    )


def stored_dtype(weights: WeightFiles) -> str:
    """Return the type of most of the weights' bytes, as bf16, fp16 or fp32; others as the format writes them."""
    sizes: dict[str, int] = {}
    for _, tensor in weights.tensors():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    greatest = max(sizes, key=lambda name: sizes[name]) if sizes else ""
    return {written: name for name, written in DTYPE_NAMES.items()}.get(greatest, greatest)


def plan_fingerprint(plan: MergePlan, inputs: Sequence[str]) -> str:
    """Return a text that is equal only for the same merge of the same inputs; guards the resume after a kill."""
    what = {"path": plan.merge_path, "inputs": list(inputs), "dtypes": sorted(set(plan.dtypes.values()))}
    what["whole"] = sorted(plan.replacements)
    what["scales"] = [[name, [a.scale for a in adds]] for name, adds in sorted(plan.additions.items())]
    return json.dumps(what, sort_keys=True)
