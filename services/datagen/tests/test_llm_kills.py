"""A short endurance test: killed at random moments, no accepted row is lost and no recorded call repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "datagen" / "endurance.py"


@pytest.mark.slow
def test_five_kills() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--no-keep"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "count lost_rows 0 aim <=0" in done.stdout, done.stdout
    assert "count repeated_calls 0 aim <=0" in done.stdout, done.stdout
    assert "info kills 5" in done.stdout, done.stdout
