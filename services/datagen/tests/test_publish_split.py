"""The split's promises for any rows, and the spool that writes by it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from loraline.api.artifact.v1 import artifact_pb2
from loraline.datagen.digest_set import DigestSet
from loraline.datagen.publish.card import DataCard
from loraline.datagen.publish.split import validation_rows
from loraline.datagen.publish.spool import RowSpool
from loraline.datagen.quality.checks import check_folder
from loraline.datagen.rows import Row, conversation, prompt_digest


def validation_prompts(prompts: list[bytes], fraction: float, seed: int) -> set[bytes]:
    """Return the prompts that are chosen, after seeing that all rows of each are."""
    digests = [hashlib.sha256(prompt).digest()[:16] for prompt in prompts]
    chosen = validation_rows(b"".join(digests), fraction, seed)
    sides: dict[bytes, set[bool]] = {}
    for prompt, side in zip(prompts, chosen, strict=True):
        sides.setdefault(prompt, set()).add(bool(side))
    assert all(len(found) == 1 for found in sides.values())
    return {prompt for prompt, found in sides.items() if True in found}


@given(st.lists(st.integers(0, 3000).map(lambda n: hashlib.sha256(str(n).encode()).digest()), max_size=4000))
def test_a_digest_set_is_a_set(digests: list[bytes]) -> None:
    compact, real = DigestSet(), set[bytes]()
    for digest in digests:
        assert (digest in compact) == (digest in real)
        assert compact.add(digest) == (digest not in real)
        real.add(digest)
    assert len(compact) == len(real)
    assert compact.add(bytes(16))
    assert bytes(16) in compact


Prompts = st.lists(st.integers(0, 40).map(lambda n: str(n).encode()), max_size=120)
Fractions = st.one_of(st.just(0.0), st.floats(0.001, 0.95))


@settings(deadline=None)
@given(Prompts, Fractions, st.integers())
def test_split(prompts: list[bytes], fraction: float, seed: int) -> None:
    chosen = validation_prompts(prompts, fraction, seed)
    groups = Counter(prompts)
    taken = sum(groups[prompt] for prompt in chosen)
    assert chosen <= groups.keys()
    assert validation_prompts(prompts[::-1], fraction, seed) == chosen
    if fraction == 0 or len(groups) < 2:
        assert not chosen
        return
    assert 1 <= taken < len(prompts)
    wanted = max(1, round(fraction * len(prompts)))
    assert taken <= wanted or len(chosen) == 1
    if set(groups.values()) == {1}:
        assert taken == min(wanted, len(groups) - 1)


def test_the_seed_decides() -> None:
    prompts = [str(n).encode() for n in range(100)]
    assert validation_prompts(prompts, 0.1, 1) != validation_prompts(prompts, 0.1, 2)


def test_prompts_that_differ_in_form_only_are_equal() -> None:
    def digest(prompt: str, system: str = "") -> bytes:
        return prompt_digest(conversation(prompt, "x", system))

    assert digest("Hello!") == digest(" hello！ ", "system")
    assert digest("Hello!") != digest("Hello?")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=40), st.booleans())
def test_spooled_rows_all_arrive_once_and_in_order(tmp_path_factory, drawn, drop: bool) -> None:  # type: ignore[no-untyped-def]
    folder: Path = tmp_path_factory.mktemp("spool")
    spool = RowSpool(folder, drop_duplicates=drop)
    for number, (prompt, answer) in enumerate(drawn):
        spool.add(Row(conversation(f"p{prompt}", f"a{answer}"), "dialogue", "r", f"f:{number}"), "f")
    (folder / "out").mkdir()
    train, validation = spool.write(folder / "out", 0.2, 3)
    spool.close()
    assert not (folder / "rows.jsonl").exists()
    assert train + validation == len(set(drawn) if drop else drawn)
    assert spool.outcomes["accepted"] + spool.outcomes["duplicate"] == len(drawn)
    written = [json.loads(line) for line in (folder / "out" / "train.jsonl").read_text().splitlines()]
    numbers = [int(row["source"].split(":")[1]) for row in written]
    assert numbers == sorted(numbers)
    assert (folder / "out" / "validation.jsonl").exists() == (validation > 0)
    codes = {finding.code for finding in check_folder(folder / "out").findings}
    assert "LEAKAGE" not in codes
    assert ("EXACT_DUPLICATES" in codes) == (not drop and len(set(drawn)) < len(drawn))


def test_the_card_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    texts: list[bytes] = []
    raw = artifact_pb2.ArtifactRef(kind=artifact_pb2.ARTIFACT_KIND_SOURCE, name="raw", version=1, digest="sha256:12")
    for name in ("a", "b"):
        spool = RowSpool(tmp_path, drop_duplicates=True)
        for number in range(30):
            spool.add(Row(conversation(f"question | {number}", "好" * number + "!"), "dialogue", "r", "f:1"), "f")
        folder = tmp_path / name
        folder.mkdir()
        train, validation = spool.write(folder, 0.1, 0)
        DataCard("x", train, validation, spool.statistics, spool.outcomes, {"s": 1}, [raw]).write(folder)
        texts.append(b"".join(path.read_bytes() for path in sorted(folder.iterdir())))
    assert texts[0] == texts[1]
    card = json.loads((tmp_path / "a" / "data_card.json").read_text())
    assert card["rows"] == {"train": 27, "validation": 3, "answers": 30}
    assert card["characters"]["answer"] == {"min": 1, "median": 15, "mean": 15.5, "p95": 29, "max": 30}
    assert "source/raw:v1" in (tmp_path / "a" / "README.md").read_text()
