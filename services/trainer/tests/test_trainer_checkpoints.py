"""Checkpoints: torn, cut or flipped ones are never gone on from; rotation keeps the last and the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraline.trainer import checkpoints


def make(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * step)
    (path / "trainer_state.json").write_text('{"epoch": 1.5, "log_history": [{"loss": 2.0, "step": 3}]}')
    if sealed:
        checkpoints.seal(path)
    return path


def test_a_sealed_checkpoint_is_good(tmp_path: Path) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    assert checkpoints.newest_good(tmp_path) == (newest, {})
    assert checkpoints.trainer_state(newest)["epoch"] == 1.5


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "adapter_model.safetensors"),
        lambda path: flip(path / "trainer_state.json"),
        lambda path: (path / "adapter_model.safetensors").write_bytes(b""),
        lambda path: (path / "trainer_state.json").unlink(),
        lambda path: (path / checkpoints.SEAL).unlink(),
        lambda path: (path / checkpoints.SEAL).write_text("{"),
        lambda path: (path / checkpoints.SEAL).write_text('{"sha256": {}}'),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    damage(newer)
    found, torn = checkpoints.newest_good(tmp_path)
    assert found == older
    assert list(torn) == ["checkpoint-10"]


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 100)
    (tmp_path / "checkpoint-abc").mkdir()
    assert checkpoints.newest_good(tmp_path)[0] == newest


def test_rotation_keeps_the_newest_the_best_and_torn_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        make(tmp_path, step)
    make(tmp_path, 60, sealed=False)
    checkpoints.rotate(tmp_path, keep=1, best=tmp_path / "checkpoint-20")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (20, 40, 50, 60)]
