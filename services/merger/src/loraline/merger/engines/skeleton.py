"""A model built from its config alone, without weights, against the tensors that the files hold.

Works for every architecture that transformers knows, where check/dimensions.py needs the family's names.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from loraline.merger.check.findings import Finding
from loraline.merger.check.folder import check_weights

_SHOWN = 5


def check_loading(folder: Path) -> list[Finding]:
    """Say which tensors transformers would miss or could not fit into the model that config.json describes."""
    tensors, problems = check_weights(folder)
    if not (folder / "config.json").is_file() or any(problem.severity == "error" for problem in problems):
        return []
    try:
        model = build_skeleton(folder)
        expected = _expected(model)
    except Exception as error:  # the libraries raise many kinds; each says that the config is of no use
        message = f"transformers cannot build this model: {type(error).__name__}: {str(error)[:300]}"
        return [Finding("CONFIG_NOT_LOADABLE", "error", "config.json", message, "Take the base's config.")]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {_short(name, prefix): info for name, info in tensors.items()}
    findings: list[Finding] = []
    for name, shape in expected.items():
        tensor = found.get(_short(name, prefix))
        if tensor is None:
            message = f"{name} is not in the weights; transformers would fill it with random numbers."
            findings.append(
                Finding("MISSING_TENSOR", "error", "", message, "Save the model again, or mend the config.")
            )
        elif tensor.shape != shape:
            message = f"{name} is {list(tensor.shape)} in the weights, config.json makes it {list(shape)}."
            findings.append(Finding("TENSOR_SHAPE_MISMATCH", "error", "", message, "Mend the config."))
    return findings[:_SHOWN]


def build_skeleton(folder: Path) -> Any:
    """Return the model of a folder's config with shapes and no memory behind them."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _expected(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a checkpoint must hold, under the names that checkpoints use."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tied = set()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    buffers = {name for name, _ in model.named_buffers()}
    state = {name: value for name, value in state.items() if name not in buffers}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, state).items()}


def _short(name: str, prefix: str) -> str:
    """Leave out the outermost name, which older checkpoints do not have."""
    return name.removeprefix(prefix)


def linear_weights(folder: Path, stored: frozenset[str] | None, *, routers: bool = False) -> frozenset[str]:
    """Return the weights of linear layers other than the head, under the names of the files.

    `stored` are the tensors that the files hold; None returns the model's own names, heads and routers included.
    Routers of a mixture of experts are left out unless asked for.
    """
    model = build_skeleton(folder)
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if stored is None:
        return frozenset(names)
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    left = () if routers else (".gate.weight", ".router.weight")
    kept = {name for name in names if name != f"{head}.weight" and not name.endswith(left)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return frozenset(found for name in kept for found in (name, _short(name, prefix)) if found in stored)
