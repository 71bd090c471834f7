"""Rules of the repository that no other tool checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 300
LONGEST_TEST = 500  # contract suites keep one subject in one file


def _tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_loraline_is_a_namespace_everywhere() -> None:
    assert not list(ROOT.glob("*/*/src/loraline/__init__.py")), "loraline is shared by several packages"


def test_files_are_short() -> None:
    ours = [p for p in _tracked("*.py") if "_pb2" not in p.name and "migrations" not in p.parts]
    for path in ours:
        bound = LONGEST_TEST if "tests" in path.parts else LONGEST_FILE
        assert len(path.read_text().splitlines()) <= bound, f"{path.relative_to(ROOT)} is longer than {bound} lines"


def test_no_vague_module_names() -> None:
    vague = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert not [p for p in _tracked("*.py") if p.name in vague]


def test_locked_requirements_name_no_host() -> None:
    for path in _tracked("requirements/*.txt"):
        assert not re.search(r"https?://|--index-url|--find-links", path.read_text()), path
        if path.name != "overrides.txt":
            assert "--hash=sha256:" in path.read_text(), path


def test_stubs_carry_no_absolute_paths() -> None:
    assert not [p for p in _tracked("packages/api/src/*") if str(ROOT) in p.read_text()]


def test_each_stage_has_the_same_rooms() -> None:
    for stage in ("datagen", "trainer", "merger", "inference"):
        folder = ROOT / "services" / stage
        for name in ("pyproject.toml", "Dockerfile", "README.md"):
            assert (folder / name).is_file(), f"{folder}/{name}"
        for name in ("servicer.py", "config.py", "component.py", "__main__.py"):
            assert (folder / "src" / "loraline" / stage / name).is_file(), f"{stage}/{name}"


def test_servicers_are_light() -> None:
    """Importing a stage's component must not pull in torch: that happens in the child process or the engine."""
    code = (
        "import sys, loraline.datagen.component, loraline.trainer.component, loraline.merger.component, "
        "loraline.inference.component as _; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'peft', 'trl') if m in sys.modules])"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
