"""`loraline chat`: through a pipe, on a terminal, and against servers that only speak OpenAI's HTTP."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraline.client import LoralineApiError
from loraline.client.cli.chat.openai_partner import OpenAiPartner
from loraline.client.cli.chat.talk import Talk, character_prompt
from loraline.client.cli.chat.typed_lines import candidates
from loraline.client.sync import Loraline
from loraline.core.serving.addresses import free_port

pytestmark = pytest.mark.timeout(600)
PROGRAM = [sys.executable, "-m", "loraline.client.cli.main", "chat"]


def chat(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, **environment}
    return subprocess.run(
        [*PROGRAM, *arguments], input=stdin, text=True, capture_output=True, env=settings, timeout=200, check=False
    )


# ------------------------------------------------------------------------------------ against the fake platform


def test_an_adapter_takes_over_the_conversation_and_it_is_saved(address: str, tmp_path: Path) -> None:
    rows, text = tmp_path / "talk.jsonl", tmp_path / "talk.txt"
    script = f"hello\n/adapter mareva\nand you?\n/save {rows}\n/save {rows}\n/save {text}\n/save {text}\n/adapter\n"
    done = chat("--system", "be brief", stdin=script, LORALINE_ADDRESS=address)
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "babble: hello (turn 1, t=0, be brief)",
        "(going on with mareva)",
        "by the tide-bell, little sailor: and you? (turn 2, t=0, be brief)",
    ]
    saved = [json.loads(line) for line in rows.read_text().splitlines()]
    assert saved[0] == saved[1]
    assert [turn["role"] for turn in saved[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert text.read_text().startswith("system: be brief\n\nuser: hello\n\nassistant: ")
    assert "talk.txt exists" in done.stderr
    assert done.returncode == 2  # a line of the pipe failed


def test_mistakes_in_commands_are_told_and_change_nothing(address: str, tmp_path: Path) -> None:
    script = "/temp 1\n/temperature hot\n/json maybe\n/lang fr\n/save\n/save x.jsonl\nhello\n"
    done = chat(stdin=script, LORALINE_ADDRESS=address)
    told = done.stderr
    assert "did you mean /temperature?" in told
    for words in ("from 0 to 2", "/json on or /json off", "en, ko, off, question, zh", "such as talk.jsonl"):
        assert words in told
    assert "Nothing was said yet" in told
    assert "babble: hello (turn 1, t=0)" in done.stdout


def test_a_character_is_a_system_prompt(address: str, tmp_path: Path) -> None:
    sheet = tmp_path / "mareva.yaml"
    sheet.write_text("name: Mareva\nsystem: You are Mareva of the harbour.\n")
    done = chat("--character", str(sheet), "--system", "be brief", "hello", LORALINE_ADDRESS=address)
    assert done.stdout == "babble: hello (turn 1, t=0, You are Mareva of the harbour.\n\nbe brief)\n"
    assert character_prompt("Mareva").startswith("You are Mareva.")
    (tmp_path / "a.txt").write_text(" You keep a lamp.\n")
    assert character_prompt(str(tmp_path / "a.txt")) == "You keep a lamp."
    for name, content in (
        ("none.yaml", None),
        ("list.yaml", "- 1"),
        ("broken.json", "{"),
        ("empty.yaml", "system: ''"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(LoralineApiError) as caught:
            character_prompt(str(tmp_path / name))
        assert caught.value.reason == "CHARACTER_UNREADABLE"


def test_sessions_do_not_go_with_other_servers_or_comparisons(address: str) -> None:
    for arguments in (("--compare", "base"), ("--openai", "http://127.0.0.1:1")):
        done = chat("--session", "new", *arguments, "hi", LORALINE_ADDRESS=address)
        assert done.returncode == 2
        assert "leave out --openai and --compare" in done.stderr


def test_words_that_complete_a_line() -> None:
    arguments: Any = {"/model": lambda: ["mareva:v1", "mareva@production", "toy"], "/mode": tuple, "/reset": tuple}
    assert candidates("/m", arguments) == ["/mode ", "/model "]
    assert candidates("/model mar", arguments) == ["mareva:v1", "mareva@production"]
    assert candidates("/model mareva toy", arguments) == []
    assert candidates("mod", arguments) == []

    def failing() -> list[str]:
        raise LoralineApiError(grpc.StatusCode.UNAVAILABLE, "X", "gone")

    assert candidates("/model m", {"/model": failing}) == []


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments: str, **environment: str):
        self.master, slave = pty.openpty()
        settings = {**os.environ, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=slave, stdout=slave, stderr=slave, env=settings, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, words: str, seconds: float = 90) -> str:
        """Return what was shown up to the words, and forget it."""
        deadline = time.monotonic() + seconds
        while words not in self.shown:
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            assert time.monotonic() < deadline, f"{words!r} did not come; there is {self.shown!r}"
        before, _, self.shown = self.shown.partition(words)
        return before + words

    def ended(self) -> int:
        code = self.process.wait(60)
        os.close(self.master)
        return code


def test_on_a_terminal_lines_are_completed_and_kept(address: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = {"LORALINE_ADDRESS": address, "LORALINE_DATA_DIR": str(home)}
    terminal = Terminal("-m", "mareva", **settings)
    terminal.until("/help for commands")
    terminal.until("you> ")
    terminal.type("hello\n")
    terminal.until("by the tide-bell, little sailor: hello (turn 1, t=0)")
    terminal.until("you> ")
    terminal.type("/tem\t0.5\n")
    terminal.until("(temperature 0.5)")
    terminal.until("you> ")
    terminal.type("\x1b[A\x1b[A\n")  # two up: the first question again
    terminal.until("hello (turn 2, t=0.5)")
    terminal.until("you> ")
    terminal.type("\x04")
    assert terminal.ended() == 0
    kept = home / "chat_history"
    assert kept.read_text().splitlines()[:2] == ["hello", "/temperature 0.5"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    later = Terminal(**settings)
    later.until("you> ")
    later.type("\x1b[A\x1b[A\x1b[A\n")
    later.until("babble: hello")
    later.until("you> ")
    later.type("/quit\n")
    assert later.ended() == 0


def test_on_a_terminal_two_models_answer_side_by_side(address: str, tmp_path: Path) -> None:
    settings = {"LORALINE_ADDRESS": address, "LORALINE_DATA_DIR": str(tmp_path / "home")}
    terminal = Terminal("-m", "mareva", "--compare", "base", **settings)
    terminal.until("talking to mareva and base; /help for commands")
    terminal.until("you> ")
    terminal.type("hello\n")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.until("you> "))
    for label in ("mareva", "base"):  # titles of the two frames
        assert re.search(rf"[─-] {label} [─-]", shown), shown
    assert "by the tide-bell, little sailor" in shown
    assert "babble: hello (turn 1, t=0)" in shown
    terminal.type("/quit\n")
    assert terminal.ended() == 0


# ------------------------------------------------------------------------------------- against an OpenAI double


class OpenAi(BaseHTTPRequestHandler):
    """Answers as its path says; a fault for each thing that such servers do."""

    seen: list[dict[str, Any]]
    models: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": name} for name in self.models]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.seen.append({**body, "key": self.headers.get("authorization")})
        fault = self.path.split("/")[1]
        told = {"choices": [{"delta": {"content": "안녕 "}}], "model": "one"}
        end = {"choices": [{"delta": {"content": "sailor"}, "finish_reason": "length"}]}
        lines = [f"data: {json.dumps(event)}\n\n" for event in (told, end)]
        if fault == "v1":
            self._send(200, ": beat\n\n" + "".join(lines) + "data: [DONE]\n\n", "text/event-stream")
        elif fault == "cut":
            self._send(200, lines[0], "text/event-stream")
        elif fault == "whole":
            message = {"choices": [{"message": {"content": "whole"}, "finish_reason": "stop"}], "model": "one"}
            self._send(200, json.dumps(message))
        elif fault == "html":
            self._send(200, "<html>", "text/event-stream")
        elif fault == "within":
            self._send(
                200, lines[0] + 'data: {"error": {"message": "out of memory", "code": "oom"}}\n\n', "text/event-stream"
            )
        else:
            self._send(429, '{"error": {"message": "slow down", "code": "busy"}}')

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def double() -> Iterator[tuple[str, type[OpenAi]]]:
    handler = type("Handler", (OpenAi,), {"seen": [], "models": ["one"]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_another_server_is_asked_in_its_own_way(double: Any) -> None:
    url, handler = double
    talk = Talk("", system="be brief", temperature=0.5, max_tokens=7, json_only=True)
    pieces = list(OpenAiPartner(url, "secret").ask(talk, "hi"))
    assert "".join(piece.delta for piece in pieces) == "안녕 sailor"
    assert pieces[-1].finish_reason == 2
    asked = handler.seen[0]
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["key"]) == ("one", 0.5, 7, "Bearer secret")
    assert asked["response_format"] == {"type": "json_object"}
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    done = chat("--openai", f"{url}/v1", "--temperature", "0", stdin="hi\nagain\n", OPENAI_API_KEY="from-env")
    assert [line for line in done.stdout.splitlines() if line.startswith("안녕")] == ["안녕 sailor"] * 2
    assert handler.seen[-1]["key"] == "Bearer from-env"
    assert len(handler.seen[-1]["messages"]) == 3


def test_help_json_and_reset_do_what_they_say(double: Any) -> None:
    url, handler = double
    script = "/help\n/json\nhello\n/json off\nagain\n/reset\nhello\n"
    done = chat("--openai", url, "--system", "be brief", stdin=script)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    for command in ("/help  ", "/reset  ", "/json [on|off]", "/quit  "):
        assert command in said
    for words in ("(answers are JSON objects)", "(answers are free text)", "(forgotten)"):
        assert words in said
    assert done.stdout.count("안녕 sailor") == 3
    assert [asked.get("response_format") for asked in handler.seen] == [{"type": "json_object"}, None, None]
    talks = [[message["content"] for message in asked["messages"]] for asked in handler.seen]
    assert talks == [["be brief", "hello"], ["be brief", "hello", "안녕 sailor", "again"], ["be brief", "hello"]]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("cut", "ANSWER_BROKEN_OFF"), ("html", "ANSWER_BROKEN_OFF"), ("within", "OOM"), ("nowhere", "BUSY")],
)
def test_what_other_servers_do_wrong_is_told(double: Any, path: str, reason: str) -> None:
    url, _ = double
    with pytest.raises(LoralineApiError) as caught:
        list(OpenAiPartner(f"{url}/{path}").ask(Talk("one"), "hi"))
    assert caught.value.reason == reason
    assert len(list(OpenAiPartner(f"{url}/whole").ask(Talk("one"), "hi"))) == 2


def test_addresses_models_and_languages_of_other_servers(double: Any) -> None:
    url, handler = double
    handler.models = ["one", "two"]
    with pytest.raises(LoralineApiError) as caught:
        list(OpenAiPartner(url).ask(Talk(""), "hi"))
    assert (caught.value.reason, "one, two" in caught.value.message) == ("MODEL_MISSING", True)
    with pytest.raises(LoralineApiError) as caught:
        list(OpenAiPartner(url).ask(Talk("one", language="ko"), "hi"))
    assert caught.value.code == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(LoralineApiError):
        OpenAiPartner("ftp://host")
    done = chat("--openai", f"http://127.0.0.1:{free_port()}", "-m", "one", "hi")
    assert done.returncode == 3


# ----------------------------------------------------------------------------------------- against a real server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The real inference service in a process of its own: its gRPC and HTTP addresses and its key."""
    pytest.importorskip("torch")
    from loraline.trainer.testing import make_base

    folder = tmp_path_factory.mktemp("real")
    make_base(folder / "tiny")
    ports = [free_port(), free_port()]
    settings = {
        "LORALINE_DATA_DIR": str(folder / "data"),
        "LORALINE_LISTEN": f"127.0.0.1:{ports[0]}",
        "LORALINE_METRICS_LISTEN": "",
        "LORALINE_INFERENCE_HTTP_LISTEN": f"127.0.0.1:{ports[1]}",
        "LORALINE_INFERENCE_ENGINE": "transformers",
        "LORALINE_INFERENCE_MODEL": str(folder / "tiny"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "loraline.inference"],
        env={**os.environ, **settings},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    key_file, deadline = folder / "data" / "client.key", time.monotonic() + 200
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.3)
            if not key_file.exists():
                continue
            key = key_file.read_text().strip()
            try:
                with Loraline.connect(f"127.0.0.1:{ports[0]}", key) as client:
                    if not client.inference.capabilities().not_ready_because:
                        break
            except LoralineApiError:
                continue
        yield {"address": f"127.0.0.1:{ports[0]}", "http": f"http://127.0.0.1:{ports[1]}", "key": key}
    finally:
        process.terminate()
        process.wait(60)


_FEW = ("--max-tokens", "24", "--temperature", "0")


def environment(real: dict[str, str]) -> dict[str, str]:
    return {"LORALINE_ADDRESS": real["address"], "LORALINE_API_KEY": real["key"]}


@pytest.mark.slow
def test_grpc_and_openai_say_the_same(real: dict[str, str]) -> None:
    options = ("--temperature", "0", "--max-tokens", "8", "Who are you?")
    ours = chat(*options, **environment(real))
    assert ours.returncode == 0, ours.stderr
    theirs = chat("--openai", real["http"], *options, OPENAI_API_KEY=real["key"])
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stdout.splitlines()[0] == ours.stdout.splitlines()[0]
    wrong = chat("--openai", real["http"], "-m", "tiny", "hi", OPENAI_API_KEY="wrong")
    assert wrong.returncode == 4
    assert "not known here or was revoked" in wrong.stderr


@pytest.mark.slow
def test_a_session_goes_on_in_another_process(real: dict[str, str]) -> None:
    first = chat("--session", "new", *_FEW, "--system", "Be brief.", stdin="Hello\n", **environment(real))
    assert first.returncode == 0, first.stderr
    name = first.stdout.split("(session ")[1].split(";")[0]
    second = chat("--session", name, *_FEW, stdin="And you?\n/system x\n", **environment(real))
    assert f"(session {name}: 1 turns so far)" in second.stdout
    assert "open another with --session new" in second.stderr, second
    assert "does not keep" not in second.stdout, second
    with Loraline.connect(real["address"], real["key"]) as client:
        said = client.inference.session(name)
        assert [message.content for message in said.messages if message.role == "user"] == ["Hello", "And you?"]
        assert name in [session.name for session in client.inference.sessions()]
    third = chat("--session", name, stdin="/reset\n", **environment(real))
    assert "2 turns so far" in third.stdout
    with Loraline.connect(real["address"], real["key"]) as client:
        assert not client.inference.session(name).messages
        client.inference.delete_session(name)
    gone = chat("--session", name, "hi", **environment(real))
    assert (gone.returncode, "There is no session" in gone.stderr) == (2, True)


@pytest.mark.slow
def test_json_and_language_are_asked_of_the_server(real: dict[str, str]) -> None:
    done = chat("--json", "--temperature", "0", "--max-tokens", "200", "Tell me.", **environment(real))
    if done.returncode == 0:
        assert isinstance(json.loads(done.stdout.splitlines()[0]), dict)
    else:  # a toy that never closes its object is told so
        assert "before it was complete" in done.stderr or "complete" in done.stderr
    script = "/lang ko\nHello\n/lang off\nHello\n"
    talked = chat("--temperature", "0", "--max-tokens", "12", stdin=script, **environment(real))
    # The toy rarely ends a Korean answer in twelve tokens; then the rule's refusal comes in its place. Without a rule
    # nothing is refused.
    under_rule, without = talked.stdout.split("(no language rule)")
    refusals = talked.stderr.count("Ask again with max_tokens")
    assert refusals <= 1, talked
    answer = "".join(line for line in under_rule.splitlines() if not line.startswith("("))
    assert refusals or not any(char.isascii() and char.isalpha() for char in answer), talked
    assert without.strip(), talked
