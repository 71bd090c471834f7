"""How people name what they ask: `mareva`, `mareva@production`, `mareva:v3`, `adapter/mareva:v3`, or the base."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.artifact.v1.artifact_pb2 import ArtifactRef
from loraline.core.artifacts.library import ArtifactLibrary
from loraline.core.artifacts.refs import format_ref, parse_ref
from loraline.core.errors import LoralineError

_MAX_REMEMBERED = 4096


def adapter_ref(name: str) -> ArtifactRef | None:
    """Read a request's model name as an adapter reference; None when it cannot be one."""
    text = name if name.startswith("adapter/") else f"adapter/{name}"
    try:
        ref = parse_ref(text)
    except LoralineError:
        return None
    return ref if ref.kind == artifact_pb2.ARTIFACT_KIND_ADAPTER else None


def served_name(ref: ArtifactRef) -> str:
    """Return the name of an exact adapter in requests, such as `mareva:v3`."""
    return format_ref(ref).removeprefix("adapter/")


def internal_name(exact: ArtifactRef) -> str:
    """Return the adapter's name inside the engine.

    It comes from the content's digest, so two versions never share a name and no cache can be stale; and from the
    artifact's name, so that equal content under two names is two adapters, each with its own aliases. No dots: PEFT
    makes it a module's name.
    """
    own = hashlib.sha256(format_ref(exact).encode()).hexdigest()[:8]
    return f"a{exact.digest.removeprefix('sha256:')[:24]}{own}"


class AdapterNames:
    """Resolves names to exact adapters, remembering for a moment: a busy server must not ask the database each time."""

    def __init__(self, library: ArtifactLibrary, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._library = library
        self._seconds = seconds
        self._clock = clock
        self._remembered: dict[str, tuple[float, ArtifactRef]] = {}

    async def resolve(self, ref: ArtifactRef) -> ArtifactRef:
        """Return the exact reference. NOT_FOUND names what exists."""
        key, now = format_ref(ref), self._clock()
        known = self._remembered.get(key)
        if known is not None and known[0] > now and ref.digest in ("", known[1].digest):
            return known[1]
        exact = await asyncio.to_thread(self._library.resolve, ref)
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = (now + self._seconds, exact)
        return exact

    def forget(self) -> None:
        """Ask the database again from now on, after an alias was moved here."""
        self._remembered.clear()
