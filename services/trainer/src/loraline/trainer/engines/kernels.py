"""Faster kernels, where they are installed beside a GPU: flash attention, and Liger's layers.

Neither is a requirement, and neither is fetched: what the environment has is used, and the run's events say so. With
flash attention rows are shown end to end, without padding between them; the kernel keeps them apart. The loss head is
TRL's, which computes logits in chunks on a GPU; Liger's own head would replace it, so that TRL leaves that one out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_liger_kernel_available

from loraline.trainer.config import TrainerSettings
from loraline.trainer.engines.loading import Precision
from loraline.trainer.spec import TrainingSpec


@dataclass(frozen=True)
class Kernels:
    """What a training runs on."""

    flash_attention: bool = False
    liger: bool = False
    note: str = ""
    """For people; empty where there is nothing to say, as on a CPU."""

    @property
    def padding_free(self) -> bool:
        """Whether rows of a batch go end to end."""
        return self.flash_attention


def choose_kernels(model: Any, spec: TrainingSpec, precision: Precision) -> Kernels:
    """Put the model on the fastest attention that there is for it, and say what else is there."""
    if not torch.cuda.is_available():
        return Kernels()
    if not TrainerSettings().fused_kernels:
        return Kernels(note="attention by torch: LORALINE_TRAINER_FUSED_KERNELS is off")
    flash, told = _flash(model, precision)
    liger = is_liger_kernel_available() and not spec.preference
    return Kernels(flash, liger, f"{told}{'; layers by Liger where it knows the model' if liger else ''}")


def _flash(model: Any, precision: Precision) -> tuple[bool, str]:
    if precision.torch_dtype == torch.float32:  # whatever it is computed in: samples are answered without autocast
        return False, "attention by torch: flash attention takes weights in bf16 and fp16 alone"
    if not is_flash_attn_2_available():
        return False, "attention by torch: flash-attn is not installed"
    try:
        model.set_attn_implementation("flash_attention_2")
    except (ValueError, ImportError) as error:
        return False, f"attention by torch: {str(error).splitlines()[0]}"
    taken = model.config._attn_implementation == "flash_attention_2"  # models may decline without an error
    return taken, "flash attention, no padding" if taken else "attention by torch: the model takes no other"
