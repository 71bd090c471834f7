"""Writes a model with 8-bit linear layers in the compressed-tensors format, which vLLM reads: FP8 or INT8.

Weights get one scale for each output row, from the row's greatest value, without any data; activations are quantised
by vLLM as they come, one scale for each token. So nothing needs calibrating; memory is that of the largest shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loraline.merger.engines.skeleton import linear_weights
from loraline.merger.engines.streaming import disk_error
from loraline.merger.json_files import read_json
from loraline.merger.sync import copy_base_files, write_json
from loraline.merger.weights.layout import INDEX_FILE, open_weights


@dataclass(frozen=True)
class Scheme:
    """One way of writing weights in 8 bits."""

    name: str
    dtype: torch.dtype
    greatest: float
    """Greatest magnitude that the type holds."""
    kind: str
    format: str

    def quantise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values, scales) of a matrix (out, in); scales are (out, 1), values times scales is the matrix."""
        scale = (weight.abs().amax(dim=1, keepdim=True) / self.greatest).clamp_min(torch.finfo(torch.float32).tiny)
        values = weight / scale
        values = values.round() if self.kind == "int" else values
        return values.clamp(-self.greatest, self.greatest).to(self.dtype), scale


FP8 = Scheme("FP8", torch.float8_e4m3fn, 448.0, "float", "float-quantized")
INT8 = Scheme("INT8", torch.int8, 127.0, "int", "int-quantized")


@dataclass
class QuantisedExport:
    """What was written."""

    quantised: int = 0
    size: int = 0
    greatest_error: float = 0.0
    """Greatest difference of a dequantised value from the model's."""
    shards: list[str] = field(default_factory=list)


def write_quantised(
    folder: Path, out: Path, scheme: Scheme, *, advance: Callable[[int, int], None] = lambda done, total: None
) -> QuantisedExport:
    """Write `folder` with quantised linear layers to `out`; embeddings, norms, routers and the head stay as they are.

    Raises RESOURCE_EXHAUSTED DISK_FULL.
    """
    weights = open_weights(folder)
    names = linear_weights(folder, frozenset(weights.by_name()))
    result, done, weight_map = QuantisedExport(), 0, {}
    out.mkdir(parents=True, exist_ok=True)
    copy_base_files(folder, out)
    try:
        for shard in weights.shards:
            relative = shard.path.relative_to(weights.folder).as_posix()
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(shard.path, framework="pt") as reader:
                for tensor in shard.tensors:
                    value = reader.get_tensor(tensor.name)
                    tensors.update(_written(tensor.name, value, scheme, result) if tensor.name in names else {})
                    tensors.setdefault(tensor.name, value)
                    done += tensor.size
                    advance(done, weights.data_size)
            weight_map.update(dict.fromkeys(tensors, relative))
            result.size += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, out / f"{relative}.partial", {"format": "pt"})
            os.replace(out / f"{relative}.partial", out / relative)  # noqa: PTH105 (one atomic step)
            result.shards.append(relative)
        if weights.indexed:
            index = {"metadata": {"total_size": result.size}, "weight_map": dict(sorted(weight_map.items()))}
            (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise disk_error(error, out) from error
    config = read_json(out / "config.json", "CONFIG_UNREADABLE")
    write_json(out / "config.json", {**config, "quantization_config": _config(scheme, sorted(_left(folder, names)))})
    return result


def _written(name: str, weight: torch.Tensor, scheme: Scheme, result: QuantisedExport) -> dict[str, torch.Tensor]:
    values, scale = scheme.quantise(weight.float())
    error = (values.float() * scale - weight.float()).abs().max()
    result.greatest_error = max(result.greatest_error, float(error))
    result.quantised += 1
    stored = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.float32
    return {name: values.contiguous(), f"{name}_scale": scale.to(stored)}


def _left(folder: Path, names: frozenset[str]) -> set[str]:
    """Return the linear modules that stay unquantised; vLLM must be told them."""
    every = linear_weights(folder, None)
    return {name.removesuffix(".weight") for name in every - names} | {"lm_head"}


def _config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    bits = {"num_bits": 8, "type": scheme.kind, "symmetric": True}
    weights = {**bits, "strategy": "channel", "dynamic": False}
    activations = {**bits, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
