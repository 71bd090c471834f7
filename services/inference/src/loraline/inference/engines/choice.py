"""Which engine this installation can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from loraline.core.errors import failed_precondition
from loraline.inference.engines.port import Engine

_INSTALL = (
    "Install `loraline-inference[cpu]` (vLLM on a CPU, Linux), `loraline-inference[gpu]` (vLLM on CUDA) or "
    "`loraline-inference[transformers]` (anywhere), then start the service again."
)


@dataclass(frozen=True)
class EngineChoice:
    """An engine and the reason for it, for the log."""

    name: Literal["vllm", "transformers"]
    why: str

    def create(self) -> Engine:
        """Return a new engine, not started."""
        if self.name == "vllm":
            from loraline.inference.engines.vllm_engine import VllmEngine

            return VllmEngine()
        from loraline.inference.engines.transformers_engine import TransformersEngine

        return TransformersEngine()


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def choose(wanted: str, installed: Callable[[str], bool] = _installed) -> EngineChoice:
    """Return the engine for the setting `auto`, `vllm` or `transformers`.

    FAILED_PRECONDITION ENGINE_NOT_INSTALLED names what to install. Imports nothing.
    """
    missing_vllm = [package for package in ("vllm", "torch") if not installed(package)]
    missing_plain = [package for package in ("torch", "transformers", "peft") if not installed(package)]
    if wanted == "vllm":
        if missing_vllm:
            raise _not_installed("vLLM was asked for", missing_vllm)
        return EngineChoice("vllm", "LORALINE_INFERENCE_ENGINE asks for it")
    if wanted == "transformers":
        if missing_plain:
            raise _not_installed("The transformers engine was asked for", missing_plain)
        return EngineChoice("transformers", "LORALINE_INFERENCE_ENGINE asks for it")
    if not missing_vllm:
        return EngineChoice("vllm", "vLLM is installed")
    if not missing_plain:
        return EngineChoice("transformers", f"vLLM cannot be used here: {', '.join(missing_vllm)} not installed")
    raise _not_installed("No engine can run here", sorted({*missing_vllm, *missing_plain}))


def _not_installed(what: str, packages: list[str]) -> Exception:
    message = f"{what}, but {', '.join(packages)} is not installed. {_INSTALL}"
    return failed_precondition("ENGINE_NOT_INSTALLED", message, packages=", ".join(packages))
