"""A full disk is told as such, whichever library ran into it."""

from __future__ import annotations

import errno

import pytest

from loraline.core.jobs.endings import failure

WRITER = "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3: file write failed"


class SafetensorError(Exception):
    """As safetensors' own: no OSError, and without an errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/jobs/x/optimizer.pt"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(WRITER),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 788480 vs 788432"),
    ],
)
def test_a_full_disk_is_told_whoever_found_it(error: Exception) -> None:
    assert failure(error).reason == "DISK_FULL"
    assert "/data/jobs/x/optimizer.pt" in failure(OSError(errno.ENOSPC, "x", "/data/jobs/x/optimizer.pt")).message


def test_the_cause_of_another_error_counts() -> None:
    def save() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the archive could not be finished") from error

    with pytest.raises(RuntimeError) as raised:
        save()
    assert failure(raised.value).reason == "DISK_FULL"


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("device-side assert")])
def test_other_errors_are_no_full_disk(error: Exception) -> None:
    assert failure(error).reason == "JOB_CRASHED"
