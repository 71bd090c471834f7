"""Loading the base for training: weight type and quantisation by hardware."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from loraline.core.errors import failed_precondition, invalid_argument, unsupported
from loraline.trainer import quantization as bits
from loraline.trainer.engines.exhaustion import is_out_of_memory

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Weights take about their size on disk; activations, adapter and optimizer need room beside them.
_SHARE_FOR_WEIGHTS = 0.6


@dataclass(frozen=True)
class Precision:
    """How the base is held and computed."""

    dtype: str
    """`fp32`, `bf16` or `fp16`."""
    quantization: str
    """`none`, `nf4` or `int8`."""
    note: str
    """What was chosen and why, for people."""
    full: bool = False
    """All weights are trained: they are held in float32 whatever they are computed in, so that small steps add up."""
    saved: str = "fp32"
    """Type that a whole model is saved in: the base's own."""
    fallback: str = ""
    """Why AUTO does without quantisation although memory is tight; empty where it does not."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the weights for torch."""
        return torch.float32 if self.full else _TYPES[self.dtype]

    @property
    def saved_dtype(self) -> torch.dtype:
        """The type on disk for torch."""
        return _TYPES[self.saved]


def choose_precision(dtype: str, quantization: str, folder: Path, *, full: bool = False) -> Precision:
    """Decide on weight type and quantisation; explicit wishes are kept or refused, never replaced.

    Raises FAILED_PRECONDITION (QUANTIZATION_UNAVAILABLE) or UNIMPLEMENTED for fp16 without a GPU.
    """
    gpu = torch.cuda.is_available()
    if not dtype:
        dtype = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if dtype == "fp16" and not gpu:
        raise unsupported("parameters.dtype fp16 without a GPU", "Use fp32 or bf16.")
    if full:
        return Precision(dtype, "none", "none: all weights are trained", full=True, saved=_stored_type(folder))
    if quantization in bits.QUANTIZED:
        problem = _quantization_problem()
        if problem:
            raise bits.unavailable(quantization, problem)
        return Precision(dtype, quantization, f"{quantization} as asked for")
    if quantization == "none":
        return Precision(dtype, "none", "none, as asked for")
    return _automatic(dtype, folder, gpu=gpu)


def _stored_type(folder: Path) -> str:
    """Return the type that most models say their weights have on disk; float32 where this one says nothing known."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = str(content.get("dtype") or content.get("torch_dtype") or "")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(told, "fp32")


def _automatic(dtype: str, folder: Path, *, gpu: bool) -> Precision:
    if not gpu:
        return Precision(dtype, "none", "none: there is no GPU whose memory would need it")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info()
    if size < _SHARE_FOR_WEIGHTS * free:
        return Precision(dtype, "none", f"none: {size / 1e9:.1f} GB of weights fit {free / 1e9:.1f} GB of GPU memory")
    problem = _quantization_problem()
    if problem:
        return Precision(dtype, "none", f"none, although the GPU's memory is tight: {problem}", fallback=problem)
    return Precision(dtype, "nf4", f"nf4: {size / 1e9:.1f} GB of weights for {free / 1e9:.1f} GB of free GPU memory")


def _quantization_problem() -> str:
    """Return why bitsandbytes cannot be used on the device that would train; empty when it can."""
    if missing := bits.missing():
        return missing
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        from bitsandbytes import functional  # type: ignore[import-not-found]

        # Its part for the GPU is a library of its own, which may be missing or made for another CUDA.
        ones = torch.ones(64, 64, device=device)
        back = functional.dequantize_4bit(*functional.quantize_4bit(ones, quant_type="nf4"))
        if not torch.allclose(back, ones, atol=0.01):
            return f"bitsandbytes gives back other weights than it was given on {device.type}"
    except Exception as error:
        return f"bitsandbytes does not work on {device.type} here ({type(error).__name__}: {error})"
    return ""


def load_tokenizer(folder: Path, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer; FAILED_PRECONDITION (TOKENIZER_UNREADABLE) when transformers cannot."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote_code)
    except Exception as error:
        message = f"The tokenizer of {folder.name} cannot be loaded: {error}"
        raise failed_precondition("TOKENIZER_UNREADABLE", message) from error


def model_limits(folder: Path, *, remote_code: bool = False) -> tuple[int, int]:
    """Return (longest sequence, vocabulary rows) of the model; 0 where its configuration does not say."""
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0), int(getattr(config, "vocab_size", 0) or 0)


def load_model(folder: Path, precision: Precision, *, remote_code: bool = False) -> Any:
    """Load the base's weights from safetensors.

    Raises FAILED_PRECONDITION (MODEL_UNREADABLE) when they do not load; the library's own error when memory runs out.
    """
    options: dict[str, Any] = {"dtype": precision.torch_dtype, "use_safetensors": True}
    if precision.quantization != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=precision.torch_dtype,
            )
            if precision.quantization == "nf4"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=remote_code, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        message = f"The model {folder.name} cannot be loaded: {error}"
        raise failed_precondition("MODEL_UNREADABLE", message) from error
    _leave_unpacked(model)
    return model


def _leave_unpacked(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights where it cannot.

    On CPUs with AVX512-bf16 it packs them at the first evaluation, in blocks of 64 inputs and 32 outputs, and fails on
    layers of other sizes; those are dequantised instead, as in training.
    """
    for module in model.modules():
        packs = getattr(module, "support_avx512bf16_for_cpu", False)
        if packs and (module.in_features % 64 or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False


def load_adapter(model: Any, folder: Path, *, dropout: float) -> Any:
    """Put an adapter onto the base to be trained further. FAILED_PRECONDITION when it does not fit."""
    try:
        config = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
        config.lora_dropout = dropout
        # What the adapter calls its base may be a name that only a Hub knows; peft would ask for it.
        config.base_model_name_or_path = model.config.name_or_path
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        message = f"init_adapter cannot be put onto the base: {error}"
        raise failed_precondition("INIT_ADAPTER_UNREADABLE", message) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_rows: int) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    if vocab_rows and len(tokenizer) > vocab_rows:
        message = (
            f"The tokenizer knows {len(tokenizer)} tokens, the model has embeddings for {vocab_rows}: they do not "
            "belong together. Take the tokenizer that came with the model."
        )
        raise invalid_argument("VOCABULARY_MISMATCH", message, base_model="tokenizer and model differ")
