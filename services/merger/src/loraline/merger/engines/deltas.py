"""What is written instead of a base tensor's rows: the base plus LoRA products, or a merged model's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from loraline.merger.adapter import WEIGHTS_FILE
from loraline.merger.plan import Addition

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class RowSource(Protocol):
    """Gives the new rows of the tensors that change."""

    def changes(self, name: str) -> bool:
        """Whether the tensor changes at all; if not, its bytes are copied."""
        ...

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the new values of the rows `base`, which begin at row `start`, before rounding to the stored type."""
        ...


class LoraRows:
    """Base rows plus `scale * B @ A`, computed in float32 as peft does, so that the rounded result has the same bits.

    Holds the factors of one tensor at a time: memory does not grow with the model.
    """

    def __init__(self, folders: Sequence[Path], additions: dict[str, tuple[Addition, ...]]):
        self._files: list[Any] = [safe_open(folder / WEIGHTS_FILE, framework="pt") for folder in folders]
        self._additions = additions
        self._loaded: tuple[str, list[tuple[Addition, torch.Tensor, torch.Tensor]]] = ("", [])

    def changes(self, name: str) -> bool:
        """Whether an adapter trained this tensor."""
        return name in self._additions

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return base rows plus the adapters' rows, in float32."""
        result = base.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        for addition, a, b in self._factors(name):
            stop = start + base.shape[0]
            delta = (b @ a[:, start:stop]).T if addition.transposed else b[start:stop] @ a
            result = result + delta * addition.scale
        return result

    def _factors(self, name: str) -> list[tuple[Addition, torch.Tensor, torch.Tensor]]:
        if self._loaded[0] != name:
            loaded = []
            for addition in self._additions[name]:
                file = self._files[addition.adapter]
                a, b = file.get_tensor(addition.factors.a_key), file.get_tensor(addition.factors.b_key)
                loaded.append((addition, a.float(), b.float()))
            self._loaded = (name, loaded)
        return self._loaded[1]


class MergedRows:
    """Rows of a model that peft merged in memory, under the base's own tensor names."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors

    def changes(self, name: str) -> bool:
        """Whether the merged value differs from the base's; equal tensors were left out when this was made."""
        return name in self._tensors

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the merged rows."""
        return self._tensors[name][start : start + base.shape[0]]
