"""Which base tensor gets which adapter factors, and by which path the merge goes. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from loraline.core.errors import LoralineError, failed_precondition, unsupported
from loraline.merger.adapter import Adapter, Factors, read_json
from loraline.merger.weights.header import FLOAT_DTYPES, TensorInfo
from loraline.merger.weights.layout import WeightFiles

DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Requested type -> the format's type name."""

# Modules that transformers builds as Conv1D, whose weight is stored as (in, out). peft decides by the module's class
# and overrides fan_in_fan_out by it; a folder of files has no classes, so the model type decides here.
_CONV1D_MODULES = {
    "gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"}),
    "openai-gpt": frozenset({"c_attn", "c_proj", "c_fc"}),
}


@dataclass(frozen=True)
class Addition:
    """One product of factors to add to a base tensor; `transposed` for weights stored as (in, out)."""

    adapter: int
    factors: Factors
    scale: float
    transposed: bool


@dataclass(frozen=True)
class MergePlan:
    """What the merge will do."""

    streaming: bool
    reason: str
    additions: dict[str, tuple[Addition, ...]]
    """Base tensor -> what is added to it; only for the streaming path."""
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
    if config.get("quantization_config"):
        raise failed_precondition(
            "QUANTIZED_BASE",
            "The base is quantised (config.json has quantization_config). Merge into the model it was made from.",
            file="config.json",
        )
    tensors = weights.by_name()
    _refuse_tied(config, tensors, adapters)
    dtypes = new_dtypes(tensors, dtype)
    why_peft = next((adapter.peft_only_because for adapter, _ in adapters if adapter.peft_only_because), "")
    if not why_peft:
        unmapped = next((f.module for a, _ in adapters for f in a.factors if not find_weight(f.module, tensors)), "")
        fused = unmapped and _has_fused_names(unmapped, tensors)
        if unmapped and not fused:
            raise no_such_module(unmapped)
        why_peft = f"the base stores {unmapped} under other names" if fused else ""
    if why_peft:
        if len(adapters) > 1 or adapters[0][1] != 1:
            raise unsupported(f"Combining adapters where {why_peft}", "Merge that adapter alone, with weight 1.")
        return MergePlan(False, why_peft, {}, dtypes)
    additions = _additions(str(config.get("model_type")), tensors, adapters)
    many = f", weighted sum of {len(adapters)} adapters" if len(adapters) > 1 else ""
    return MergePlan(True, f"plain LoRA on {len(additions)} tensors{many}", additions, dtypes)


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
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in tensors:
            return name
    return ""


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


def _refuse_tied(
    config: dict[str, object], tensors: dict[str, TensorInfo], adapters: Sequence[tuple[Adapter, float]]
) -> None:
    embedding_leaves = ("lm_head", "embed_tokens", "wte", "embed_out")
    tied = bool(config.get("tie_word_embeddings")) or not {"lm_head.weight", "embed_out.weight"} & set(tensors)
    for adapter, _ in adapters:
        touched = [leaf for leaf in embedding_leaves if adapter.touches(leaf)]
        if touched and tied:
            raise unsupported(
                f"Merging an adapter that trains {touched[0]} into a base with tied embeddings",
                "One weight serves as input and as output there, so a merge would change the other side too. "
                f"Train without {touched[0]}, or serve the adapter unmerged.",
            )


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
    what["scales"] = [[name, [a.scale for a in adds]] for name, adds in sorted(plan.additions.items())]
    return json.dumps(what, sort_keys=True)
