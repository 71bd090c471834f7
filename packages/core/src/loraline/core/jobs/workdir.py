"""The folder of a job under the data folder, and the log file in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from loraline.core.jobs.redact import redact

_KEPT_LOGS = 5
_TAIL_BYTES = 2048


def job_folder(data_dir: Path, job: str) -> Path:
    """Return the job's folder, made if need be; it outlives restarts of the job on this machine."""
    folder = data_dir / "jobs" / job
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_job_folder(data_dir: Path, job: str) -> None:
    """Remove the job's folder; a missing one is fine."""
    shutil.rmtree(data_dir / "jobs" / job, ignore_errors=True)


def begin_log(folder: Path, attempt: int) -> Path:
    """Return the log file for an attempt; the one before becomes `log.<attempt>.txt`, of which the newest stay."""
    log = folder / "log.txt"
    if log.exists():
        log.replace(folder / f"log.{attempt - 1}.txt")
    (folder / f"log.{attempt - 1 - _KEPT_LOGS}.txt").unlink(missing_ok=True)
    return log


def log_tail(folder: Path, secrets: Iterable[str] = ()) -> str:
    """Return the last lines of the log, about 2 kB, without secrets; empty when there is none."""
    try:
        with (folder / "log.txt").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 2 * _TAIL_BYTES))
            content = file.read()
    except OSError:
        return ""
    # Secrets first: one that the cut goes through would not be recognized. More than is shown was read for that.
    text = redact(content.decode(errors="replace"), secrets)
    if len(text) > _TAIL_BYTES:
        text = text[-_TAIL_BYTES:].partition("\n")[2] or text[-_TAIL_BYTES:]
    return text.strip()
