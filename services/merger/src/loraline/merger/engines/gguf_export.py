"""Writes a model as one GGUF file, a tensor at a time, and reads it back to compare every tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open

from loraline.core.errors import LoralineError, failed_precondition, unsupported
from loraline.merger.check.families import find_layout
from loraline.merger.engines.gguf_names import Sizes, gguf_name, read_sizes, reorder, rope_factors
from loraline.merger.engines.gguf_vocabulary import Vocabulary, read_vocabulary
from loraline.merger.engines.streaming import disk_error
from loraline.merger.json_files import read_json
from loraline.merger.weights.layout import WeightFiles, open_weights

F16, Q8_0 = "F16", "Q8_0"
BLOCK = 32
"""Values that share a scale in Q8_0."""
_STEPS = 0.5 + 127 * 2.0**-11
"""Greatest rounding error of Q8_0 in steps of a block's scale: half a step, and on up to 127 steps the rounding of the
scale itself to 16 bits, at most 2**-11 of it."""


@dataclass(frozen=True)
class Written:
    """What was written and read back."""

    tensors: int
    size: int
    greatest_error: float
    """Greatest difference of a value from the model's, over all tensors."""


def write_gguf(
    folder: Path,
    target: Path,
    kind: str,
    *,
    name: str,
    add_bos: bool | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `folder` as GGUF to `target`, matrices as `kind` (F16 or Q8_0), vectors as 32-bit floats; compare all.

    `add_bos` says whether the runtime shall put the begin token first; None means what the tokenizer does.

    Raises UNIMPLEMENTED for what GGUF or llama.cpp cannot take, EXPORT_DIFFERS when reading back gives other values,
    RESOURCE_EXHAUSTED DISK_FULL. `target` exists only when all is well.
    """
    gguf = _library()
    weights = open_weights(folder)
    config = read_json(folder / "config.json", "CONFIG_UNREADABLE")
    sizes, layout = read_sizes(config), find_layout(weights.by_name())
    if layout is None:
        raise unsupported("A GGUF of a model without an embedding", "Check the folder with CheckModel.")
    vocabulary = read_vocabulary(folder, layout.rows)
    if add_bos is not None:
        vocabulary = replace(vocabulary, add_bos=add_bos)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(str(partial), sizes.architecture)
    try:
        _write_metadata(writer, gguf, sizes, vocabulary, kind, name)
        _announce(writer, gguf, weights, sizes, kind)
        _write_tensors(writer, gguf, weights, sizes, kind, advance)
        greatest = compare_gguf(partial, weights, sizes, kind)
        os.replace(partial, target)  # noqa: PTH105 (one atomic step)
    except OSError as error:
        raise disk_error(error, target.parent) from error
    finally:
        partial.unlink(missing_ok=True)
    return Written(len(weights.by_name()), target.stat().st_size, greatest)


def _write_tensors(
    writer: Any, gguf: Any, weights: WeightFiles, sizes: Sizes, kind: str, advance: Callable[[int, int], None]
) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done = 0
    for _, values, stored in _tensors(weights, sizes, kind):
        writer.write_tensor_data(_encode(gguf, values, stored))
        done += values.nbytes // 2
        advance(min(done, weights.data_size), weights.data_size)
    writer.close()


def compare_gguf(path: Path, weights: WeightFiles, sizes: Sizes, kind: str) -> float:
    """Read a GGUF file back and hold each tensor against the model's; return the greatest difference of a value."""
    gguf = _library()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    greatest = 0.0
    for name, values, stored in _tensors(weights, sizes, kind):
        tensor = found.pop(name, None)
        if tensor is None or list(tensor.shape) != list(reversed(values.shape)):
            raise _differs(name, "missing" if tensor is None else f"of shape {list(tensor.shape)}")
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        error = numpy.abs(back.astype(numpy.float32) - values)
        if not bool((error <= _allowed(values, stored)).all()):
            raise _differs(name, f"off by {float(error.max()):.3g}")
        greatest = max(greatest, float(error.max(initial=0.0)))
    if found:
        raise _differs(next(iter(found)), "not of the model")
    return greatest


def _allowed(values: numpy.ndarray, stored: str) -> Any:
    if stored == Q8_0:
        blocks = numpy.abs(values).reshape(-1, BLOCK).max(axis=1, keepdims=True) / 127 * _STEPS
        return (numpy.broadcast_to(blocks, (blocks.shape[0], BLOCK)) + 127 * 2.0**-24).reshape(values.shape)
    if stored == F16:
        return numpy.abs(values) * 2.0**-11 + 2.0**-24
    return 0.0


def _tensors(weights: WeightFiles, sizes: Sizes, kind: str) -> Iterator[tuple[str, numpy.ndarray, str]]:
    """Yield GGUF's name, the values in 32 bits in GGUF's order, and the stored type; one tensor in memory at a time."""
    for shard in weights.shards:
        with safe_open(shard.path, framework="pt") as reader:
            for tensor in shard.tensors:
                name = gguf_name(tensor.name)
                values = reader.get_tensor(tensor.name).to(torch.float32).numpy()
                yield name, reorder(name, values, sizes), stored_type(tensor.shape, kind)
    factors = rope_factors(sizes)
    if factors is not None:
        yield "rope_freqs.weight", factors, "F32"


def stored_type(shape: tuple[int, ...], kind: str) -> str:
    """Return the type a tensor is stored as: vectors stay 32-bit floats, rows that no block divides 16-bit."""
    if len(shape) < 2:
        return "F32"
    return F16 if kind == Q8_0 and shape[-1] % BLOCK else kind


def _encode(gguf: Any, values: numpy.ndarray, stored: str) -> numpy.ndarray:
    if stored == Q8_0:
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    if stored == F16 and float(numpy.abs(values).max(initial=0.0)) > numpy.finfo(numpy.float16).max:
        raise unsupported("A 16-bit GGUF of weights above 65504", "Export as Q8_0, or serve the model with inference.")
    return values.astype(numpy.float16 if stored == F16 else numpy.float32)


def _announce(writer: Any, gguf: Any, weights: WeightFiles, sizes: Sizes, kind: str) -> None:
    shapes = [(gguf_name(t.name), t.shape, stored_type(t.shape, kind)) for _, t in weights.tensors()]
    factors = rope_factors(sizes)
    if factors is not None:
        shapes.append(("rope_freqs.weight", factors.shape, "F32"))
    for name, shape, stored in shapes:
        count = math.prod(shape)
        if stored == Q8_0:
            raw = gguf.GGMLQuantizationType.Q8_0
            rows = gguf.quants.quant_shape_to_byte_shape(shape, raw)
            writer.add_tensor_info(name, rows, numpy.dtype(numpy.uint8), math.prod(rows), raw)
        else:
            dtype = numpy.dtype(numpy.float16 if stored == F16 else numpy.float32)
            writer.add_tensor_info(name, shape, dtype, count * dtype.itemsize)


def _write_metadata(writer: Any, gguf: Any, sizes: Sizes, vocabulary: Vocabulary, kind: str, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == Q8_0 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.layers)
    writer.add_feed_forward_length(sizes.intermediate)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    writer.add_rope_freq_base(sizes.rope_base)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_vocab_size(len(vocabulary.tokens))
    if sizes.rope_scaling.get("rope_type", sizes.rope_scaling.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(sizes.rope_scaling["factor"]))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if key in vocabulary.ids:
            add(vocabulary.ids[key])
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise unsupported("Exporting GGUF on this server", "Install loraline-merger[export].") from error
    return gguf


def _differs(name: str, how: str) -> LoralineError:
    return failed_precondition(
        "EXPORT_DIFFERS",
        f"The exported file does not hold the model's weights: {name} is {how}. Nothing was published; export again.",
        tensor=name,
    )
