"""`loraline up` refuses wrong options before it opens or writes anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("option", ["--listen", "--http-listen", "--metrics-listen"])
@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:", "127.0.0.1:99999", ":7600"])
def test_a_wrong_address_is_wrong_input_and_leaves_nothing_behind(option: str, address: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    code = "from loraline.client.cli.main import main; main()"
    command = [sys.executable, "-c", code, "up", "--data-dir", str(data), option, address]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert option in done.stderr and "host:port" in done.stderr
    assert not data.exists()


def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    code = "from loraline.client.cli.main import main; main()"
    command = [sys.executable, "-c", code, "up", "--data-dir", str(tmp_path / "data"), "--stage", "baker"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'baker'" in done.stderr and "trainer" in done.stderr
