"""Prometheus' own programs, which PyPI does not bring: tests skip without them, unless somebody requires them."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """Return a program's path. A missing one skips the test; LORALINE_REQUIRE_PROMETHEUS=1 makes it a failure."""
    path = shutil.which(name)
    if path is None and os.environ.get("LORALINE_REQUIRE_PROMETHEUS") != "1":
        pytest.skip(f"{name} is not installed: not evaluated here. It has no PyPI package; Debian's is `prometheus`.")
    assert path is not None, f"{name} is required by LORALINE_REQUIRE_PROMETHEUS, and is not installed"
    return path
