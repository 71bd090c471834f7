"""`loraline keys`: the key is shown once, works, and stops working when revoked."""

import json
import stat

import pytest

from loraline.core.serving.auth import KeyRing

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    from loraline.core.serving.keys_command import register

    monkeypatch.setenv("LORALINE_DATA_DIR", str(tmp_path / "d"))
    app = typer.Typer()
    register(app)
    return lambda *arguments: CliRunner().invoke(app, ["keys", *arguments])


def test_create_list_revoke(invoke, tmp_path):
    path = tmp_path / "d" / "api_keys.json"
    made = invoke("create", "ann", "--role", "chat")
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    principal = KeyRing(path).verify(key)
    assert principal is not None and principal.roles == ("chat",)
    listed = invoke("list", "--format", "json")
    rows = json.loads(listed.stdout)
    assert [(row["name"], row["roles"]) for row in rows] == [("ann", ["chat"])]
    assert key not in listed.stdout and "sha256" not in listed.stdout
    assert "ann" in invoke("list").stdout
    assert invoke("revoke", "ann").exit_code == 0
    assert KeyRing(path).verify(key) is None


def test_mistakes_are_one_line_and_exit_one(invoke):
    assert invoke("create", "ann").exit_code == 0
    for arguments, words in (
        (("create", "ann"), "Revoke it first"),
        (("create", "bob", "--role", "admin"), "chat, operate"),
        (("revoke", "bob"), "Keys: ann"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr and "Traceback" not in result.output


def test_limits_are_made_and_listed(invoke, tmp_path):
    made = invoke("create", "ann", "--requests-per-minute", "60", "--tokens-per-minute", "5000")
    principal = KeyRing(tmp_path / "d" / "api_keys.json").verify(made.stdout.strip())
    assert principal is not None and (principal.requests_per_minute, principal.tokens_per_minute) == (60, 5000)
    assert "60 requests/min  5000 tokens/min" in invoke("list").stdout
    rows = json.loads(invoke("list", "--format", "json").stdout)
    assert (rows[0]["requests_per_minute"], rows[0]["tokens_per_minute"]) == (60, 5000)
    assert invoke("create", "bob", "--tokens-per-minute", "-1").exit_code == 2
