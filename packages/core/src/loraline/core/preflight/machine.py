"""Checks of the machine that every stage needs: its ports, its disk and its package manager."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from loraline.core.errors import LoralineError
from loraline.core.preflight.finding import Finding, Place, of_error, ok
from loraline.core.serving.addresses import bind, split_address
from loraline.core.serving.startup import make_data_dir

GIB = 1024**3
LOW_BYTES = 5 * GIB
"""Below this much free space a warning is given: a model or two, and their merge, take more."""
LEAST_BYTES = GIB
PACKAGE_LOCKS = tuple(
    Path("/var/lib") / name for name in ("dpkg/lock-frontend", "dpkg/lock", "apt/lists/lock", "apt/archives/lock")
)

_UNDONE = re.compile(r"^Package: (\S+)$.*?^Status: \S+ \S+ (?:half-configured|half-installed|unpacked)$", re.M | re.S)


def check_machine(place: Place) -> Iterator[Finding]:
    """Look at everything here that is not one stage's."""
    settings = place.settings
    yield port("port gRPC", settings.listen, "LORALINE_LISTEN")
    if settings.metrics_listen:
        yield port("port metrics", settings.metrics_listen, "LORALINE_METRICS_LISTEN")
    yield disk(settings.data_dir)
    yield package_manager()


def port(check: str, address: str, setting: str) -> Finding:
    """Tell whether an address can be listened on."""
    try:
        listener = bind(address, setting)
        try:
            listener.listen(1)
        finally:
            listener.close()
    except LoralineError as error:
        holder = _holder_of_port(split_address(address, setting)[1]) if error.reason == "PORT_TAKEN" else ""
        found = of_error(check, error)
        return Finding(check, found.level, f"{found.said}{f' It is {holder}.' if holder else ''}", found.reason)
    except OSError as error:
        return Finding(check, "failed", f"{address} cannot be listened on: {error}", "PORT_TAKEN")
    return ok(check, f"{address} is free")


def disk(folder: Path) -> Finding:
    """Tell whether a folder can be written to, and how much room there is."""
    try:
        make_data_dir(folder)
        free = shutil.disk_usage(folder).free
        probe = folder / f".room-{os.getpid()}"
        try:
            probe.write_bytes(b"\0" * 64 * 1024)  # a quota or reserved blocks show only here
        finally:
            probe.unlink(missing_ok=True)
    except LoralineError as error:
        full = isinstance(error.__cause__, OSError) and "space" in str(error.__cause__).lower()
        return Finding("disk", "failed", error.message, "DISK_FULL" if full else error.reason)
    except OSError as error:
        return Finding("disk", "failed", f"{folder} cannot be written to: {error}", "DISK_FULL")
    said = f"{folder} has {free / GIB:.1f} GiB free"
    if free >= LOW_BYTES:
        return ok("disk", said)
    return Finding("disk", "warning" if free >= LEAST_BYTES else "failed", said, "DISK_FULL")


def package_manager(
    locks: Sequence[Path] = PACKAGE_LOCKS, table: Path = Path("/proc/locks"), dpkg: Path = Path("/var/lib/dpkg")
) -> Finding:
    """Tell whether apt or dpkg is at work, and which process that is, or whether it was stopped in the middle."""
    held = [(lock, pid) for lock in locks for pid in _holders(lock, table)]
    if not held:
        left = _left_undone(dpkg)  # while a process is at work that is as it should be
        if left:
            return Finding("package manager", "warning", left, "PACKAGE_MANAGER_INTERRUPTED")
        return ok("package manager", "nobody holds the locks of apt and dpkg")
    lock, pid = held[0]
    said = f"{lock} is held by process {pid} ({process_name(pid) or 'of another container'})"
    return Finding("package manager", "warning", said, "PACKAGE_MANAGER_LOCKED")


def _left_undone(dpkg: Path) -> str:
    """Say what an interrupted dpkg left: packages half done in its status file, or a journal that was not taken in."""
    try:
        paragraphs = (dpkg / "status").read_text(encoding="utf-8", errors="replace").split("\n\n")
        journal = [path.name for path in (dpkg / "updates").iterdir() if path.name.isdigit()]
    except OSError:  # no Debian, or not for this user to read
        return ""
    undone = sorted(found[1] for part in paragraphs if (found := _UNDONE.search(part)))
    if undone:
        more = f" and {len(undone) - 3} more" if len(undone) > 3 else ""
        return f"an installation was interrupted: {', '.join(undone[:3])}{more} are not configured"
    return "an installation was interrupted: dpkg has not taken in its journal" if journal else ""


def process_name(pid: int) -> str:
    """Return a process's command line; empty when it cannot be read."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()[:200]
    except OSError:
        return ""


def _holders(lock: Path, table: Path) -> Iterable[int]:
    """Return the processes that the kernel names as holders of a file's lock."""
    try:
        status, lines = lock.stat(), table.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    fields = [line.split() for line in lines if "->" not in line]
    return [int(parts[4]) for parts in fields if len(parts) > 5 and parts[5] == inode and parts[4].isdigit()]


def _holder_of_port(number: int) -> str:
    """Name the process that listens on a TCP port, as far as this user may see it."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="utf-8").splitlines()[1:]
        except OSError:
            continue
        for parts in map(str.split, lines):
            if parts[3] == "0A" and int(parts[1].rpartition(":")[2], 16) == number:
                sockets.add(f"socket:[{parts[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd") if sockets else ():
        try:
            if any(str(entry.readlink()) in sockets for entry in folder.iterdir()):
                pid = int(folder.parent.name)
                return f"process {pid} ({process_name(pid)})"
        except OSError:
            continue
    return ""
