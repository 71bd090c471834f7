"""What becomes of a run that exists: a question on a terminal, a flag elsewhere, asked only when a run would start."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_ADAPTER
from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2
from loraline.client import Loraline
from loraline.client.cli.existing import describe

PROGRAM = [sys.executable, "-m", "loraline.client.cli.main", "run"]
NAMES = {
    "continue": trainer_pb2.EXISTING_RUN_POLICY_CONTINUE,
    "backup": trainer_pb2.EXISTING_RUN_POLICY_BACKUP_AND_RESTART,
    "overwrite": trainer_pb2.EXISTING_RUN_POLICY_OVERWRITE,
}


def piped(pipeline: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "LORALINE_ADDRESS": address}
    command = [*PROGRAM, str(pipeline), *options]
    # No terminal at all: what is asked here would wait for ever.
    return subprocess.run(
        command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False
    )


def policies(address: str) -> list[int]:
    """Return how each training was started, oldest first."""
    with Loraline.connect(address) as client:
        jobs = client.jobs.list(kind_prefix="trainer.train")
    found = []
    for job in reversed(jobs):
        request = trainer_pb2.TrainRequest()
        job.spec.Unpack(request)
        found.append(request.existing_run)
    return found


def changed(pipeline: Path, epochs: int) -> Path:
    pipeline.write_text(re.sub(r"epochs: \d+", f"epochs: {epochs}", pipeline.read_text()))
    return pipeline


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, pipeline: Path, address: str):
        self.master, slave = pty.openpty()
        settings = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LORALINE_ADDRESS": address}
        # A session of its own, whose terminal this is: Ctrl-C reaches it as a signal.
        self.process = subprocess.Popen(
            [*PROGRAM, str(pipeline)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=settings,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def until(self, words: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            self._read(0.2)
            assert time.monotonic() < deadline, self.shown

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ended(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            self._read(0.1)
            assert time.monotonic() < deadline, self.shown
        os.close(self.master)
        return self.process.returncode

    def _read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                time.sleep(seconds)


def test_on_a_terminal_the_four_are_asked_when_a_run_would_start_anew(address: str, pipeline: Path) -> None:
    assert piped(pipeline, address).returncode == 0
    terminal = Terminal(changed(pipeline, 4), address)
    terminal.until("Which?")
    for words in (
        "The run mareva exists: succeeded, last checkpoint at step 8 (epoch 3.00, loss 0.400).",
        "go on from",
    ):
        assert words in terminal.shown
    assert all(word in terminal.shown for word in ("continue", "backup", "overwrite", "fail"))
    terminal.type("perhaps\n")
    terminal.until("none of them")
    terminal.type("1\n")
    assert terminal.ended() == 0, terminal.shown
    assert policies(address)[1:] == [NAMES["continue"]]
    # Nothing is asked where nothing is to be started: the run that the answer made is taken as it is.
    again = Terminal(pipeline, address)
    assert again.ended() == 0 and "Which?" not in again.shown
    # Enter and Ctrl-C change nothing.
    for interrupt in (False, True):
        stopped = Terminal(changed(pipeline, 5), address)
        stopped.until("Which?")
        if interrupt:
            os.kill(stopped.process.pid, signal.SIGINT)
        else:
            stopped.type("\n")
        assert stopped.ended() == 2 and "The run mareva exists" in stopped.shown
    assert len(policies(address)) == 2


@pytest.mark.parametrize("word", sorted(NAMES))
def test_a_flag_says_it_where_nobody_can_be_asked(address: str, pipeline: Path, word: str) -> None:
    assert piped(pipeline, address).returncode == 0
    assert piped(changed(pipeline, 4), address, "--existing-run", word).returncode == 0
    assert policies(address)[1:] == [NAMES[word]]


def test_without_flag_and_terminal_the_earlier_run_is_kept_aside(address: str, pipeline: Path) -> None:
    assert piped(pipeline, address).returncode == 0
    done = piped(changed(pipeline, 4), address)
    assert done.returncode == 0 and "Which?" not in done.stdout + done.stderr
    # The trainer's checklist is told before the run, and nothing of it where nothing is trained.
    assert "train: There is no GPU. Take a machine with one." in done.stdout
    assert "train: planned: 8 steps, about 2.50 GB of memory" in done.stdout
    assert "planned: 8 steps" not in piped(pipeline, address).stdout
    assert set(policies(address)) == {NAMES["backup"]}
    refused = piped(changed(pipeline, 3), address, "--existing-run", "nonsense")
    assert refused.returncode == 2 and "overwrite" in refused.stdout + refused.stderr


def test_fail_as_a_flag_stops(address: str, pipeline: Path) -> None:
    done = piped(pipeline, address, "--existing-run", "fail")
    assert done.returncode == 2 and "The run mareva exists" in done.stderr


def test_a_run_is_described_in_a_line() -> None:
    run: Any = trainer_pb2.Run(name="mareva", state=job_pb2.JOB_STATE_FAILED)
    assert describe(run) == "failed"
    run.adapter.kind, run.adapter.name, run.adapter.version = ARTIFACT_KIND_ADAPTER, "mareva", 2
    assert describe(run) == "failed, adapter/mareva:v2"
