"""Several adapters made one by TIES or DARE, through peft; the result is an ordinary LoRA adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from loraline.core.errors import failed_precondition, unsupported
from loraline.merger.adapter import Adapter
from loraline.merger.engines.models import attach_adapters, load_causal_lm

DENSITY = 0.5
"""Share of an adapter's values that is kept, where the caller names none."""
_NAME = "combined"


def combine(
    base: Path, adapters: Sequence[tuple[Adapter, float]], method: str, density: float, workdir: Path
) -> tuple[Path, str]:
    """Combine weighted adapters by `ties` (arXiv 2306.01708) or `dare` (arXiv 2311.03099); return folder and method.

    Adapters of one rank are combined factor by factor, as peft does by default; those of several ranks by their
    products, which are decomposed again at the sum of the ranks. DARE drops values at random, from a fixed
    seed. Holds the base in memory. Raises UNIMPLEMENTED for adapters that are more than plain factors.
    """
    for adapter, _ in adapters:
        if adapter.peft_only_because or adapter.whole or any(factors.magnitude_key for factors in adapter.factors):
            why = adapter.peft_only_because or "it holds whole tensors or DoRA"
            raise unsupported(f"Combining by {method} an adapter of which {why}", "Merge that adapter alone.")
    model = attach_adapters(load_causal_lm(base, "auto"), [(adapter.folder, 1.0) for adapter, _ in adapters])
    names = [f"adapter_{number}" for number in range(len(adapters))]
    ranks = {factors.rank for adapter, _ in adapters for factors in adapter.factors}
    kind = {"ties": "ties", "dare": "dare_linear"}[method] + ("_svd" if len(ranks) > 1 else "")
    share = density or DENSITY
    torch.manual_seed(0)
    try:
        model.add_weighted_adapter(
            names,
            [weight for _, weight in adapters],
            _NAME,
            combination_type=kind,
            density=share,
            svd_rank=sum(max(f.rank for f in a.factors) for a, _ in adapters) if len(ranks) > 1 else None,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise failed_precondition(
            "ADAPTERS_NOT_COMBINABLE",
            f"peft cannot combine these adapters by {kind}: {str(error)[:300]}. Use COMBINE_METHOD_LINEAR.",
        ) from error
    target = workdir / "combined"
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(str(target), selected_adapters=[_NAME])
    return target / _NAME, f"{len(adapters)} adapters combined through peft by {kind}, density {share:g}"
