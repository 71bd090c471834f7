"""What an adapter must be before the engine sees it: the engine would crash on it, or serve something else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraline.core.errors import LoralineError, failed_precondition
from loraline.inference.adapters.safetensors import folder_shapes, shapes
from loraline.inference.base_model import LocalBase

_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight$")
_REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
}


@dataclass(frozen=True)
class AdapterFacts:
    """What the checks read."""

    rank: int
    """Greatest rank of any module."""
    target_modules: tuple[str, ...]
    """Last names of the adapted modules."""


def check_adapter(folder: Path, base: LocalBase, max_rank: int) -> AdapterFacts:
    """Return the adapter's facts, or refuse it with FAILED_PRECONDITION and a reason of its own. Blocking, no torch."""
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in _PICKLES)
    if pickles:
        message = f"The adapter holds {pickles[0]}, a pickle, which can run any code. Save it as safetensors."
        raise failed_precondition("ADAPTER_HAS_PICKLE", message, file=pickles[0])
    config = _config(folder)
    _check_settings(config)
    factors = _factors(folder)
    rank = _check_ranks(factors, config, max_rank)
    _check_base(folder, base)
    _check_shapes(factors, base)
    return AdapterFacts(rank, tuple(sorted({module.rpartition(".")[2] for module in factors})))


Factors = dict[str, dict[str, tuple[int, ...]]]


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"adapter_config.json cannot be read: {error}. Train or publish the adapter again."
        raise failed_precondition("ADAPTER_INCOMPLETE", message, file="adapter_config.json") from error
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        message = "adapter_config.json does not describe a LoRA adapter (peft_type LORA); only those are served."
        raise failed_precondition("ADAPTER_NOT_LORA", message)
    return content


def _check_settings(config: dict[str, Any]) -> None:
    saved = config.get("modules_to_save")
    if saved:
        message = (
            f"The adapter brings whole modules of its own (modules_to_save: {', '.join(map(str, saved))}), which "
            "cannot be put on a running model. Train without them, or merge the adapter and serve the model."
        )
        raise failed_precondition("ADAPTER_SAVES_MODULES", message, modules=", ".join(map(str, saved)))
    for name, what in _REFUSED_SETTINGS.items():
        if config.get(name):
            message = f"The adapter uses {what} ({name}), which the engine cannot serve. Merge it and serve the model."
            raise failed_precondition("ADAPTER_NOT_SERVABLE", message, setting=name)
    if config.get("bias") not in (None, "none"):
        message = f"The adapter trained biases (bias: {config['bias']}). Train with bias none, or merge it."
        raise failed_precondition("ADAPTER_NOT_SERVABLE", message, setting="bias")


def _factors(folder: Path) -> Factors:
    file = folder / _WEIGHTS
    if not file.is_file():
        message = f"The adapter has no {_WEIGHTS}. Train or publish it again."
        raise failed_precondition("ADAPTER_INCOMPLETE", message, file=_WEIGHTS)
    factors: Factors = {}
    for name, shape in shapes(file).items():
        match = _FACTOR.match(name)
        if match is None or len(shape) != 2:
            message = (
                f"The adapter's weights hold {name}, which is no LoRA factor; a resized embedding, perhaps. "
                "Merge the adapter and serve the model."
            )
            raise failed_precondition("ADAPTER_NOT_SERVABLE", message, tensor=name)
        factors.setdefault(match["module"], {})[match["side"]] = shape
    broken = next((module for module, sides in factors.items() if set(sides) != {"A", "B"}), None)
    if broken is not None or not factors:
        message = f"The adapter's weights are incomplete at {broken or 'every module'}. Train or publish it again."
        raise failed_precondition("ADAPTER_INCOMPLETE", message, module=broken or "")
    return factors


def _check_ranks(factors: Factors, config: dict[str, Any], max_rank: int) -> int:
    found = {module: sides["A"][0] for module, sides in factors.items()}
    module, rank = max(found.items(), key=lambda item: item[1])
    if rank > max_rank:
        message = (
            f"The adapter has rank {rank} at {module}; this server takes at most {max_rank}. "
            "Raise LORALINE_INFERENCE_MAX_LORA_RANK, train with a smaller rank, or merge the adapter."
        )
        raise failed_precondition("RANK_TOO_HIGH", message, rank=str(rank), max_lora_rank=str(max_rank))
    for module, value in found.items():
        said = _rank_said(module, config)
        if value != said:
            message = (
                f"adapter_config.json says rank {said} at {module}, the weights have {value}. They are of different "
                "runs."
            )
            raise failed_precondition("ADAPTER_RANK_MISMATCH", message)
    return rank


def _rank_said(module: str, config: dict[str, Any]) -> Any:
    """Return the rank that the settings give a module: a pattern's that names it, as PEFT reads them, else `r`."""
    patterns = config.get("rank_pattern")
    for pattern, rank in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return rank
        except re.error as error:
            message = f"rank_pattern in adapter_config.json holds {pattern!r}, which is no pattern: {error}."
            raise failed_precondition("ADAPTER_RANK_MISMATCH", message) from error
    return config.get("r")


def _check_base(folder: Path, base: LocalBase) -> None:
    """Compare base_model.json with the served base; an adapter without one is left to the shapes and the proof.

    The tokenizers are compared by what they do: the token receipt's rows must render to equal ids.
    """
    file = folder / "base_model.json"
    if not file.is_file():
        return
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"base_model.json cannot be read: {error}. Train or publish the adapter again."
        raise failed_precondition("ADAPTER_INCOMPLETE", message, file=file.name) from error
    pairs = {
        "digest": (recorded.get("digest"), base.digest),
        "config_sha256": (recorded.get("config_sha256"), base.config_sha256),
    }
    for what, (trained_on, served) in pairs.items():
        if not trained_on or not served:
            continue
        if str(trained_on).removeprefix("sha256:") != served.removeprefix("sha256:"):
            name = recorded.get("ref") or recorded.get("hub_id") or recorded.get("path") or "another base"
            raise _other_base(str(name), base.described, what, str(trained_on), served)
        if what == "digest":
            return  # equal content: the other digests are parts of it


def _other_base(trained_on: str, served: str, what: str, expected: str, found: str) -> LoralineError:
    message = (
        f"The adapter was trained on {trained_on}, but {served} is served: their {what} differs. "
        f"Serve its own base with LoadModel, or train on {served}."
    )
    return failed_precondition("ADAPTER_OF_ANOTHER_BASE", message, compared=what, expected=expected, found=found)


def _check_shapes(factors: Factors, base: LocalBase) -> None:
    if base.config.get("quantization_config"):
        return  # packed weights have other shapes than the modules they stand for
    known = folder_shapes(base.folder)
    roots = {name.partition(".")[0] for name in known}
    for module, sides in factors.items():
        weight = known.get(f"{module}.weight")
        if weight is None and module == "lm_head":
            weight = _tied_output(base)
        if weight is None:
            if module.partition(".")[0] not in roots:
                continue  # the base's file names its modules otherwise; the proof decides
            message = f"The adapter changes {module}, which {base.described} does not have. It is of another base."
            raise failed_precondition("ADAPTER_OF_ANOTHER_BASE", message, module=module)
        # Some architectures (GPT-2's Conv1D) keep their matrices transposed.
        if (sides["B"][0], sides["A"][1]) not in (weight, weight[::-1]):
            message = (
                f"The adapter's {module} is for a matrix of {sides['B'][0]} x {sides['A'][1]}; {base.described} has "
                f"{weight[0]} x {weight[1]}: another base, or a resized vocabulary."
            )
            raise failed_precondition("ADAPTER_OF_ANOTHER_BASE", message, module=module)


def _tied_output(base: LocalBase) -> tuple[int, ...] | None:
    """Return the shape of an output layer whose weights are the input embedding's; None where it has its own."""
    config = {**base.config, **(base.config.get("text_config") or {})}
    sizes = config.get("vocab_size"), config.get("hidden_size")
    tied = config.get("tie_word_embeddings")
    return (int(sizes[0]), int(sizes[1])) if tied and sizes[0] and sizes[1] else None
