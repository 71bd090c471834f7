"""An adapter's folder, read and checked before anything is merged. No torch here."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from loraline.api.artifact.v1.artifact_pb2 import Artifact
from loraline.core.errors import LoralineError, failed_precondition
from loraline.merger.json_files import read_json
from loraline.merger.weights.header import ShardHeader, read_header
from loraline.merger.weights.layout import PICKLE_SUFFIXES, pickle_weights

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
BASE_FILE = "base_model.json"
_PREFIX = "base_model.model."
_MAGNITUDE = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?$")
_LORA_PART = re.compile(r"\.lora_|\.base_layer\.|trainable_tokens")
_EMBEDDING = re.compile(
    r"\.(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|lm_head|embed_out)(\.base_layer)?\.weight$"
)
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")

# Settings of peft's LoraConfig that change nothing about what `scale * B @ A` means. Any other setting with a value
# changes what the adapter computes, so the merge is then left to peft, which knows it.
_NEUTRAL_SETTINGS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
_UNSEEN = "a damaged weight would show in the measured answers only: import the base to have every byte compared"
_NEUTRAL_STARTS = ("gaussian", "eva")
"""Named initialisations that leave the base as it is."""


@dataclass(frozen=True)
class Factors:
    """The two factors of one module: names of its tensors in the adapter's file, and the scale of their product."""

    module: str
    a_key: str
    b_key: str
    rank: int
    in_features: int
    out_features: int
    scale: float
    magnitude_key: str = ""
    """DoRA's trained lengths of the output rows."""


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder."""

    folder: Path
    config: Mapping[str, Any]
    header: ShardHeader
    factors: tuple[Factors, ...]
    peft_only_because: str
    """Why only peft can merge it; empty when the streaming merge can."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Tensor of the model -> tensor of the adapter that takes its place: `modules_to_save`, trained biases."""

    @property
    def recorded_base(self) -> dict[str, Any]:
        """Return base_model.json; empty for an adapter from elsewhere."""
        path = self.folder / BASE_FILE
        return read_json(path, "ADAPTER_UNREADABLE") if path.exists() else {}

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of one of the adapter's tensors."""
        return next(tensor.shape for tensor in self.header.tensors if tensor.name == key)

    def touches(self, leaf: str) -> bool:
        """Whether a module called `leaf`, such as `lm_head`, is trained in any way."""
        return any(leaf in tensor.name.split(".") for tensor in self.header.tensors)


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's config and the header of its weights.

    Raises FAILED_PRECONDITION (PICKLE_WEIGHTS, NO_ADAPTER, ADAPTER_UNREADABLE, ADAPTER_RANK_MISMATCH,
    ADAPTER_INCOMPLETE) or DATA_LOSS (CORRUPT_WEIGHTS).
    """
    weights = folder / WEIGHTS_FILE
    if not weights.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES and "adapter" in p.name)
        if pickles:
            raise pickle_weights(pickles[0])
        raise failed_precondition("NO_ADAPTER", f"The adapter has no {WEIGHTS_FILE}.", file=WEIGHTS_FILE)
    config = read_json(folder / CONFIG_FILE, "ADAPTER_UNREADABLE")
    header = read_header(weights)
    reason = peft_only_reason(config, header)
    factors = () if reason else _pair(header, config)
    whole = {
        tensor.name.removeprefix(_PREFIX): tensor.name
        for tensor in header.tensors
        if not _LORA_PART.search(tensor.name)
    }
    return Adapter(folder, config, header, factors, reason, whole)


def peft_only_reason(config: Mapping[str, Any], header: ShardHeader) -> str:
    """Say why `scale * B @ A` is not the whole of this adapter; empty when it is."""
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _NEUTRAL_STARTS:
        return f"init_lora_weights is {start}, which may change the base too"
    extra = sorted(name for name, value in config.items() if value and name not in _NEUTRAL_SETTINGS)
    if extra:
        return f"{extra[0]} is set"
    parts = [tensor.name for tensor in header.tensors if _LORA_PART.search(tensor.name)]
    other = [name for name in parts if not (_FACTOR.match(name) or _MAGNITUDE.match(name)) or ".base_layer." in name]
    return f"{other[0]} is more than a factor of a linear layer" if other else ""


def trained_quantised(artifact: Artifact) -> str:
    """Return how the adapter's manifest says that its base was quantised in training, such as `nf4`; empty for not."""
    value = str(MessageToDict(artifact.facts).get("quantization") or "")
    if not value:
        parameters = MessageToDict(artifact.settings).get("parameters")
        value = str(parameters.get("quantization") or "") if isinstance(parameters, dict) else ""
    value = value.lower().removeprefix("quantization_")
    return "" if value in ("", "none", "auto", "unspecified") else value


def _pair(header: ShardHeader, config: Mapping[str, Any]) -> tuple[Factors, ...]:
    sides: dict[str, dict[str, Any]] = {}
    for tensor in header.tensors:
        match = _FACTOR.match(tensor.name)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        elif magnitude := _MAGNITUDE.match(tensor.name):
            sides.setdefault(magnitude["module"], {})["magnitude"] = tensor
    return tuple(_factors(module, found, config) for module, found in sides.items())


def _factors(module: str, found: Mapping[str, Any], config: Mapping[str, Any]) -> Factors:
    wanted = ["A", "B", "magnitude"] if config.get("use_dora") else ["A", "B"]
    missing = next((side for side in wanted if side not in found), "").replace("magnitude", "magnitude_vector")
    if missing:
        raise failed_precondition(
            "ADAPTER_INCOMPLETE",
            f"{WEIGHTS_FILE} has no lora_{missing} for {module}. Save the adapter again.",
            file=WEIGHTS_FILE,
            module=module,
        )
    a, b = found["A"], found["B"]
    rank = pattern_value(config.get("rank_pattern") or {}, module, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise failed_precondition(
            "ADAPTER_RANK_MISMATCH",
            f"{module}: {CONFIG_FILE} says rank {rank}, the factors are {list(a.shape)} and {list(b.shape)}. "
            "Config and weights are of different runs; take both from one.",
            file=WEIGHTS_FILE,
            module=module,
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = found["magnitude"].name if "magnitude" in found else ""
    return Factors(module, a.name, b.name, rank, a.shape[1], b.shape[0], scale, magnitude)


def embedding_rows(header: ShardHeader) -> int:
    """Return the rows of the embeddings that an adapter saved whole; 0 when it saved none.

    More than the base has means added tokens: only an adapter that brings their rows can be attached or merged.
    """
    whole = [t for t in header.tensors if _EMBEDDING.search(t.name) and len(t.shape) == 2]
    return max((tensor.shape[0] for tensor in whole), default=0)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as peft does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def check_base(adapter: Adapter, *, name: str, base: Path, base_digest: str) -> list[str]:
    """Refuse an adapter that was trained on another base; return remarks about what could not be compared.

    Compares the digest of the base artifact, else the digest of config.json. Raises FAILED_PRECONDITION
    ADAPTER_OF_ANOTHER_BASE.
    """
    recorded = adapter.recorded_base
    if not recorded:
        return [f"{name} has no {BASE_FILE}: only its shapes tell that it belongs to this base"]
    if recorded.get("digest") and base_digest:
        if recorded["digest"] == base_digest:
            return []
        # The same weights may have been published anew with another tokenizer; only an equal digest proves anything.
        raise another_base(name, str(recorded.get("ref") or recorded["digest"]), recorded["digest"], base_digest)
    config_digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    if recorded.get("config_sha256"):
        if recorded["config_sha256"].removeprefix("sha256:") != config_digest:
            raise another_base(name, _describe(recorded), recorded["config_sha256"], config_digest)
        return [f"{name}: its base was compared by config.json and shapes, as one of the two is no artifact; {_UNSEEN}"]
    return [f"{name}: {BASE_FILE} holds no digest, only shapes were compared; {_UNSEEN}"]


def _describe(recorded: Mapping[str, Any]) -> str:
    return str(recorded.get("ref") or recorded.get("hub_id") or recorded.get("path") or "another base")


def another_base(name: str, trained_on: str, expected: str, found: str) -> LoralineError:
    """FAILED_PRECONDITION that names both bases."""
    return failed_precondition(
        "ADAPTER_OF_ANOTHER_BASE",
        f"{name} was trained on {trained_on} ({expected}), not on this base ({found}). "
        "Merge it into the base it was trained on: leave base_model unset.",
        adapter=name,
        expected=str(expected),
        found=found,
    )
