"""Memory that ran out: telling it by its errors, and giving back what nobody needs any more."""

from __future__ import annotations

import errno
import gc

import torch

from loraline.core.errors import LoralineError

_WORDS = (
    "out of memory",
    "out_of_memory",
    "_status_alloc_failed",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
)
"""What libraries say in errors of no type of their own: CUDA's runtime, cuBLAS, cuDNN, torch on a CPU, mmap."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or off it, going by the error and by those that it was raised from."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, LoralineError):
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, RuntimeError) and any(word in str(seen).lower() for word in _WORDS):
            return True
        seen = seen.__cause__
    return False


def release() -> None:
    """Give back the memory of what is referred to no more; a trainer and its model refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
