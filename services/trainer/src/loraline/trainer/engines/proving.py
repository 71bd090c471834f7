"""The probes of a finished run, measured in the memory that there is: what was trained is not lost to its proof."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from loraline.core.errors import resource_exhausted
from loraline.core.evidence.probes import ProbeSet
from loraline.trainer.base_models import ResolvedBase
from loraline.trainer.engines import probing
from loraline.trainer.engines.callbacks import RunObserver
from loraline.trainer.engines.encoding import ChatEncoder
from loraline.trainer.engines.exhaustion import is_out_of_memory, release
from loraline.trainer.engines.loading import Precision
from loraline.trainer.engines.preparing import PreparedData
from loraline.trainer.hardware import look
from loraline.trainer.outcome import count_parameters

_ROOM = 1.2
"""Memory in all, as a multiple of the weights: a probe is a few hundred tokens."""


def prove(
    base: ResolvedBase,
    tuned: Path,
    encoder: ChatEncoder,
    data: PreparedData,
    trained: Precision,
    observer: RunObserver,
    *,
    seed: int,
) -> ProbeSet:
    """Measure the probes in float32; where memory does not suffice, as the run itself was computed.

    `trained` is how that was; the set says what it was measured in, which those who compare with it heed. Raises
    RESOURCE_EXHAUSTED (OUT_OF_MEMORY) when memory suffices for none of the ways; otherwise as `probing.measure`.
    """
    release()  # the trainer and its model have done their part
    ways = ways_of_measuring(base.folder, trained)
    for precision, device in ways:
        if (precision, device) != ways[0] or _named(precision) != "fp32":
            told = (
                f"memory does not suffice for probes in float32: they are measured in {_named(precision)} on {device}"
            )
            observer.note(told, severity="warning", reason="PROBES_WITH_LESS_MEMORY")
        try:
            return probing.measure(
                base.folder,
                tuned,
                encoder,
                data.train,
                data.validation,
                seed=seed,
                remote_code=base.trust_remote_code,
                precision=precision,
                device=device,
            )
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would hold on to the model.
        release()
    message = (
        "The training came to its end, but memory ran out while its probes were measured, and nothing was published. "
        "The last checkpoint is kept: free memory (`nvidia-smi` tells what takes it), then set existing_run CONTINUE, "
        "which trains no step again."
    )
    raise resource_exhausted("OUT_OF_MEMORY", message)


def ways_of_measuring(folder: Path, trained: Precision) -> list[tuple[Precision, str]]:
    """Return types and devices to try, the most exact first; never empty.

    A way for which memory is too small anyway is left out: on the CPU trying it would cost the process its life.
    """
    device = probing.default_device()
    gpu = device == "cuda"
    exact = Precision("fp32", "none", "probes")
    plain = replace(exact, dtype=trained.dtype if trained.dtype != "fp32" else "bf16")
    needed = 4 * _ROOM * count_parameters(folder)
    ways = []
    if not gpu or torch.cuda.mem_get_info()[0] >= needed:
        ways.append((exact, device))
    if gpu and look().memory >= needed:
        ways.append((exact, "cpu"))
    ways.append((plain, device))
    if trained.quantization != "none":
        ways.append((trained, device))
    return ways


def _named(precision: Precision) -> str:
    return precision.quantization if precision.quantization != "none" else precision.dtype
