"""A seal with any bit flipped seals nothing."""

from __future__ import annotations

from pathlib import Path

from loraline.trainer import checkpoints


def test_no_flipped_bit_of_a_seal_goes_unseen(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"epoch": 1.5}')
    checkpoints.seal(folder)
    seal = folder / checkpoints.SEAL
    whole = seal.read_bytes()
    unseen = []
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            seal.write_bytes(flipped)
            if not checkpoints.damage(folder):
                unseen.append((position, bit, bytes(flipped[max(0, position - 8) : position + 8])))
    assert unseen == []
    seal.write_bytes(whole)
    assert checkpoints.damage(folder) == ""
