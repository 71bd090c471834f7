"""What is written instead of a base tensor's rows: the base plus LoRA products, or a merged model's own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from loraline.merger.adapter import WEIGHTS_FILE
from loraline.merger.engines.crew import Scratch
from loraline.merger.plan import Addition, MergePlan

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Rows = Callable[[torch.Tensor, int, Scratch], torch.Tensor]
"""(base rows, number of the first, the thread's buffers) -> their new values before rounding to the stored type.

The values may lie in the buffers. Several threads call it at once."""


class RowSource(Protocol):
    """Gives the new rows of the tensors that change."""

    def changes(self, name: str) -> bool:
        """Whether the tensor changes at all; if not, its bytes are copied."""
        ...

    def rows(self, name: str) -> Rows:
        """Return what makes the rows of a tensor that changes; asked once for each, in the order of the files."""
        ...

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a tensor that the base has in another shape, or not at all."""
        ...


@dataclass(frozen=True)
class _Factors:
    """The factors of one addition, in memory."""

    addition: Addition
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    """What the product is still to be multiplied by; 1 where `b` holds it already."""
    magnitude: torch.Tensor | None


class LoraRows:
    """Base rows plus `scale * B @ A`, computed in float32 as peft does, so that the rounded result has the same bits.

    With DoRA (arXiv 2402.09353, eq. 5) each row of the sum is scaled to its trained length: m / ||W + scale * B @ A||,
    a row's norm needing that row only. Whole trained tensors (`modules_to_save`, biases) take the base's place. Holds
    the factors of the tensors that are being written: memory does not grow with the model.
    """

    def __init__(self, folders: Sequence[Path], plan: MergePlan):
        self._files: list[Any] = [safe_open(folder / WEIGHTS_FILE, framework="pt") for folder in folders]
        self._plan = plan

    def changes(self, name: str) -> bool:
        """Whether an adapter trained this tensor."""
        return name in self._plan.additions or name in self._plan.replacements

    def rows(self, name: str) -> Rows:
        """Return what adds the adapters' rows in float32, or puts in the rows that replace the base's."""
        if name in self._plan.replacements:
            return lambda base, start, scratch: self.fresh(name, start, start + base.shape[0])
        factors = [self._load(addition) for addition in self._plan.additions[name]]
        return lambda base, start, scratch: _sum(factors, base, start, scratch)

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of the tensor that an adapter saved whole."""
        replacement = self._plan.replacements[name]
        return self._files[replacement.adapter].get_slice(replacement.key)[start:stop]

    def _load(self, addition: Addition) -> _Factors:
        file, key = self._files[addition.adapter], addition.factors.magnitude_key
        a, b = file.get_tensor(addition.factors.a_key).float(), file.get_tensor(addition.factors.b_key).float()
        scale = addition.scale
        if abs(math.frexp(scale)[0]) == 0.5:  # a power of two, as usual: it changes no digit, so it may come first
            b, scale = b * scale, 1.0
        return _Factors(addition, a, b, scale, file.get_tensor(key).float().flatten() if key else None)


def _sum(factors: Sequence[_Factors], base: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
    """Add the products one after another, in the order of peft's own operations."""
    stop, result = start + base.shape[0], base
    shape = (base.shape[0], base.shape[1])
    for number, one in enumerate(factors):
        if one.addition.transposed:
            delta = (one.b @ one.a[:, start:stop]).T
        else:
            delta = torch.mm(one.b[start:stop], one.a, out=scratch.wide(number % 2, shape))
        if result.dtype in (torch.bfloat16, torch.float16):  # only before the first sum, when buffer 1 is free
            result = scratch.wide(1, shape).copy_(result)
        delta = delta.to(torch.float64) if base.dtype == torch.float64 else delta
        result = (delta if one.scale == 1 else delta.mul_(one.scale)).add_(result)
        if one.magnitude is not None:
            result = result.mul_((one.magnitude[start:stop] / torch.linalg.norm(result, dim=1)).view(-1, 1))
    return result


class MergedRows:
    """Rows of a model that was merged in memory, under the base's own tensor names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def changes(self, name: str) -> bool:
        """Whether the merged value differs from the base's; equal tensors were left out when this was made."""
        return name in self._tensors

    def rows(self, name: str) -> Rows:
        """Return what gives the merged rows."""
        return lambda base, start, scratch: self.fresh(name, start, start + base.shape[0])

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the merged rows."""
        return self._tensors[name][start:stop]


class TransformedBase:
    """Another row source over a base whose tensors `names` are first put through `transform`, whole tensors at a time.

    Used for the dequantised base: quantisation works in blocks that rows do not respect, so a whole tensor is needed;
    memory grows with the largest tensors, of which two may be under way, not with the model.
    """

    def __init__(self, inner: RowSource, names: frozenset[str], transform: Callable[[str], torch.Tensor]):
        self._inner, self._names, self._transform = inner, names, transform

    def changes(self, name: str) -> bool:
        """Whether base or adapters change the tensor."""
        return name in self._names or self._inner.changes(name)

    def rows(self, name: str) -> Rows:
        """Return the inner source's rows over the transformed base."""
        inner = self._inner.rows(name) if self._inner.changes(name) else None
        if name not in self._names:
            assert inner is not None  # noqa: S101 (asked only for tensors that change)
            return inner
        whole = self._transform(name)

        def rows(base: torch.Tensor, start: int, scratch: Scratch) -> torch.Tensor:
            part = whole[start : start + base.shape[0]]
            return part if inner is None else inner(part, start, scratch)

        return rows

    def fresh(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the inner source's rows."""
        return self._inner.fresh(name, start, stop)
