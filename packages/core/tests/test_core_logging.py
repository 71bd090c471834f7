"""Log lines: one JSON object each, libraries included, and no secret in any of them."""

import json
import logging

import pytest
import structlog

from loraline.core.logging import configure, mask


@pytest.fixture
def restored():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("authorization: Bearer abcdef123456", "abcdef123456"),
        ("key lora_ab12cd34_0123456789abcdef0123 refused", "0123456789abcdef0123"),
        ("sk-proj-abcdefgh12345678", "abcdefgh12345678"),
        ("postgresql://user:hunter22@db/x", "hunter22"),
        ("postgresql+psycopg://user:hun:ter22@db/x", "ter22"),
        ("api_key=secret12345&x=1", "secret12345"),
        ('{"s3_secret_key": "topsecret1"}', "topsecret1"),
        ("hf_abcdefghijklmnop", "abcdefghijklmnop"),
    ],
)
def test_secrets_are_masked(text, secret):
    assert secret not in mask(text)
    assert "***" in mask(text)


def test_ordinary_text_stays():
    text = "Resuming trainer-train-abcdefghijkm from checkpoint 50: loss 0.48 (http://127.0.0.1:9000/bucket)"
    assert mask(text) == text


def test_json_lines_of_ours_and_of_libraries(restored, capsys):
    configure("json", "info")
    structlog.get_logger("loraline.test").info("hello", url="http://u:hunter22@h/", job="j", password="abc", n=3)
    logging.getLogger("a.library").warning("connecting with %s", "Bearer abcdef123456")
    try:
        raise ValueError("lora_ab12cd34_0123456789abcdef0123")
    except ValueError:
        structlog.get_logger("loraline.test").exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0]["event"] == "hello" and lines[0]["n"] == 3 and lines[0]["password"] == "***"
    assert "hunter22" not in lines[0]["url"]
    assert lines[1]["event"] == "connecting with Bearer ***" and lines[1]["level"] == "warning"
    assert "0123456789abcdef0123" not in json.dumps(lines[2]) and "ValueError" in lines[2]["exception"]


def test_pretty_lines_and_levels(restored, capsys):
    configure("pretty", "warning")
    structlog.get_logger("x").info("quiet")
    structlog.get_logger("x").warning("loud", key="sk-abcdefgh12345678")
    text = capsys.readouterr().err
    assert "quiet" not in text and "loud" in text and "abcdefgh12345678" not in text
