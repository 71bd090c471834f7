"""What is written instead of a base tensor's rows: the base plus LoRA products, or a merged model's own rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from loraline.merger.adapter import WEIGHTS_FILE
from loraline.merger.plan import Addition, MergePlan

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class RowSource(Protocol):
    """Gives the new rows of the tensors that change."""

    def changes(self, name: str) -> bool:
        """Whether the tensor changes at all; if not, its bytes are copied."""
        ...

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the new values of the rows `base`, which begin at row `start`, before rounding to the stored type."""
        ...

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor that the base has in another shape, or not at all."""
        ...


class LoraRows:
    """Base rows plus `scale * B @ A`, computed in float32 as peft does, so that the rounded result has the same bits.

    With DoRA (arXiv 2402.09353, eq. 5) each row of the sum is scaled to its trained length: m / ||W + scale * B @ A||,
    a row's norm needing that row only. Whole trained tensors (`modules_to_save`, biases) take the base's place. Holds
    the factors of one tensor at a time: memory does not grow with the model.
    """

    def __init__(self, folders: Sequence[Path], plan: MergePlan):
        self._files: list[Any] = [safe_open(folder / WEIGHTS_FILE, framework="pt") for folder in folders]
        self._plan = plan
        self._loaded: tuple[str, list[tuple[Addition, torch.Tensor, torch.Tensor]]] = ("", [])
        self._additions_of_one = all(len(additions) == 1 for additions in plan.additions.values())
        self._buffer = torch.empty(0)

    def changes(self, name: str) -> bool:
        """Whether an adapter trained this tensor."""
        return name in self._plan.additions or name in self._plan.replacements

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return base rows plus the adapters' rows, in float32; or the rows that replace them.

        The next call may overwrite what this one returned.
        """
        if name in self._plan.replacements:
            return self.fresh(name, start, start + base.shape[0])
        result = base
        for addition, a, b in self._factors(name):
            stop = start + base.shape[0]
            delta = (b @ a[:, start:stop]).T if addition.transposed else self._product(b[start:stop], a)
            # In place, in the order of peft's own operations; a sum of a 16-bit and a 32-bit value is a 32-bit one.
            delta = delta.to(torch.float64) if base.dtype == torch.float64 else delta
            result = delta.mul_(addition.scale).add_(result)
            if addition.factors.magnitude_key:
                result = self._scaled(addition, result, start)
        return result

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of the tensor that an adapter saved whole."""
        replacement = self._plan.replacements[name]
        return self._files[replacement.adapter].get_slice(replacement.key)[start:stop]

    def _product(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Return B @ A in one buffer that every block reuses: fresh memory for each costs more than the product."""
        shape = (b.shape[0], a.shape[1])
        if self._additions_of_one and self._buffer.numel() < shape[0] * shape[1]:
            self._buffer = torch.empty(shape[0] * shape[1])
        if not self._additions_of_one:
            return b @ a
        return torch.mm(b, a, out=self._buffer[: shape[0] * shape[1]].view(shape))

    def _scaled(self, addition: Addition, rows: torch.Tensor, start: int) -> torch.Tensor:
        magnitude = self._files[addition.adapter].get_tensor(addition.factors.magnitude_key).float().flatten()
        factor = magnitude[start : start + rows.shape[0]] / torch.linalg.norm(rows, dim=1)
        return factor.view(-1, 1) * rows

    def _factors(self, name: str) -> list[tuple[Addition, torch.Tensor, torch.Tensor]]:
        if self._loaded[0] != name:
            loaded = []
            for addition in self._plan.additions[name]:
                file = self._files[addition.adapter]
                a, b = file.get_tensor(addition.factors.a_key), file.get_tensor(addition.factors.b_key)
                loaded.append((addition, a.float(), b.float()))
            self._loaded = (name, loaded)
        return self._loaded[1]


class MergedRows:
    """Rows of a model that was merged in memory, under the base's own tensor names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def changes(self, name: str) -> bool:
        """Whether the merged value differs from the base's; equal tensors were left out when this was made."""
        return name in self._tensors

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the merged rows."""
        return self.fresh(name, start, start + base.shape[0])

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the merged rows."""
        return self._tensors[name][start:stop]


class TransformedBase:
    """Another row source over a base whose tensors `names` are first put through `transform`, whole tensors at a time.

    Used for the dequantised base: quantisation works in blocks that rows do not respect, so a whole tensor is needed;
    memory grows with the largest tensor, not with the model.
    """

    def __init__(self, inner: RowSource, names: frozenset[str], transform: Callable[[str], torch.Tensor]):
        self._inner, self._names, self._transform = inner, names, transform
        self._loaded: tuple[str, torch.Tensor | None] = ("", None)

    def changes(self, name: str) -> bool:
        """Whether base or adapters change the tensor."""
        return name in self._names or self._inner.changes(name)

    def rows(self, name: str, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the inner source's rows over the transformed base."""
        if name in self._names:
            if self._loaded[0] != name or self._loaded[1] is None:
                self._loaded = (name, self._transform(name))
            whole = self._loaded[1]
            assert whole is not None  # noqa: S101 (set two lines above)
            base = whole[start : start + base.shape[0]]
        return self._inner.rows(name, base, start) if self._inner.changes(name) else base

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the inner source's rows."""
        return self._inner.fresh(name, start, stop)
