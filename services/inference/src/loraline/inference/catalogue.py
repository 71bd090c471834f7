"""The names that requests may use: the base, the adapters with their versions, and the aliases that point at them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import grpc

from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError, not_found
from loraline.inference.serving import Serving

_NAMED = 20


def is_base(serving: Serving, model: str) -> bool:
    """Tell whether a request's model name means the base."""
    if model in ("", serving.name):
        return True
    artifact = serving.base.artifact
    return artifact is not None and model in (format_ref(artifact), f"model/{artifact.name}")


async def served_aliases(library: ArtifactLibrary, serving: Serving) -> dict[str, str]:
    """Return alias name -> served name, such as `mareva@production` -> `mareva:v3`, of what is loaded now."""
    adapters = serving.adapters.list()
    pointing = await asyncio.to_thread(aliases_of, library, [adapter.ref for adapter in adapters])
    return {
        f"{adapter.ref.name}@{alias}": adapter.name
        for adapter, aliases in zip(adapters, pointing, strict=True)
        for alias in aliases
    }


def aliases_of(library: ArtifactLibrary, refs: Iterable[ArtifactRef]) -> list[list[str]]:
    """Return the aliases that point at each exact artifact now; blocking. A deleted one has none.

    UNAVAILABLE while the database is.
    """
    found: list[list[str]] = []
    for ref in refs:
        try:
            found.append(list(library.get(ref).aliases))
        except LoralineError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            found.append([])
    return found


def not_served(serving: Serving, model: str, aliases: Iterable[str]) -> LoralineError:
    """Return NOT_FOUND naming what is served, and how another adapter gets there."""
    names = [serving.name, *(adapter.name for adapter in serving.adapters.list()), *aliases]
    message = (
        f"{model!r} is not served here. Served: {_some(names)}. `loraline adapters list` shows them; "
        "`loraline adapters load NAME` or `loraline adapters promote NAME ALIAS` serves another adapter, "
        "`loraline models load model/NAME` another base."
    )
    return not_found("MODEL_NOT_SERVED", message, model=model, served=", ".join(names[:100]))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
