"""The command: in this process for its words and exit codes, as a program in a pipe for its bytes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import unicodedata
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from loraline.api.job.v1 import job_pb2
from loraline.client.cli import main as command
from loraline.client.cli.commands.jobs import _what_happened
from loraline.client.cli.lossplot import draw, smoothed
from loraline.client.cli.output import clean, seconds_text, size_text
from loraline.client.pipeline.stagejobs import StageJobs

PROGRAM = [sys.executable, "-m", "loraline.client.cli.main"]


def call(*arguments, stdin=""):
    return CliRunner().invoke(command.build(), list(arguments), input=stdin)


def program(*arguments, address="", stdin="", **environment):
    settings = {"LORALINE_ADDRESS": address, **environment}
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=stdin,
        text=True,
        capture_output=True,
        env={**os.environ, **settings},
        timeout=60,
        check=False,
    )


def assert_plain(text: str):
    control = {char for char in text if unicodedata.category(char) == "Cc" and char not in "\n"}
    assert not control, control


def test_a_pipeline_in_a_pipe(address, pipeline):
    done = program("run", pipeline, address=address, FORCE_COLOR="1", TERM="xterm-256color")
    assert done.returncode == 0, done.stderr
    assert_plain(done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    assert "train: 50%  step 4/8  loss 1.4" in lines
    assert len([line for line in lines if line.startswith("train: ") and "%" in line]) == 4, "quarters, not steps"
    assert any(line.startswith("dataset:dialogue: warning: 2 rows set aside") for line in lines)
    assert "  tuned: by the tide-bell, little sailor: hello (turn 1, t=0)" in lines
    assert "  base model: babble: hello (turn 1, t=0)" in lines
    assert sum(line.startswith("  ok ") for line in lines) == 4
    again = program("run", pipeline, address=address)
    assert again.stdout.count("already done") == 14  # each of the seven stages as it goes by and in the table


def test_a_pipeline_in_json(address, pipeline):
    done = program("run", pipeline, "--format", "json", address=address)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["type"] for event in events} == {"started", "sent", "remark", "event", "finished", "summary"}
    summary = events[-1]
    assert all(entry["passed"] for entry in summary["evidence"])
    train = next(stage for stage in summary["stages"] if stage["stage"] == "train")
    assert train["artifact"] == "adapter/mareva:v1" and train["result"]["receipt"]["rows"] == 40
    assert train["result"]["adapter"]["text"] == "adapter/mareva:v1"


def test_a_failing_stage_says_where_why_and_what_next(address, pipeline):
    pipeline.write_text(pipeline.read_text().replace("epochs: 3", "epochs: 13"))
    done = program("run", pipeline, address=address)
    assert done.returncode == 1
    assert "error: The dataset holds rows without an answer." in done.stderr
    assert f"where: stage train of {pipeline}" in done.stderr
    assert "rows train.jsonl:17 is empty" in done.stderr and "loraline jobs resume trainer.train-" in done.stderr
    assert "Traceback" not in done.stderr
    assert program("run", pipeline, address=address).returncode == 0


def test_a_refused_request_names_the_field(address, pipeline):
    pipeline.write_text(pipeline.read_text().replace("lora_r: 16", "lora_r: 1024"))
    done = program("run", pipeline, address=address)
    assert done.returncode == 2 and "parameters.lora.r 512 is the greatest rank" in done.stderr


def test_a_misspelt_file_asks_no_server(pipeline):
    pipeline.write_text(pipeline.read_text().replace("epochs", "epoch"))
    done = call("run", str(pipeline))
    assert done.exit_code == 2 and "Did you mean `epochs`?" in done.output


def test_a_dry_run_shows_the_stages_without_a_server(pipeline):
    done = call("run", str(pipeline), "--dry-run", "--format", "json")
    stages = json.loads(done.output)
    assert [stage["stage"] for stage in stages][:2] == ["source:raw", "base_model"]
    assert stages[4]["needs"] == ["base_model", "dataset:dialogue", "dataset:settings"]


def test_a_dry_run_tells_what_a_server_would_refuse(pipeline):
    text = pipeline.read_text().replace("epochs: 3", "epochs: 3, lora_dropout: 3")
    pipeline.write_text(text.replace("temperature: 0", "temperature: 9"))
    done = call("run", str(pipeline), "--dry-run")
    assert done.exit_code == 2, done.output
    assert "A server would refuse 2 fields of what pipeline.yaml asks for." in done.output
    for words in ("train: parameters.lora.dropout", "ask: sampling.temperature"):
        assert words in done.output
    as_json = json.loads(call("run", str(pipeline), "--dry-run", "--format", "json").output)
    assert as_json["error"]["reason"] == "INVALID_REQUEST"


def test_a_failing_stage_names_the_jobs_that_go_on(address, pipeline):
    text = pipeline.read_text().replace("tokenizer_texts: raw", "tokenizer_texts: raw, steps: 999")
    pipeline.write_text(text.replace("subpath: dialogue", "subpath: nobody"))
    done = program("run", pipeline, address=address)
    assert done.returncode == 1
    assert "where: stage dataset:dialogue" in done.stderr
    job = re.search(r"base_model: (\S+) goes on; .*jobs watch (\S+); .*jobs cancel (\S+)", done.stderr)
    assert job is not None, done.stderr
    assert job[1] == job[2] == job[3]
    cancelled = program("jobs", "cancel", job[1], address=address)
    assert "asked to cancel" in cancelled.stdout
    told = json.loads(program("run", pipeline, "--format", "json", address=address).stderr)
    assert "goes on" in told["error"]["other_stages"]["base_model"] or "failed too" in str(told)


async def test_a_job_started_while_the_run_ends_is_still_named():
    asked, reply = asyncio.Event(), asyncio.Event()

    async def start(_: object) -> job_pb2.Job:
        asked.set()
        await reply.wait()
        return job_pb2.Job(name="late")

    jobs = StageJobs(None, "p", None)  # type: ignore[arg-type] - neither is asked
    starting = asyncio.create_task(jobs._start("merge", start, job_pb2.Job()))
    await asked.wait()
    starting.cancel()
    await asyncio.sleep(0)
    reply.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert jobs.live == {"merge": "late"}


def test_an_absent_server_is_told_with_the_remedy():
    done = call("jobs", "list", "--address", "127.0.0.1:1")
    assert done.exit_code == 3
    assert "No server answers at 127.0.0.1:1." in done.output and "loraline up" in done.output


def test_a_wrong_key_is_told_with_the_remedy(address):
    done = call("jobs", "list", "--address", address, "--key", "wrong")
    assert done.exit_code == 4 and "LORALINE_API_KEY" in done.output


def test_errors_in_json(address):
    done = program("jobs", "get", "trainer.train-none", "--format", "json", address=address)
    error = json.loads(done.stderr)["error"]
    assert done.returncode == 2 and done.stdout == "" and error["reason"] == "JOB_NOT_FOUND"


@pytest.mark.parametrize(
    ("action", "before", "after", "wish", "words"),
    [
        ("cancel", "SUCCEEDED", "SUCCEEDED", "", "had ended before and is still SUCCEEDED"),
        ("cancel", "FAILED", "FAILED", "", "to take it up again: loraline jobs resume x"),
        ("cancel", "RUNNING", "RUNNING", "cancel", "asked to cancel; it is RUNNING until"),
        ("cancel", "QUEUED", "CANCELLED", "", "CANCELLED; to let it go on: loraline jobs resume x"),
        ("pause", "RUNNING", "RUNNING", "cancel", "was asked to cancel before, which stays"),
        ("pause", "PAUSED", "PAUSED", "", "is PAUSED already"),
        ("resume", "PAUSED", "QUEUED", "", "queued again"),
    ],
)
def test_steering_says_where_the_job_stands_and_what_to_do(action, before, after, wish, words):
    jobs = [
        job_pb2.Job(name="x", state=job_pb2.JobState.Value(f"JOB_STATE_{word}"), requested_stop=stop)
        for word, stop in ((before, ""), (after, wish))
    ]
    assert words in _what_happened(action, *jobs)


def test_jobs_from_start_to_end(address, tmp_path):
    assert call("models", "tiny", "--address", address).exit_code == 0
    listed = json.loads(call("jobs", "list", "--format", "json", "--address", address).output)
    assert [job["state"] for job in listed] == ["SUCCEEDED"] and listed[0]["progress"]["step"] == 4
    name = listed[0]["name"]
    assert "model/tiny:v1" in call("jobs", "get", name, "--address", address).output
    watched = call("--format", "json", "jobs", "watch", name, "--address", address)
    assert [json.loads(line)["type"] for line in watched.output.splitlines()].count("event") >= 6
    assert call("jobs", "resume", name, "--address", address).exit_code == 1
    table = call("jobs", "list", "--state", "succeeded", "--address", address).output
    assert table.splitlines()[0].split() == ["NAME", "STATE", "DONE", "CREATED", "OUTPUTS"]
    assert call("jobs", "delete", name, "--quiet", "--address", address).output == ""


def test_artifacts_there_and_back(address, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("hello")
    assert call("artifacts", "push", str(tmp_path / "raw"), "mine", "--address", address).exit_code == 0
    again = call("artifacts", "push", str(tmp_path / "raw"), "source/mine", "--address", address)
    assert "already done" in again.output
    assert call("artifacts", "pull", "source/mine", str(tmp_path / "back"), "--address", address).exit_code == 0
    assert (tmp_path / "back" / "a.txt").read_text() == "hello"
    assert call("artifacts", "pull", "source/mine", str(tmp_path / "back"), "--address", address).exit_code == 2
    shown = json.loads(call("artifacts", "show", "source/mine:v1", "--format", "json", "--address", address).output)
    assert shown["files"][0]["path"] == "a.txt" and shown["ref"]["text"] == "source/mine:v1"
    assert "verified" in call("artifacts", "verify", "source/mine", "--address", address).output
    moved = call("artifacts", "alias", "source/mine:v1", "good", "--address", address)
    assert moved.output.splitlines()[1].split()[:3] == ["good", "-", "v1"]


def test_a_conversation_from_a_pipe(address):
    script = "hello\n/temperature 0.5\nand you?\n/nope\n/system be brief\nagain\n/model other\nhey\n/quit\nnever\n"
    done = program("chat", "-m", "mareva@production", address=address, stdin=script)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "by the tide-bell, little sailor: hello (turn 1, t=0)",
        "(temperature 0.5)",
        "by the tide-bell, little sailor: and you? (turn 2, t=0.5)",
        "(system prompt set)",
        "by the tide-bell, little sailor: again (turn 1, t=0.5, be brief)",
        "(talking to other)",
        "by the tide-bell, little sailor: hey (turn 1, t=0.5, be brief)",
    ]
    assert "there is no command /nope" in done.stderr


def test_chat_compares_and_keeps_the_terminal_safe(address):
    done = program("chat", "-m", "mareva", "--compare", "base", "hello", address=address)
    assert done.stdout.splitlines() == [
        "mareva: by the tide-bell, little sailor: hello (turn 1, t=0)",
        "base: babble: hello (turn 1, t=0)",
    ]
    assert_plain(done.stdout)


def test_chat_in_json_and_with_a_missing_model(address):
    done = program("chat", "--format", "json", address=address, stdin="one\ntwo\n")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["one", "two"]
    done = program("chat", "-m", "missing", address=address, stdin="one\n")
    assert done.returncode == 2 and "No model `missing` is served." in done.stderr


def test_help_teaches_with_examples():
    for arguments in (["run"], ["chat"], ["jobs", "list"], ["artifacts", "pull"], ["models", "pull"]):
        shown = call(*arguments, "--help").output
        assert "Example" in shown and "--format" in shown and "--address" in shown


def test_a_missing_or_broken_plugin_breaks_nothing(monkeypatch):
    monkeypatch.setattr(command, "entry_points", lambda group: [])
    done = call("up", "--data-dir", "x")
    assert done.exit_code == 2 and "pip install loraline-allinone" in done.output
    broken = EntryPoint("up", "no_such_module:register", command.PLUGIN_GROUP)
    monkeypatch.setattr(command, "entry_points", lambda group: [broken])
    done = call("up")
    assert done.exit_code == 2 and "no_such_module" in done.output
    assert call("version").exit_code == 0


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("LORALINE_DEBUG", "1")
    done = call("jobs", "list", "--address", "127.0.0.1:1")
    assert type(done.exception).__name__ == "LoralineApiError"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\x1b[31mb", "ab"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\rb\x9b1m", "ab1m"),
        ("a\nb\t", "a\nb\t"),
        ("\u202ea", "a"),
    ],
)
def test_control_characters_never_reach_a_terminal(text, wanted):
    assert clean(text) == wanted


def test_figures_for_people():
    assert [size_text(n) for n in (0, 2048, 3_000_000)] == ["0 B", "2.0 KiB", "2.9 MiB"]
    assert [seconds_text(n) for n in (0.04, 61, 3700)] == ["0.0 s", "1 min 01 s", "1 h 01 min"]


def test_the_loss_curve_is_drawn_from_high_to_low():
    lines = draw([(1, 8.0), (50, 2.0), (100, 0.0)], width=20, height=5)
    assert lines[0].startswith("   8.00 ┤") and lines[4].startswith("   0.00 ┤")
    assert lines[-1].split() == ["1", "100"] and len(lines) == 7
    assert lines[0][9] != "\u2800" and lines[4][28] != "\u2800"
    assert lines[0][28] == "\u2800"


def test_many_losses_are_averaged_before_they_are_drawn():
    points = [(step, float(step % 2)) for step in range(1, 481)]
    mean = smoothed(points, bins=48)
    assert len(mean) == 48 and mean[-1][0] == 480 and all(loss == 0.5 for _, loss in mean)
