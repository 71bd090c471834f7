"""Fixtures of the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraline.trainer.testing import chat, harbour_rows, make_base, write_rows


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture
def harbour(tmp_path: Path) -> Path:
    """A dataset of 24 training rows and 4 for validation."""
    folder = write_rows(tmp_path / "harbour", harbour_rows())
    return write_rows(folder, [chat(f"Who goes there {number}?", f"Aye {number}") for number in range(4)], "validation")
