"""Every rule on rows that break it, with the rows named, and on the persona example, which breaks none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraline.datagen.quality.catalogue import CODES
from loraline.datagen.quality.rules import spacing
from loraline.datagen.quality.settings import CheckSettings, Language

from .quality_data import check, found, persona, row

TRAIN_ROWS = 396
RECOMMENDED = '{"recommend": "%s", "challenges": [{"title": "%s", "description": "%s"}]}'
LONG = (
    "The keeper counts every boat that passes the bar, writes the number on the slate, and wipes it off at dawn. "
    "Nobody ever asked for the numbers, but the harbour sleeps better when somebody knows how many are out."
)


def among(*rows: Any, **settings: Any) -> tuple[list[Any], CheckSettings]:
    """Put rows behind the example's training rows: they stand at train.jsonl:397 and after."""
    return [*persona()[:TRAIN_ROWS], *rows], CheckSettings(**settings)


def places(*numbers: int) -> list[str]:
    return [f"train.jsonl:{TRAIN_ROWS + number}" for number in numbers]


GOOD = row("What now?", "We wait for the tide, as always.")


@pytest.mark.parametrize(
    ("rows", "settings", "code", "numbers"),
    [
        (["not json", [1], {"messages": [{"role": "tool", "content": "x"}]}, GOOD], {}, "ROW_INVALID", (1, 2, 3)),
        ([{"messages": [{"role": "user", "content": "Alone?"}]}, GOOD], {}, "ROW_WITHOUT_ASSISTANT", (1,)),
        ([GOOD, row("And then?", " ")], {}, "EMPTY_CONTENT", (2,)),
        ([GOOD, row("And then?", "Then we sail. ")], {}, "UNTRIMMED_CONTENT", (2,)),
        ([GOOD, GOOD, row("Who?", "Me."), GOOD], {}, "EXACT_DUPLICATES", (2, 4)),
        ([row("Why count?", LONG), GOOD, row("Why count?", LONG.replace("dawn", "dusk"))], {}, "NEAR_DUPLICATES", (3,)),
        (
            [
                row("潮水什么时候来？", "潮水每天来两次，晚上那一次更高，灯塔下面的石阶会全部被海水盖住。"),
                GOOD,
                row("潮水什么时候来？", "潮水每天来两次，晚上那一次最高，灯塔下面的石阶会全部被海水盖住。"),
            ],
            {}, "NEAR_DUPLICATES", (3,),
        ),
        ([row("Go.", "Sure: {}", format="json"), GOOD, row("Go.", "[1]", format="json")], {}, "NOT_JSON", (1, 3)),
        ([row("Go.", '{"a": 1}\n{"b": 2}', kind="commands")], {}, "NOT_JSON", (1,)),
        ([row("Go.", '```json\n{"a": 1}\n```', format="json")], {}, "FENCED_JSON", (1,)),
        ([GOOD, row("Go.", '{"a": 1}')], {"answer_format": "newline"}, "WRONG_FORMAT", (2,)),
        (
            [
                row("Tired.", RECOMMENDED % ("Rest.", "Walk", "Go outside."), kind="recommendation"),
                row("Sad.", '{"recommend": "Sing."}', kind="recommendation"),
                row("Sad.", '{"recommend": "Sing.", "challenges": [{"title": "x"}]}', kind="recommendation"),
            ],
            {}, "SCHEMA_MISMATCH", (2, 3),
        ),
        (
            [
                row("Tired.", RECOMMENDED % ("Rest.", "Walk", "Go outside."), kind="recommendation"),
                row("Sad.", RECOMMENDED % ("Sing.", " ", "Loudly."), kind="recommendation"),
            ],
            {}, "EMPTY_FIELD", (2,),
        ),
        (
            [row("Go.", '{"act": "x"}', format="json"), row("Go on.", '{"act": 1}', format="json")],
            {"answer_schema": {"properties": {"act": {"type": "string"}}}}, "SCHEMA_MISMATCH", (2,),
        ),
        # 100 characters that readers see: a family of three is one, and so is a syllable of three letters.
        ([row("Well?", "👨‍👩‍👧" * 100, kind="feedback"), row("So?", "ha" * 51, kind="feedback")], {},
         "ANSWER_TOO_LONG", (2,)),
        ([row("Well?", "각" * 300)], {"max_response_characters": 299}, "ANSWER_TOO_LONG", (1,)),
        ([row("Hm?", "A box: \ufffd"), row("Oh?", "cafÃ© au lait"), row("Eh?", "ring\u0007 it"), GOOD], {},
         "BROKEN_TEXT", (1, 2, 3)),
        ([row("뭐 해?", "공HED를 던져요."), row("뭐 해?", "AI가 답해요. ㅋㅋ"), row("뭐?", "안ㅈ녕히 가세요.")], {},
         "BROKEN_TOKENS", (1, 3)),
        ([row("Na?", "cafe\u0301"), row("뭐?", "\u1112\u1161\u11ab"), row("No?", "zero\u200bwidth"), GOOD], {},
         "NOT_NORMALISED", (1, 2, 3)),
        ([row("Tell.", '{"a": "b"}'), GOOD], {}, "MIXED_FORMATS", (1,)),
    ],
)  # fmt: skip
def test_a_fault_is_found_in_its_rows_and_nowhere_else(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], code: str, numbers: tuple[int, ...]
) -> None:
    train, limits = among(*rows, **settings)
    if "max_response_characters" in settings:
        train = rows
        numbers = tuple(number - TRAIN_ROWS for number in numbers)
    checked = check(tmp_path / "d", train, persona()[TRAIN_ROWS:], limits)
    assert found(checked)[code] == places(*numbers)
    finding = next(finding for finding in checked.findings if finding.code == code)
    assert finding.row_count == len(numbers)
    assert finding.message


def test_a_stated_mix_of_lines_and_json_passes(tmp_path: Path) -> None:
    """A template's mix says of each row how it is written; lines of a kind that mostly promises JSON are no fault."""
    lines = row("Tired.", "Rest.\nWalk: go outside.", kind="recommendation", format="newline")
    formal = row("Sad.", RECOMMENDED % ("Sing.", "Hum", "Loudly."), kind="recommendation", format="json")
    broken = row("Cold.", "Warm up.", kind="recommendation", format="json")
    train, settings = among(lines, formal, broken)
    told = found(check(tmp_path, train, persona()[TRAIN_ROWS:], settings))
    assert told.get("NOT_JSON") == places(3)
    assert not {"SCHEMA_MISMATCH", "WRONG_FORMAT"} & set(told)


def test_the_persona_example_breaks_no_rule(tmp_path: Path) -> None:
    """416 rows in Chinese and English with a form of address in most answers: nothing but that they are few."""
    rows = persona()
    assert found(check(tmp_path, rows[:TRAIN_ROWS], rows[TRAIN_ROWS:])) == {}


def test_the_persona_example_keeps_the_language_rules_of_its_halves(tmp_path: Path) -> None:
    rows = persona()
    chinese = [made for made in rows if any("\u4e00" <= char <= "\u9fff" for char in made["messages"][-1]["content"])]
    english = [made for made in rows if made["messages"][-1]["content"].isascii()]
    assert len(chinese) > 150
    assert len(english) > 150
    halves: tuple[tuple[Language, Any], ...] = (("zh", chinese), ("en", english))
    for name, half in halves:
        settings = CheckSettings(language=name, forbid=frozenset({"emoji", "markdown"}))
        assert set(found(check(tmp_path / name, half, half[:1], settings))) == {"EXACT_DUPLICATES", "LEAKAGE"}


@pytest.mark.parametrize(
    ("language", "forbid", "answers", "expected"),
    [
        ("ko", (), ["오늘은 쉬세요.", "Rest today.", "今天休息吧。", "12:30"], {"WRONG_LANGUAGE": [2, 3]}),
        ("ko", (), ["오늘은 쉬세요.", "오늘은 요가 class 어때요?"], {"FOREIGN_LETTERS": [2]}),
        ("zh", (), ["今天休息吧。", "今天 OK 吧。", "오늘은 쉬세요."], {"WRONG_LANGUAGE": [3], "FOREIGN_LETTERS": [2]}),
        ("en", (), ["Rest today.", "今天休息吧。", "Café is fine.", "Rest 今 today, friend."],
         {"WRONG_LANGUAGE": [2], "FOREIGN_LETTERS": [4]}),
        ("en", (), ["Le phare est très loin de la ville, mais vous pouvez y aller avec nous demain.",
                    "Der Leuchtturm ist nicht weit und du kannst auch mit dem Boot zu der Insel fahren.",
                    "El faro está muy lejos de la ciudad pero puedes ir con nosotros por la mañana.",
                    "Mercusuar itu tidak jauh dan kamu bisa pergi dengan perahu ke pulau ini juga.",
                    "The café on the rue de la Mer serves a crème brûlée that is worth the walk.",
                    "Say la la la la la, no one will mind."],
         {"WRONG_LANGUAGE": [1, 2, 3, 4]}),
        ("ko", (), ['{"recommend": "쉬세요."}', '{"recommend": "rest"}'], {"WRONG_LANGUAGE": [2]}),
        ("", ("latin",), ["오늘은 쉬세요.", "요가 class"], {"FORBIDDEN_LATIN": [2]}),
        ("", ("digits",), ["오늘은 쉬세요.", "물 3잔", "물 ３잔"], {"FORBIDDEN_DIGITS": [2, 3]}),
        ("", ("emoji",), ["오늘은 쉬세요 ♪ → ™", "좋아요 👍🏽", "집 🏠", "국기 🇰🇷"], {"FORBIDDEN_EMOJI": [2, 3, 4]}),
        ("", ("markdown",), ["2 * 3 * 4 = 24, a_b_c - yes", "**so**", "# Title", "- a\n- b", "see [x](y)", "a `b` c"],
         {"FORBIDDEN_MARKDOWN": [2, 3, 4, 5, 6]}),
    ],
)  # fmt: skip
def test_language_and_what_is_forbidden(
    tmp_path: Path, language: Any, forbid: Any, answers: list[str], expected: dict[str, list[int]]
) -> None:
    rows = [row(f"Question {number}?", answer) for number, answer in enumerate(answers)]
    told = found(check(tmp_path, rows, (), CheckSettings(language=language, forbid=frozenset(forbid))))
    kept = {code: rows for code, rows in told.items() if code.startswith(("FORBIDDEN", "WRONG", "FOREIGN"))}
    assert kept == {code: [f"train.jsonl:{number}" for number in numbers] for code, numbers in expected.items()}


def test_leakage_names_the_validation_rows(tmp_path: Path) -> None:
    rows = persona()
    first = rows[0]["messages"][0]["content"]
    near = row("Why count?", LONG)
    validation = [*rows[TRAIN_ROWS:], row(first.upper(), "Another answer altogether."), near]
    told = found(check(tmp_path, [*rows[:TRAIN_ROWS], row("Why count them?", LONG)], validation))
    assert told == {
        "LEAKAGE": ["validation.jsonl:21"],
        "NEAR_LEAKAGE": ["validation.jsonl:22"],
        "NEAR_DUPLICATES": ["validation.jsonl:22"],
    }


def test_korean_with_spaces_within_words(tmp_path: Path) -> None:
    pytest.importorskip("kiwipiepy")
    good = [
        "천천히 해 주시면 도와 드릴 수 있을 것 같아요.",
        "먹어 보고 나서 국립 중앙 도서관 앞에서 세 시 반에 만나기로 했어요.",
        "그 사람은 아는 것이 많은 데다가 말도 잘해서 인기가 많다.",
    ]
    bad = ["오늘 은 날씨 가 참 좋 아서 공원 에 산책 을 나갔 습니다.", "안 녕하 세요 저는 여 러분의 도 우미 입 니다."]
    rows = [row(f"질문 {number}?", answer) for number, answer in enumerate([*good, *bad])]
    checked = check(tmp_path, rows, [GOOD])
    assert found(checked) == {"SPACING_ERRORS": ["train.jsonl:4", "train.jsonl:5"]}
    assert "spaces within words" in next(finding.message for finding in checked.findings)


def test_an_empty_dataset_and_one_without_validation(tmp_path: Path) -> None:
    assert set(found(check(tmp_path / "a", []))) == {"EMPTY_DATASET"}
    assert set(found(check(tmp_path / "b", persona()))) == {"NO_VALIDATION_ROWS"}
    checked = check(tmp_path / "c", persona()[:499] * 2)
    assert "FEW_ROWS" not in {finding.code for finding in checked.findings}


def test_korean_without_spaces(tmp_path: Path) -> None:
    pytest.importorskip("kiwipiepy")
    good = [
        "오늘은 창문을 열고 천천히 숨을 쉬어 보세요.",
        "물을 한 잔 마시고 가까운 공원을 걸어 보세요.",
        "ㅋㅋ 좋아요!",
    ]
    bad = ["오늘은창문을열고천천히숨을쉬어보세요.", "친구와함께공원을걸어보세요"]
    rows = [row(f"질문 {number}?", answer) for number, answer in enumerate([*good, *bad])]
    assert found(check(tmp_path, rows, [GOOD])) == {"SPACING_ERRORS": ["train.jsonl:4", "train.jsonl:5"]}


def test_korean_where_the_analyser_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kiwipiepy", None)
    assert spacing._analyser() is None
    checked = check(tmp_path, [GOOD, row("뭐 해?", "친구와함께공원을걸어보세요")], [row("So?", "Yes, so.")])
    assert found(checked) == {"SPACING_NOT_CHECKED": ["train.jsonl:2"]}
    finding = next(finding for finding in checked.findings if finding.code == "SPACING_NOT_CHECKED")
    assert "loraline-datagen[korean]" in finding.meaning.remedy


def test_every_code_is_told_in_full() -> None:
    for code, meaning in CODES.items():
        assert meaning.why.endswith("."), code
        assert meaning.remedy.endswith("."), code
        assert not meaning.says or meaning.says.endswith("."), code
