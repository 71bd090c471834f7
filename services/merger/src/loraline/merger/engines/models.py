"""Loading models and adapters through transformers and peft, safely: no pickles, no remote code, nothing missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.model_files.objects import load_object
from loraline.merger.adapter import WEIGHTS_FILE, embedding_rows
from loraline.merger.weights.header import plain_weights, read_header


def load_causal_lm(folder: Path, dtype: torch.dtype | str, *, gguf_file: str = "") -> Any:
    """Load a model folder, or one GGUF file in it, for evaluation; `dtype` may be `auto` for the stored type.

    Raises FAILED_PRECONDITION (MODEL_NOT_LOADABLE) when transformers cannot load it or had to invent weights.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_without_leftover(folder),
            **({"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}),
        )
    except Exception as error:  # the library raises many kinds; each means that the folder is of no use
        raise not_loadable(folder, f"{type(error).__name__}: {error}") from error
    model, info = loaded
    invented = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if invented:
        raise not_loadable(folder, f"transformers found no fitting weights for {invented[0]} ({len(invented)} in all)")
    return model.eval()


def _without_leftover(folder: Path) -> dict[str, Any]:
    """Return a config to load by where the folder's own calls plain weights quantised, else nothing."""
    config = load_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = sorted(folder.glob("*.safetensors"))
    if not config.get("quantization_config") or not files:
        return {}
    if not plain_weights(tensor for file in files for tensor in read_header(file).tensors):
        return {}
    own = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    delattr(own, "quantization_config")
    return {"config": own}


def not_loadable(folder: Path, reason: str) -> LoralineError:
    """FAILED_PRECONDITION for a folder that transformers does not take."""
    return failed_precondition(
        "MODEL_NOT_LOADABLE",
        f"transformers cannot load the model in {folder.name}: {reason[:600]}. CheckModel says what does not fit.",
    )


def attach_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Return the model with all adapters active, each scaled by its weight; a weighted sum, nothing merged."""
    names = [f"adapter_{number}" for number in range(len(adapters))]
    _make_room(model, [folder for folder, _ in adapters])
    try:
        first = str(adapters[0][0])
        peft_model: Any = PeftModel.from_pretrained(model, first, adapter_name=names[0], use_safetensors=True)
        for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
            peft_model.load_adapter(str(folder), name, use_safetensors=True)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise failed_precondition(
            "ADAPTER_NOT_LOADABLE",
            f"peft cannot put the adapter on this base: {type(error).__name__}: {str(error)[:600]}. "
            "Merge it into the base it was trained on.",
        ) from error
    if len(names) > 1:
        peft_model.base_model.set_adapter(names)
    for name, (_, weight) in zip(names, adapters, strict=True):
        if weight != 1:
            _scale(peft_model, name, weight)
    return peft_model.eval()


def _make_room(model: Any, adapters: Sequence[Path]) -> None:
    """Grow the embeddings for adapters that trained added tokens and bring the rows along."""
    rows = max(embedding_rows(read_header(folder / WEIGHTS_FILE)) for folder in adapters)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _scale(model: Any, adapter: str, weight: float) -> None:
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            scaling[adapter] *= weight
