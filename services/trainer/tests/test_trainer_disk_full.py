"""What torch and safetensors really raise on a full disk is told as DISK_FULL."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraline.core.jobs.endings import failure

TENSORS = {f"weights.{number}": torch.ones(256, 256) for number in range(16)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; four are to be written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        # Lazily: the error that the test looks at holds the file open still.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("save", [torch.save, save_file, lambda tensors, file: file.write_bytes(bytes(2**22))])
def test_what_the_libraries_raise_is_understood(small_disk: Path, save: Callable[[object, Path], object]) -> None:
    with pytest.raises(Exception) as raised:
        save(TENSORS, small_disk / "file")
    assert failure(raised.value).reason == "DISK_FULL", repr(raised.value)
