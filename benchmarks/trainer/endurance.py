"""Kills, stops and spoils training runs and counts what was lost.

`make endurance NAME=trainer`. A run of 40 steps with a checkpoint at each is killed with SIGKILL at every one of them,
then once more stopped by SIGTERM ten times each while it loads, steps, evaluates and saves; 200 checkpoints are cut
short or flipped; a disk is filled in the middle of a save. Each time the run must end with the very adapter of the run
that nobody touched. The seed is printed; `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from endurance_run import FAILED, LINGER, PHASES, STEPS, TEMPORARY

from loraline.core.jobs.loading import EXIT_WHILE_LOADING

RUN = Path(__file__).with_name("endurance_run.py")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "trainer-endurance.txt"
Disturb = Callable[["subprocess.Popen[str]"], None]
_PLACES = {"load": 2, "step": 4, "eval": 2, "save": 4}
"""Places of a phase to choose from: importing or loading the base; one of the first steps, batches or saves."""
_GONE_ON_WITH = 40
"""Of so many spoiled checkpoints one is gone on with to the end of the run."""


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    status: int
    said: tuple[str, ...]
    """Lines such as `stopped in save` and `failed DISK_FULL in save`."""
    seconds: float
    """From the moment that something was done to it to its end."""


def attempt(folder: Path, work: Path, *, kill_at: int = 0, linger: str = "", disturb: Disturb | None = None) -> Attempt:
    """Run one attempt in a process of its own; disturb it once it lingers at the place asked for."""
    command = [sys.executable, str(RUN), str(folder), str(work), "--kill-at", str(kill_at), "--linger", linger]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("here ") and disturb is not None:
                disturb(process)
                begin = time.monotonic()
        status = process.wait(timeout=600)
        if status not in (0, TEMPORARY, EXIT_WHILE_LOADING, -signal.SIGKILL, FAILED):
            told.seek(0)
            print(told.read()[-4000:], file=sys.stderr)
    return Attempt(status, tuple(said), time.monotonic() - begin)


def digest(work: Path) -> str:
    """Return the digest of the adapter's weights; empty when there is none."""
    file = work / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def killed_at_every_step(folder: Path, work: Path, whole: str, number: int) -> dict[str, float]:
    """Kill the run at each step in turn; it goes on each time from what was saved."""
    kills = failures = 0
    for step in range(1, number + 1):
        status = attempt(folder, work, kill_at=step).status
        kills += status == -signal.SIGKILL
        failures += status != -signal.SIGKILL
    end = attempt(folder, work).status
    return {
        "kills": kills,
        "failed_attempts": failures + (end != 0),
        "other_adapters_after_kills": int(digest(work) != whole),
    }


def stopped_in_every_phase(folder: Path, work: Path, whole: str, draw: random.Random, each: int) -> dict[str, float]:
    """Stop the run by SIGTERM so often in each phase; it goes on each time from what was saved."""
    counts = {f"stops_in_{phase}": 0 for phase in PHASES}
    failures, elsewhere, slowest = 0, 0, 0.0

    def stop(process: subprocess.Popen[str]) -> None:
        time.sleep(draw.uniform(0, LINGER * 0.8))
        process.send_signal(signal.SIGTERM)

    for phase in [phase for phase in PHASES for _ in range(each)]:
        while True:
            found = attempt(folder, work, linger=f"{phase}:{draw.randint(1, _PLACES[phase])}", disturb=stop)
            if found.status != 0:
                break
            failures += digest(work) != whole  # it came to its end before that place; begin anew
            shutil.rmtree(work)
        counts[f"stops_in_{phase}"] += f"stopped in {phase}" in found.said
        elsewhere += f"stopped in {phase}" not in found.said
        failures += found.status not in (TEMPORARY, EXIT_WHILE_LOADING)
        slowest = max(slowest, found.seconds)
    end = attempt(folder, work).status
    return {
        **counts,
        "slowest_stop_seconds": round(slowest, 2),
        "stops_in_another_phase": elsewhere,
        "failed_stops": failures + (end != 0),
        "other_adapters_after_stops": int(digest(work) != whole),
    }


def spoiled_checkpoints(folder: Path, whole: str, draw: random.Random, number: int) -> dict[str, float]:
    """Cut or flip a file of a checkpoint, again and again; the damaged one must be seen and the one before be taken.

    Some of these runs are gone on with to their end.
    """
    from loraline.trainer import checkpoints

    source = folder / "whole" / "checkpoints"
    newest = sorted((path for path in source.glob("checkpoint-*")), key=checkpoints.step_of)[-2:]
    taken = other = 0
    for turn in range(number):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            copies = [Path(shutil.copytree(path, work / "checkpoints" / path.name)) for path in newest]
            files = sorted(path for path in copies[1].rglob("*") if path.is_file() and path.stat().st_size)
            spoil(draw.choice(files), draw)
            good, torn = checkpoints.newest_good(work / "checkpoints")
            taken += good != copies[0] or copies[1].name not in torn
            if turn % _GONE_ON_WITH == 0:
                other += attempt(folder, work).status != 0 or digest(work) != whole
    return {
        "spoiled_checkpoints": number,
        "spoiled_checkpoints_taken_for_good": taken,
        "other_adapters_after_spoiling": other,
    }


def spoil(file: Path, draw: random.Random) -> None:
    """Cut a file short, flip a bit of it, or take it away."""
    content = bytearray(file.read_bytes())
    way = draw.choice(("cut", "flip", "flip", "remove"))
    if way == "cut":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif way == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    else:
        file.unlink()


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """Mount a small tmpfs; needs the right to mount."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)
        folder.rmdir()


def full_disk(folder: Path, whole: str) -> dict[str, float]:
    """Fill the disk in the middle of a save; with room again the run goes on to the same adapter."""
    if os.geteuid() != 0:
        return {"full_disks_skipped_for_lack_of_rights": 1}
    with small_disk(12) as disk:
        work, ballast = disk / "run", disk / "ballast"
        attempt(folder, work, kill_at=6)

        def fill(_process: subprocess.Popen[str]) -> None:
            with ballast.open("wb") as file:
                file.write(b"\0" * shutil.disk_usage(disk).free)

        refused = attempt(folder, work, linger="save:2", disturb=fill)
        ballast.unlink()
        end = attempt(folder, work).status
        return {
            "full_disks": 1,
            "full_disks_not_told_as_such": int(refused.status == 0 or "failed DISK_FULL in save" not in refused.said),
            "runs_lost_to_a_full_disk": int(end != 0 or digest(work) != whole),
        }


def run(wanted: argparse.Namespace) -> list[str]:
    """Do all of it and return the lines."""
    from loraline.trainer.testing import harbour_rows, make_base, write_rows

    draw = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        rows = write_rows(folder / "rows", harbour_rows())
        write_rows(rows, harbour_rows()[:4], "validation")
        begin = time.monotonic()
        untouched = attempt(folder, folder / "whole").status
        whole = digest(folder / "whole")
        counts: dict[str, float] = {"untouched_runs_that_failed": int(untouched != 0 or not whole)}
        counts |= killed_at_every_step(folder, folder / "killed", whole, wanted.kills)
        counts |= stopped_in_every_phase(folder, folder / "stopped", whole, draw, wanted.stops)
        counts |= spoiled_checkpoints(folder, whole, draw, wanted.spoiled)
        counts |= full_disk(folder, whole)
    lines = [f"info seed {wanted.seed}", f"info seconds {time.monotonic() - begin:.0f}"]
    lines += [f"info {name} {value}" for name, value in counts.items() if _is_figure(name)]
    return lines + [f"count {name} {value} aim <=0" for name, value in counts.items() if not _is_figure(name)]


def _is_figure(name: str) -> bool:
    """Whether a count says what was done, and is no failure."""
    done = ("kills", "spoiled_checkpoints", "full_disks", "slowest_stop_seconds")
    return name in done or name in [f"stops_in_{phase}" for phase in PHASES]


def main() -> int:
    """Run, print and keep the lines."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments.add_argument("--kills", type=int, default=STEPS)
    arguments.add_argument("--stops", type=int, default=10, help="in each phase")
    arguments.add_argument("--spoiled", type=int, default=200)
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    lines = run(wanted)
    if wanted.keep:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(any(line.startswith("count") and line.split()[2] != "0" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
