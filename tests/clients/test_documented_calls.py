"""The programs of docs/grpc.md, taken from the page and run as they stand, against a real server with TLS and a key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPESCRIPT = ROOT / "examples" / "clients" / "typescript"


@pytest.fixture(scope="session")
def typescript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a built copy of the TypeScript example. LORALINE_REQUIRE_NPM=1 makes a missing npm a failure."""
    npm = shutil.which("npm")
    if npm is None and os.environ.get("LORALINE_REQUIRE_NPM") != "1":
        pytest.skip("node and npm are not installed here; the TypeScript client is not tried")
    assert npm is not None, "npm is required by LORALINE_REQUIRE_NPM, and is not installed"
    folder = tmp_path_factory.mktemp("node") / "loraline" / "examples" / "clients" / "typescript"
    shutil.copytree(TYPESCRIPT, folder, ignore=shutil.ignore_patterns("node_modules", "build", "gen"))
    for name in ("proto", "third_party", "buf.yaml"):
        (folder.parents[2] / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (["install", "--no-audit", "--no-fund", "--ignore-scripts"], ["run", "generate"], ["run", "build"]):
        done = subprocess.run(
            [npm, *command], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"npm {' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return folder


def test_the_page_shows_the_typescript_example(page_blocks: Callable[[str], list[str]]) -> None:
    for name in ("src/connection.ts", "src/dataset.ts", "src/chat.ts"):
        assert page_blocks(f"typescript {name}") == [(TYPESCRIPT / name).read_text()], name


def test_shell(server: Any, page_blocks: Callable[[str], list[str]], tmp_path: Path) -> None:
    (tmp_path / "proto").mkdir()
    shutil.copy(ROOT / "proto" / "baseline.binpb", tmp_path / "proto")
    (script,) = page_blocks("sh run")
    done = server.run("bash", "-eu", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the exit code is 8 times gRPC's: 40" in done.stdout
    assert "There is no job 'nobody'" in done.stderr, done.stderr
    job = json.loads(done.stdout.partition("the exit code")[0])["job"]
    assert (job["state"], job["requestId"]) == ("JOB_STATE_SUCCEEDED", "harbour-shell-1")
    assert '"stateChange"' in (tmp_path / "events.json").read_text()
    assert (tmp_path / "headers.txt").stat().st_mode & 0o077 == 0


def test_shell_lists_models_and_streams_an_answer(talking_server: Any, page_blocks: Callable[[str], list[str]]) -> None:
    (script,) = page_blocks("sh run")
    helper = script[: script.index("\n}\n") + 3]  # what makes headers.txt, and the function `call`
    service = "loraline.api.inference.v1.InferenceService"
    question = {
        "messages": [{"role": "user", "content": "Where do the boats go?"}],
        "sampling": {"maxTokens": 12, "temperature": 0},
    }
    calls = f"call {service}/ListModels '{{}}'\necho ----\ncall {service}/Chat '{json.dumps(question)}'\n"
    calls += f"echo ----\ncall {service}/Chat '{json.dumps({**question, 'model': 'nobody'})}' || echo exit $?\n"
    (talking_server.folder / "proto").mkdir(exist_ok=True)
    shutil.copy(ROOT / "proto" / "baseline.binpb", talking_server.folder / "proto")
    done = talking_server.run("bash", "-eu", "-c", helper + calls, cwd=talking_server.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    listed, streamed, refused = done.stdout.split("----\n")
    [model] = json.loads(listed)["models"]
    assert (model["name"], model["kind"], model["resident"]) == ("toy", "SERVED_KIND_BASE", True)
    pieces = json_values(streamed)
    assert pieces[0]["model"] == "toy"
    assert "".join(piece.get("delta", "") for piece in pieces)
    assert pieces[-1]["finishReason"] in {"FINISH_REASON_STOP", "FINISH_REASON_LENGTH"}
    assert 1 <= pieces[-1]["usage"]["completionTokens"] <= 12
    assert "finishReason" not in pieces[0] or len(pieces) == 1
    assert refused.strip() == "exit 40"  # eight times gRPC's NOT_FOUND
    assert "'nobody' is not served here" in done.stderr, done.stderr


def json_values(text: str) -> list[Any]:
    """Return the JSON values that stand one after the other, as `buf curl` writes a stream."""
    decoder, found, text = json.JSONDecoder(), [], text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


def test_python_sdk_and_stubs(server: Any, page_blocks: Callable[[str], list[str]], tmp_path: Path) -> None:
    sdk, stubs = page_blocks("python run")
    done = server.run(sys.executable, "-c", sdk, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dataset/harbour:v" in done.stdout and "with 11 rows to train on" in done.stdout
    assert "NOT_FOUND JOB_NOT_FOUND There is no job" in done.stdout
    done = server.run(sys.executable, "-c", stubs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "JOB_STATE_SUCCEEDED" in done.stdout
    assert "NOT_FOUND JOB_NOT_FOUND {'job': 'nobody'}" in done.stdout


@pytest.mark.slow
def test_typescript_job(server: Any, typescript: Path) -> None:
    done = server.run("npm", "run", "--silent", "dataset", cwd=typescript)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dataset/harbour:v" in done.stdout and "with 11 rows to train on" in done.stdout
    assert "NotFound JOB_NOT_FOUND: There is no job" in done.stdout


@pytest.mark.slow
def test_typescript_is_refused_without_the_key_or_the_authority(server: Any, typescript: Path) -> None:
    def refused(environment: dict[str, str]) -> str:
        done = type(server)(environment, server.folder).run("npm", "run", "--silent", "dataset", cwd=typescript)
        assert done.returncode != 0 and "dataset/harbour" not in done.stdout, done.stdout
        return done.stderr

    assert "[unauthenticated]" in refused({**server.environment, "LORALINE_API_KEY": "lora_0_0"})
    other = server.folder / "other" / "ca.pem"
    other.parent.mkdir()
    openssl = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command = [*openssl, "-subj", "/CN=other", "-keyout", other.with_name("ca.key"), "-out", other]
    subprocess.run(command, check=True, capture_output=True)
    assert "certificate" in refused({**server.environment, "LORALINE_TLS_CA": str(other)})
    refused({name: value for name, value in server.environment.items() if name != "LORALINE_TLS_CA"})


@pytest.mark.slow
def test_typescript_streams_an_answer(talking_server: Any, typescript: Path) -> None:
    done = talking_server.run("npm", "run", "--silent", "chat", cwd=typescript)
    assert done.returncode == 0, done.stdout + done.stderr
    answer, told = done.stdout.rstrip().rsplit("\n", 1)
    assert answer.strip() and told.startswith(("[STOP, ", "[LENGTH, ")), done.stdout
