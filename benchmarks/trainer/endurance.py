"""Kills, stops and spoils training runs and counts what was lost.

`make endurance NAME=trainer`. A run of 40 steps with a checkpoint at each is killed with SIGKILL at every one of them,
then once more stopped by SIGTERM at 40 moments drawn over loading, steps, evaluations and saves; 200 checkpoints are
cut short or flipped; a disk is filled while saving. Each time the run must end with the very adapter of the run that
nobody touched. The seed is printed; `--seed` repeats a run.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "trainer-endurance.txt"
STEPS, TEMPORARY = 40, 75
"""Steps of the run; exit status of a run that was stopped and has more to do (EX_TEMPFAIL)."""


def train(base: Path, rows: Path, work: Path, kill_at: int) -> int:
    """Train in this process; kill it at a step, stop when it is told to by SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    from loraline.trainer.engines import training
    from loraline.trainer.testing_runs import Watcher, inputs, spec

    class Ended(Watcher):
        """Dies at a step, or stops when asked."""

        def progress(self, step: int, total: int, eta_seconds: float, metrics: object) -> None:
            """Die here, before the step's checkpoint is written."""
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        @property
        def stop_cause(self) -> str:
            """What SIGTERM means to a job."""
            return "handover" if stopped else ""

    finished = training.run(inputs(base, rows), spec(max_steps=STEPS, save_steps=1, batch_size=4), work, Ended())
    return TEMPORARY if finished is None else 0


def attempt(folder: Path, work: Path, *, kill_at: int = 0, term_after: float = 0.0) -> int:
    """Run one attempt in a process of its own and return its exit status."""
    command = [sys.executable, __file__, "--train", str(folder), "--work", str(work), "--kill-at", str(kill_at)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if term_after:
        time.sleep(term_after)
        process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=600)
    if process.returncode not in (0, TEMPORARY, -signal.SIGKILL, -signal.SIGTERM):
        print(told, file=sys.stderr)
    return process.returncode


def digest(work: Path) -> str:
    """Return the digest of the adapter's weights; empty when there is none."""
    file = work / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def killed_at_every_step(folder: Path, work: Path, whole: str) -> dict[str, int]:
    """Kill the run at each step in turn; it goes on each time from what was saved."""
    kills = failures = 0
    for step in range(1, STEPS + 1):
        status = attempt(folder, work, kill_at=step)
        kills += status == -signal.SIGKILL
        failures += status != -signal.SIGKILL
    end = attempt(folder, work)
    return {
        "kills": kills,
        "failed_attempts": failures + (end != 0),
        "other_adapters_after_kills": int(digest(work) != whole),
    }


def stopped_at_any_moment(folder: Path, work: Path, whole: str, draw: random.Random, seconds: float) -> dict[str, int]:
    """Stop the run by SIGTERM 40 times, at moments from the start of loading to the end of a step."""
    stops = failures = 0
    while stops < STEPS:
        status = attempt(folder, work, term_after=draw.uniform(0.2, seconds))
        if status == 0:  # it came to its end first; begin anew
            failures += digest(work) != whole
            shutil.rmtree(work)
            continue
        # Before its own handler stands, SIGTERM ends the process as it would any other.
        failures += status not in (TEMPORARY, -signal.SIGTERM)
        stops += 1
    end = attempt(folder, work)
    return {
        "stops": stops,
        "failed_stops": failures + (end != 0),
        "other_adapters_after_stops": int(digest(work) != whole),
    }


def spoiled_checkpoints(work: Path, draw: random.Random, number: int = 200) -> dict[str, int]:
    """Cut or flip a file of a checkpoint, again and again; the damaged one must be seen and the one before be taken."""
    from loraline.trainer import checkpoints

    source = work / "checkpoints"
    newest = sorted((path for path in source.glob("checkpoint-*")), key=checkpoints.step_of)[-2:]
    taken = 0
    for _ in range(number):
        with tempfile.TemporaryDirectory() as folder:
            copies = [Path(shutil.copytree(path, Path(folder) / path.name)) for path in newest]
            files = sorted(path for path in copies[1].rglob("*") if path.is_file() and path.stat().st_size)
            spoil(draw.choice(files), draw)
            good, torn = checkpoints.newest_good(Path(folder))
            taken += good != copies[0] or copies[1].name not in torn
    return {"spoiled_checkpoints": number, "spoiled_checkpoints_taken_for_good": taken}


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


def full_disk(folder: Path, whole: str) -> dict[str, int]:
    """Fill the disk in the middle of a run; with room again it goes on to the same adapter."""
    if os.geteuid() != 0:
        return {"full_disks_skipped_for_lack_of_rights": 1}
    with small_disk(12) as disk:
        work = disk / "run"
        attempt(folder, work, kill_at=6)
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            free = shutil.disk_usage(disk).free
            file.write(b"\0" * max(0, free - 200_000))
        refused = attempt(folder, work)
        ballast.unlink()
        end = attempt(folder, work)
        return {
            "full_disks": 1,
            "full_disks_unnoticed": int(refused == 0),
            "runs_lost_to_a_full_disk": int(end != 0 or digest(work) != whole),
        }


def run(seed: int) -> list[str]:
    """Do all of it and return the lines."""
    from loraline.trainer.testing import harbour_rows, make_base, write_rows

    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        rows = write_rows(folder / "rows", harbour_rows())
        write_rows(rows, harbour_rows()[:4], "validation")
        begin = time.monotonic()
        untouched = attempt(folder, folder / "whole")
        seconds = time.monotonic() - begin
        whole = digest(folder / "whole")
        counts = {"untouched_runs_that_failed": int(untouched != 0 or not whole)}
        counts |= killed_at_every_step(folder, folder / "killed", whole)
        counts |= stopped_at_any_moment(folder, folder / "stopped", whole, draw, seconds)
        counts |= spoiled_checkpoints(folder / "whole", draw)
        counts |= full_disk(folder, whole)
    done = ("kills", "stops", "spoiled_checkpoints", "full_disks")
    lines = [f"info seed {seed}", f"info seconds {time.monotonic() - begin:.0f}"]
    lines += [f"info {name} {counts[name]}" for name in done if name in counts]
    return lines + [f"count {name} {value} aim <=0" for name, value in counts.items() if name not in done]


def main() -> int:
    """Run, print and keep the lines."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--train", type=Path)
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--kill-at", type=int, default=0)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    if wanted.train:
        return train(wanted.train / "base", wanted.train / "rows", wanted.work, wanted.kill_at)
    print(f"seed {wanted.seed}", flush=True)
    lines = run(wanted.seed)
    if wanted.keep:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(any(line.startswith("count") and line.split()[2] != "0" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
