"""The names people have for training settings, and the one that the contract has."""

from __future__ import annotations

from loraline.api.trainer.v1 import trainer_pb2
from loraline.client.pipeline.document import Node
from loraline.client.pipeline.protofill import as_number, fill

ALIASES = {
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "lr": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "lr_scheduler_type": "lr_scheduler",
    "neftune_noise_alpha": "neftune_alpha",
    "max_gradient_norm": "max_grad_norm",
    "random_seed": "seed",
    "save_total_limit": "keep_checkpoints",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "modules_to_save": "lora.modules_to_save",
    "rslora": "lora.rslora",
    "use_rslora": "lora.rslora",
}
"""Other name -> field of TrainingParameters."""

HINTS = {
    "validation_split": "Write `validation_fraction` in the dataset.",
    "warmup_steps": "Write `warmup_ratio`, a share of all steps.",
    "optim": "The optimiser is AdamW; it cannot be chosen.",
}
"""Known elsewhere, said differently here."""

_UNQUANTIZED = "Leave it out, or write `quantization: none` where the base must never be quantised."
_BY_HARDWARE = "Leave it out: the hardware decides. `dtype: fp32` asks for full precision."
SWITCHES = {
    "bf16": ("Write `dtype: bf16`.", _BY_HARDWARE),
    "fp16": ("Write `dtype: fp16`.", _BY_HARDWARE),
    "load_in_4bit": ("Write `quantization: nf4`.", _UNQUANTIZED),
    "use_4bit": ("Write `quantization: nf4`.", _UNQUANTIZED),
    "load_in_8bit": ("Write `quantization: int8`.", _UNQUANTIZED),
    "use_8bit": ("Write `quantization: int8`.", _UNQUANTIZED),
    "no_4bit": ("Write `quantization: none`.", "Leave it out: 4 bits are taken where memory is tight."),
    "no-4bit": ("Write `quantization: none`.", "Leave it out: 4 bits are taken where memory is tight."),
    "use_dora": ("Write `method: dora` beside training_params.", "Leave it out."),
}
"""Switches known elsewhere: what to write instead where they are on, and where they are off."""

_ZERO_MEANS_DEFAULT = {
    "epochs": "3",
    "learning_rate": "2e-4, or 2e-5 with `method: full` or `objective: dpo`",
    "batch_size": "4",
    "grad_accum": "1",
    "max_length": "1024",
    "max_grad_norm": "1",
    "lora.r": "16",
    "lora.alpha": "twice the rank",
}


def read_training_params(node: Node) -> trainer_pb2.TrainingParameters:
    """Return the settings; unknown names, wrong types and zeros that would silently mean a default are mistakes."""
    parameters = trainer_pb2.TrainingParameters()
    fill(parameters, node, aliases=ALIASES, hints=_hints(node))
    entries = dict(node.mapping())
    lora = entries.pop("lora", None)
    if lora is not None and isinstance(lora.value, dict):
        entries |= {f"lora.{key}": child for key, child in lora.value.items()}
    for key, child in entries.items():
        default = _ZERO_MEANS_DEFAULT.get(ALIASES.get(key, key))
        if default and as_number(child.value) == 0:
            child.fault(f"must be above 0: 0 would mean the default ({default}).")
    return parameters


def _hints(node: Node) -> dict[str, str]:
    """Return what to say of the keys that are known elsewhere; of a switch it depends on the value that it has."""
    given = {key: child.value for key, child in node.mapping().items() if key in SWITCHES}
    return HINTS | {key: SWITCHES[key][_is_off(value)] for key, value in given.items()}


def _is_off(value: object) -> bool:
    return not value or str(value).strip().lower() in ("false", "no", "off", "0", "none")
