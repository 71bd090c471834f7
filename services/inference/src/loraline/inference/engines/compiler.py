"""Machines without a C++ compiler, such as our CPU image."""

from __future__ import annotations

import os
import shutil


def do_without() -> None:
    """Let torch run what it would compile, where there is nothing to compile with; for the engine's processes.

    vLLM compiles a few functions of its sampler when they are first used, even with enforce_eager; without a compiler
    that would kill the engine at the first request for log-probabilities.
    """
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
