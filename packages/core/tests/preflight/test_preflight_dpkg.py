"""What an interrupted installation leaves behind is told, unless the package manager is just at work."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from loraline.core.preflight import recognised
from loraline.core.preflight.machine import package_manager

WHOLE = (
    "Package: libc6\nStatus: install ok installed\nVersion: 2.36\n\nPackage: old\nStatus: deinstall ok config-files\n"
)


def state(folder: Path, *undone: tuple[str, str], journal: str = "") -> Path:
    """Write dpkg's state as it keeps it, with packages that are not done."""
    (folder / "updates").mkdir(parents=True)
    paragraphs = [WHOLE, *(f"Package: {name}\nPriority: optional\nStatus: install ok {how}\n" for name, how in undone)]
    (folder / "status").write_text("\n".join(paragraphs))
    if journal:
        (folder / "updates" / journal).touch()
    return folder


@pytest.mark.parametrize(
    ("undone", "journal", "said"),
    [
        ((), "", ""),
        ((), "tmp.i", ""),
        ((), "0003", "dpkg has not taken in its journal"),
        ((("gcc-12", "half-configured"),), "", "gcc-12 are not configured"),
        ((("b", "unpacked"), ("a", "half-installed"), ("d", "unpacked"), ("c", "unpacked")), "", "a, b, c and 1 more"),
    ],
)
def test_what_was_left_undone_is_named(
    tmp_path: Path, undone: tuple[tuple[str, str], ...], journal: str, said: str
) -> None:
    found = package_manager([], dpkg=state(tmp_path / "dpkg", *undone, journal=journal))
    assert found.reason == ("PACKAGE_MANAGER_INTERRUPTED" if said else "")
    assert said in found.said
    if said:
        assert found.level == "warning"
        assert "dpkg --configure -a" in found.explained("zh")


def test_a_machine_without_dpkg_is_well(tmp_path: Path) -> None:
    assert package_manager([], dpkg=tmp_path / "none").level == "ok"


def test_packages_in_hand_are_no_interruption(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    code = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f,2); print('held',flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as apt:
        assert apt.stdout is not None
        assert apt.stdout.readline() == "held\n"
        with lock.open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = package_manager([lock], dpkg=state(tmp_path / "dpkg", ("gcc-12", "half-configured")))
        apt.communicate("")
    assert found.reason == "PACKAGE_MANAGER_LOCKED"


def test_dpkgs_own_words_are_recognised() -> None:
    words = "E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem."
    known = recognised(words)
    assert known is not None
    assert known.reason == "PACKAGE_MANAGER_INTERRUPTED"
