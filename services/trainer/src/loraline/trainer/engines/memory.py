"""Going on with less memory when it has run out, with the same effective batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraline.core.errors import LoralineError, resource_exhausted
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.engines import ranks, sft
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.exhaustion import is_out_of_memory, release
from loraline.trainer.engines.loading import Precision, load_model
from loraline.trainer.engines.preparing import PreparedData
from loraline.trainer.spec import TrainingSpec


def train_within_memory(
    base: ResolvedBase,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    spec: TrainingSpec,
    precision: Precision,
    folder: Path,
    observer: RunObserver,
    target: Path,
    start: sft.Start,
) -> tuple[sft.TrainedRun, TrainingSpec]:
    """Load the base and train; return the run and the settings that it came through with.

    When memory runs out the micro-batch is divided and accumulation multiplied, so that the effective batch and the
    order of rows stay; at a micro-batch of one, activations are recomputed (gradient checkpointing). Each time the run
    goes on from its last checkpoint. Raises RESOURCE_EXHAUSTED (OUT_OF_MEMORY) when nothing is left to give up, and
    when the base alone does not fit.
    """
    now = spec
    while True:
        model = None
        try:
            model = load_model(base.folder, precision, remote_code=base.trust_remote_code)
            return sft.train(model, tokenizer, data, now, precision, folder, observer, target, start), now
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if model is None:  # batches have no part in it
                raise base_too_large(precision) from error
            if ranks.count() > 1:
                raise  # the others wait for this one for ever: all of them are started anew, with less
            smaller = with_less_memory(now)
            if smaller is None:
                raise out_of_memory(now, precision.quantization) from error
        # Outside the handler, whose traceback would hold on to the activations.
        del model
        release()
        tell(now, smaller, observer)
        now = smaller


def with_less_memory(spec: TrainingSpec) -> TrainingSpec | None:
    """Return settings with the same effective batch that need less memory; None when there are none."""
    if spec.batch_size > 1:
        divisor = next(number for number in range(2, spec.batch_size + 1) if spec.batch_size % number == 0)
        return replace(spec, batch_size=spec.batch_size // divisor, grad_accum=spec.grad_accum * divisor)
    return None if spec.gradient_checkpointing else replace(spec, gradient_checkpointing=True)


def tell(before: TrainingSpec, after: TrainingSpec, observer: RunObserver) -> None:
    """Count a recovery and say what was given up."""
    observer.count("oom_recoveries")
    if after.gradient_checkpointing and not before.gradient_checkpointing:
        what = "activations are recomputed from here on (gradient_checkpointing), which takes longer"
    else:
        what = (
            f"micro-batch {before.batch_size} → {after.batch_size}, accumulation {before.grad_accum} → "
            f"{after.grad_accum}; the effective batch stays {after.batch_size * after.grad_accum}"
        )
    observer.note(f"memory ran out: {what}", severity="warning", reason="OUT_OF_MEMORY_RECOVERED")


def out_of_memory(spec: TrainingSpec, quantization: str = "") -> LoralineError:
    """Return RESOURCE_EXHAUSTED (OUT_OF_MEMORY) with what the run's settings leave to turn down, and what is in force.

    `quantization` is what the base was loaded with, where that is known; AUTO decides by the machine.
    """
    less = [f"lower parameters.max_length (now {spec.max_length})"]
    if spec.batch_size > 1:
        effective = f"{spec.batch_size} × {spec.grad_accum}"
        less.append(f"lower parameters.batch_size and raise parameters.grad_accum by as much (now {effective})")
    if spec.full:
        less.append("train an adapter instead of all weights (METHOD_LORA)")
    else:
        if (quantization or spec.quantization) != "nf4":
            less.append("set parameters.quantization to QUANTIZATION_NF4")
        less.append(f"lower parameters.lora.r (now {spec.lora.r})")
    less.append("take a smaller base model or a larger GPU")
    message = (
        f"Memory ran out even with recomputed activations and parameters.batch_size {spec.batch_size}, "
        f"parameters.grad_accum {spec.grad_accum}. In this order: {', '.join(less)}."
    )
    return resource_exhausted("OUT_OF_MEMORY", message)


def base_too_large(precision: Precision) -> LoralineError:
    """Return RESOURCE_EXHAUSTED (OUT_OF_MEMORY) of a base whose weights alone need more memory than there is."""
    less = ["end what else takes up its memory (`nvidia-smi` tells)"]
    if precision.full:
        less.append("train an adapter instead of all weights (METHOD_LORA)")
    elif precision.quantization != "nf4":
        less.append("set parameters.quantization to QUANTIZATION_NF4")
    less.append("take a smaller base model or a larger GPU")
    held = precision.quantization if precision.quantization != "none" else "fp32" if precision.full else precision.dtype
    message = (
        f"Memory ran out while the base was loaded, before the first row: its weights do not fit as {held}. "
        f"In this order: {', '.join(less)}."
    )
    return resource_exhausted("OUT_OF_MEMORY", message)
