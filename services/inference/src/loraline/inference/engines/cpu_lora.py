"""Keeps vLLM on a CPU from answering for the base with an adapter.

In a batch that mixes requests, vLLM marks those without an adapter by the index -1. Its GPU kernels leave such rows
alone; its CPU operators (0.32, `torch_ops`) take -1 as Python does, for the last place, and the base answers with the
weights of whatever adapter lies there. vLLM calls :func:`enable` (a `vllm.general_plugins` entry point) in each of its
processes.
"""

from __future__ import annotations

import sys
from typing import Any

_PATCHED = "loraline_leaves_base_alone"


def enable() -> bool:
    """Have rows without an adapter shrunk to zeros, to which every expansion adds nothing; tell whether it is done."""
    try:
        from vllm.lora.ops import torch_ops
        from vllm.lora.ops.torch_ops import lora_ops
    except ImportError:
        return False
    shrink: Any = lora_ops.bgmv_shrink
    if not hasattr(shrink, _PATCHED):
        shrink = leaving_base_alone(shrink)
    # `sgmv_shrink` finds it in its own module; the wrapper of CPUs takes it from the package when it is imported.
    users = (lora_ops, torch_ops, sys.modules.get("vllm.lora.punica_wrapper.punica_cpu"))
    for module in users:
        if module is not None:
            module.bgmv_shrink = shrink  # type: ignore[attr-defined]
    return True


def leaving_base_alone(shrink: Any) -> Any:
    """Return the operator with the rows of negative indices set to zero."""

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output[: indices.shape[0]][indices < 0] = 0

    setattr(bgmv_shrink, _PATCHED, True)
    return bgmv_shrink
