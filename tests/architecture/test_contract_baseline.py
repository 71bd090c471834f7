"""The contract's baseline catches what would break callers, and lets additions through."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).with_name("buf")
JOB = Path("proto/loraline/api/job/v1/job.proto")


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    """Return a copy of the buf workspace, with the committed baseline."""
    for name in ("proto", "third_party"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    return tmp_path


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    """Compare as `make check-proto` does."""
    command = f"set -o pipefail; '{BUF}' build -o - | '{BUF}' breaking - --against proto/baseline.binpb"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


def change(folder: Path, old: str, new: str) -> None:
    text = (folder / JOB).read_text()
    assert text.count(old) == 1, old
    (folder / JOB).write_text(text.replace(old, new))


def test_the_contract_of_today_breaks_nobody(contract: Path) -> None:
    done = breaking(contract)
    assert done.returncode == 0, done.stdout + done.stderr


def test_additions_pass(contract: Path) -> None:
    change(contract, "message DeleteJobResponse {}", "message DeleteJobResponse {\n  // Added.\n  bool gone = 1;\n}")
    done = breaking(contract)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  string reason = 2;", "  bytes reason = 2;", 'changed type from "string" to "bytes"'),
        ("rpc PauseJob(PauseJobRequest) returns (PauseJobResponse);", "", "PauseJob"),
        ("JOB_STATE_PAUSED = 3;", "JOB_STATE_HELD = 3;", "JOB_STATE_PAUSED"),
    ],
)
def test_breaks_are_named(contract: Path, old: str, new: str, told: str) -> None:
    change(contract, old, new)
    done = breaking(contract)
    assert done.returncode != 0
    assert told in done.stdout + done.stderr
