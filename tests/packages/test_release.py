"""`make release`: wheels that work without this source tree, and refusals of wheels that would not."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def release() -> Any:
    """Return tools/release.py as a module."""
    spec = importlib.util.spec_from_file_location("tools_release", ROOT / "tools" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.packages
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_release_is_built_and_used(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "release.py", "--dirty", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "wheels").glob("loraline_*.whl"))) == 8
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert len(sums) == 8 + len(list((tmp_path / "sbom").iterdir()))
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_all_packages_have_one_version(release: Any) -> None:
    assert release.one_version().count(".") == 2


def test_wheels_that_lack_a_module_or_bring_another_are_refused(release: Any, tmp_path: Path) -> None:
    source = ROOT / "packages" / "allinone" / "src"
    files = list(source.rglob("*.py")) + list(source.rglob("py.typed"))
    wheel = tmp_path / "loraline_allinone-0-py3-none-any.whl"

    def write(*left_out: str, extra: str = "") -> None:
        with zipfile.ZipFile(wheel, "w") as content:
            for file in files:
                if file.name not in left_out:
                    content.write(file, file.relative_to(source))
            content.writestr("loraline_allinone-0.dist-info/METADATA", "")
            if extra:
                content.writestr(extra, "")

    write()
    release.check_content(wheel, "packages/allinone")
    write("stages.py")
    with pytest.raises(release.ReleaseRefused, match=r"missing \['loraline/allinone/stages.py'\]"):
        release.check_content(wheel, "packages/allinone")
    write(extra="tests/secret.py")
    with pytest.raises(release.ReleaseRefused, match="secret"):
        release.check_content(wheel, "packages/allinone")


def test_a_server_that_does_not_start_is_no_release(release: Any, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("loraline", "echo broken; exit 3"), ("python", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    with pytest.raises(release.ReleaseRefused, match="broken"):
        release.check_serving(tmp_path, programs)
