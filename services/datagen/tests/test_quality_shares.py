"""Rules about the dataset as a whole: monotony, variety, instructions, and the base model's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from loraline.core.errors import LoralineError
from loraline.datagen.quality.digests import DigestGroups
from loraline.datagen.quality.seen import LineIndex
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.quality.tally import FirstRows, Frequent

from .quality_data import check, found, persona, row

TRAIN_ROWS = 396


def with_persona(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the rows before the example's: they stand at train.jsonl:1 and after."""
    return [*rows, *persona()[:TRAIN_ROWS]]


def varied(count: int, seed: int = 0) -> list[str]:
    """Return sentences that share few words."""
    source = random.Random(seed)
    letters = "bdfgklmnprstvz"

    def word() -> str:
        return "".join(source.choice(letters) + source.choice("aeiou") for _ in range(source.randint(2, 4)))

    return [" ".join(word() for _ in range(9)).capitalize() + "." for _ in range(count)]


def first(count: int) -> list[str]:
    return [f"train.jsonl:{number}" for number in range(1, min(count, 20) + 1)]


OPENED = [row(f"Ask {n}?", f"Well now, dear {text}") for n, text in enumerate(varied(120))]
FRAMED = [row(f"Ask {n}?", f"Well now, dear {text} So sleep well tonight.") for n, text in enumerate(varied(60))]
ONE_LINE = [row(f"Say a line.\nCase {n}", text) for n, text in enumerate(varied(420))]
NO_INPUT = [row("Say a line.", text) for text in varied(120)]
SYSTEM = [
    {**made, "messages": [{"role": "system", "content": "You keep the lamp."}, *made["messages"]]} for made in persona()
]
POOL = [row(f"{text}?", varied(10, 1)[n % 10]) for n, text in enumerate(varied(60))]
WORDS = [
    row(f"{text}?", " ".join(["the lamp is", "a boat is", "the sea is"][(n >> k) % 3] for k in range(9)) + f" {n}.")
    for n, text in enumerate(varied(120))
]
SENTENCES = [row(f"{text}?", f"Sleep well now, friend. Mind the tide. {text}") for text in varied(60)]
EMOJI = [row(f"{text}?", f"{text} {'⛵' if n else '🌊'}") for n, text in enumerate(varied(40))]
MANY_EMOJI = [row(f"{text}?", f"{text} {'⛵🌊🐟🔔🌙☀'[n % 6]}") for n, text in enumerate(varied(40))]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (with_persona(OPENED), {"SAME_OPENING": first(120)}),
        (with_persona(OPENED[:90]), {}),
        (with_persona(FRAMED), {"SAME_TEMPLATE": first(60)}),
        (with_persona(FRAMED[:40]), {}),
        (ONE_LINE, {"FIXED_INSTRUCTION": first(20)}),
        (with_persona(ONE_LINE[:380]), {}),
        (with_persona(NO_INPUT), {"MISSING_INPUT": first(20)}),
        (with_persona(NO_INPUT[:90]), {}),
        (SYSTEM, {"REPEATED_SYSTEM_PROMPT": first(20)}),
        ([*SYSTEM[:350], *persona()[350:]], {}),
        (POOL, {"SMALL_ANSWER_POOL": [f"train.jsonl:{n}" for n in range(11, 31)], "LOW_SENTENCE_VARIETY": None}),
        (WORDS, {"LOW_DISTINCT_N": [], "SAME_OPENING": None}),
        (SENTENCES, {"LOW_SENTENCE_VARIETY": first(20), "SAME_OPENING": first(20)}),
        (with_persona(EMOJI), {"LOW_EMOJI_VARIETY": first(20)}),
        (with_persona(MANY_EMOJI), {}),
    ],
)
def test_shares(tmp_path: Path, train: list[Any], expected: dict[str, list[str] | None]) -> None:
    told = dict(found(check(tmp_path, train, [row("Any more?", "No, that was the last of them.")])))
    told.pop("NEAR_DUPLICATES", None) if expected else None
    told.pop("SAME_TEMPLATE", None) if train is WORDS else None
    assert told == {code: told[code] if rows is None else rows for code, rows in expected.items()}


def test_shares_of_a_handful_of_rows_are_not_told(tmp_path: Path) -> None:
    assert found(check(tmp_path, NO_INPUT[:15], NO_INPUT[15:17])) == {
        "LEAKAGE": ["validation.jsonl:1", "validation.jsonl:2"]
    }


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that knows the example's Chinese and English, and no Hangul."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [message["content"] for made in persona() for message in made["messages"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_the_persona_example_suits_a_tokenizer_made_from_it(tmp_path: Path, byte_level: Path) -> None:
    rows = persona()
    settings = CheckSettings(tokenizer=byte_level, max_length=512)
    checked = check(tmp_path, rows[:TRAIN_ROWS], rows[TRAIN_ROWS:], settings)
    assert found(checked) == {}
    assert 20 < max(checked.figures()["tokens"]) < 512


def test_truncation_against_a_tokenizer(tmp_path: Path, byte_level: Path) -> None:
    cut = [row("Why?", "Because " + " ".join(varied(40))), row(" ".join(varied(40, 2)), "No."), row("Who?", "Me.")]
    settings = CheckSettings(tokenizer=byte_level, max_length=256)
    checked = check(tmp_path, [*persona()[:TRAIN_ROWS], *cut], persona()[TRAIN_ROWS:], settings)
    assert found(checked) == {"ROW_TRUNCATED": ["train.jsonl:397"], "ANSWER_CUT_AWAY": ["train.jsonl:398"]}
    finding = next(finding for finding in checked.findings if finding.code == "ROW_TRUNCATED")
    longest = max(checked.figures()["tokens"])
    assert f"the longest has {longest}" in finding.message
    assert "tokens of all rows would be cut off: " in finding.message
    told = checked.figures()["truncated"]
    assert {one["row"] for one in told["worst"]} == {"train.jsonl:397", "train.jsonl:398"}
    assert told["worst"][0]["lost"] == longest - 256 and told["worst"][0]["tokens"] == longest
    assert f"{told['worst'][0]['row']} loses {longest - 256} of {longest}" in finding.message
    assert sum(told["rows_by_share_lost"].values()) == 2


def test_letters_that_are_written_byte_by_byte(tmp_path: Path, byte_level: Path) -> None:
    korean = [row(f"질문 {n}?", "오늘은 바다가 아주 조용하고 하늘은 맑아요.") for n in range(2)]
    settings = CheckSettings(tokenizer=byte_level)
    assert found(check(tmp_path / "a", [*korean, *persona()[:10]], [], settings))["BYTE_SOUP"] == first(2)
    assert "BYTE_SOUP" not in found(check(tmp_path / "b", with_persona([row("Ω?", "A sign.")]), [], settings))


def test_characters_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "潮": 1, "水": 2, "é": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [row("a", "潮水"), row("b", "é"), row("c", "潮汐"), row("d", "水")]
    told = found(check(tmp_path / "d", rows, [], CheckSettings(tokenizer=tmp_path / "tokenizer.json")))
    assert told["UNKNOWN_CHARACTERS"] == ["train.jsonl:3"]
    assert "UNKNOWN_CHARACTERS" not in found(
        check(tmp_path / "e", rows[:2], [], CheckSettings(tokenizer=tmp_path / "tokenizer.json"))
    )


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoralineError) as caught:
        check(tmp_path / "d", [], [], CheckSettings(tokenizer=tmp_path / "tokenizer.json"))
    assert caught.value.reason == "TOKENIZER_UNUSABLE"


def test_first_rows_and_frequent_values_in_bounded_memory() -> None:
    numbers = list(range(1, 5001))
    random.Random(1).shuffle(numbers)
    rows = FirstRows()
    rows.extend(numbers)
    assert (rows.count, rows.numbers) == (5000, list(range(1, 21)))
    frequent = Frequent(capacity=100)
    for number in range(1, 10_001):
        frequent.add("often" if number % 10 == 0 else f"once {number}", number)
    (value, kept), *_ = frequent.top(1)
    assert (value, kept.numbers[:2]) == ("often", [10, 20])
    assert 900 <= kept.count <= 1000
    assert len(frequent._rows) <= 200


def test_groups_of_digests_spill_to_disk_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraline.datagen.quality.digests.SPILL_BYTES", 100)
    source = random.Random(5)
    digests = [source.randbytes(16) for _ in range(700)]
    drawn = [source.choice(digests) for _ in range(2000)]
    groups = DigestGroups(tmp_path, "x")
    for number, digest in enumerate(drawn):
        groups.add(digest, number)
    expected = {tuple(n for n, d in enumerate(drawn) if d == digest) for digest in set(drawn)}
    assert {tuple(int(n) for n in group) for group in groups.groups()} == {g for g in expected if len(g) > 1}
    assert groups.distinct == len(expected)
    assert any(tmp_path.iterdir())


def test_places() -> None:
    index = LineIndex()
    numbers = [index.number("train.jsonl", 1), index.number("train.jsonl", 7), index.number("validation.jsonl", 2)]
    assert [index.place(number) for number in numbers] == ["train.jsonl:1", "train.jsonl:7", "validation.jsonl:2"]
