"""Base models from a Hub: a small one on loopback, asked by the real client in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.core.jobs.runner import JobRunner
from loraline.core.serving.server import open_platform
from loraline.core.testing.hub import COMMIT, SmallHub, small_hub
from loraline.core.testing.waiting import until_state
from loraline.trainer.config import TrainerSettings
from loraline.trainer.servicer import IMPORT_MODEL, TrainerServicer

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
MODEL = "harbour/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": json.dumps(
        {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    ).encode(),
    "tokenizer.json": b"{}",
    "merges.txt": b"#version",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: b"a" * 5000,
    SHARDS[1]: b"b" * 7000,
    "pytorch_model.bin": b"pickle",
    "code.py": b"raise SystemExit",
}
SCRIPT = """
import json, sys, time
from loraline.core import hub
from loraline.core.errors import LoralineError
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.trainer import hub_base
what, hub_id, revision, target = sys.argv[1:]
begin, answer = time.monotonic(), {}
try:
    if what == "download":
        from pathlib import Path
        folder, commit = hub.download(hub_id, revision, timeout=2, target=Path(target) if target else None)
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        answer = {"folder": str(folder), "commit": commit, "names": [name for name in names if name[0] != "."]}
    elif what == "see":
        seen = hub_base.see(pb.BaseModel(hub_id=hub_id, revision=revision), timeout=2)
        answer = {"bytes": seen.weights_bytes, "message": seen.message, "config": dict(seen.config)}
    elif what == "check":
        hub_base.check(pb.BaseModel(hub_id=hub_id, revision=revision), timeout=2)
    else:
        found = hub.cached(hub_id, revision)
        answer = {"present": found.present, "missing": found.missing, "complete": found.complete}
except LoralineError as error:
    answer = {"reason": error.reason, "code": error.code.name, "message": error.message, "metadata": error.metadata}
answer["seconds"] = time.monotonic() - begin
print(json.dumps(answer))
"""


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    with small_hub() as running:
        running.models[MODEL] = dict(FILES)
        yield running


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def ask(
    home: Path, url: str, what: str, hub_id: str = MODEL, *, target: str = "", revision: str = "", **env: str
) -> Any:
    """Run one question in a process with this HF_HOME and HF_ENDPOINT; return its answer or its error."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP", "ALL_"))}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "", **env}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, hub_id, revision, target],
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_mirror_brings_a_model_into_hf_home_without_pickles_and_code(hub: SmallHub, home: Path) -> None:
    assert ask(home, hub.url, "look") | {"seconds": 0} == {
        "present": [],
        "missing": [],
        "complete": False,
        "seconds": 0,
    }
    seen = ask(home, hub.url, "see")
    assert seen["bytes"] == 12_000 and seen["config"]["vocab_size"] == 300
    assert COMMIT[:12] in seen["message"]
    got = ask(home, hub.url, "download")
    assert got["commit"] == COMMIT and Path(got["folder"]).is_relative_to(home)
    assert got["names"] == sorted(set(FILES) - {"pytorch_model.bin", "code.py"})
    # From now on neither the Hub nor its list is needed: offline, and with the Hub gone.
    for more in ({"HF_HUB_OFFLINE": "1"}, {"TRANSFORMERS_OFFLINE": "1"}, {"HF_DATASETS_OFFLINE": "1"}, {}):
        again = ask(home, closed_port(), "download", **more)
        assert again["commit"] == COMMIT, again
    files = ask(home, closed_port(), "download", target=str(home / "plain"))
    assert files["names"] == got["names"] and not any(path.is_symlink() for path in (home / "plain").iterdir())


def test_the_cache_says_what_is_missing_by_name(hub: SmallHub, home: Path) -> None:
    folder = Path(ask(home, hub.url, "download")["folder"])
    (folder / SHARDS[1]).resolve().unlink()
    (folder / "merges.txt").unlink()
    found = ask(home, hub.url, "look")
    assert found["missing"] == ["merges.txt", SHARDS[1]] and not found["complete"]
    refused = ask(home, hub.url, "check", HF_HUB_OFFLINE="1")
    assert (refused["reason"], refused["code"]) == ("HUB_NOT_CACHED", "NOT_FOUND")
    assert SHARDS[1] in refused["message"] and "has 4 of 6 files" in refused["message"]
    assert refused["metadata"]["missing"] == f"merges.txt,{SHARDS[1]}"
    # A list of the Hub's files is not needed: the model's own index names its shards.
    for listed in folder.parent.parent.rglob("trees/*"):
        listed.unlink()
    assert ask(home, hub.url, "look")["missing"] == [SHARDS[1]]
    # Connected again, only what is missing is fetched.
    hub.asked.clear()
    assert ask(home, hub.url, "download")["commit"] == COMMIT
    assert not any(SHARDS[0] in line for line in hub.asked if line.startswith("GET"))
    assert ask(home, hub.url, "look")["complete"]


def test_a_revision_brings_its_own_bytes_beside_the_newest(hub: SmallHub, home: Path) -> None:
    older = "89abcdef" * 5
    hub.others[MODEL, older] = {**FILES, SHARDS[0]: b"older" * 1200}
    hub.tags["v1"] = older
    newest = ask(home, hub.url, "download")
    for revision in ("v1", older):
        seen = ask(home, hub.url, "see", revision=revision)
        assert seen["bytes"] == 13_000 and older[:12] in seen["message"]
        got = ask(home, hub.url, "download", revision=revision)
        assert got["commit"] == older and got["folder"] != newest["folder"]
        assert (Path(got["folder"]) / SHARDS[0]).read_bytes() == b"older" * 1200
        assert (Path(got["folder"]) / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]
    # Both stay, and both are found without the Hub.
    for revision, commit, content in (("v1", older, b"older" * 1200), ("", COMMIT, FILES[SHARDS[0]])):
        again = ask(home, closed_port(), "download", revision=revision)
        assert again["commit"] == commit, again
        assert (Path(again["folder"]) / SHARDS[0]).read_bytes() == content


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_means_that_the_hub_is_not_asked(hub: SmallHub, home: Path, variable: str) -> None:
    refused = ask(home, hub.url, "download", **{variable: "1"})
    assert refused["reason"] == "HUB_NOT_CACHED" and variable in refused["message"]
    assert hub.asked == []


def test_gated_private_and_misspelled_models_are_told_apart(hub: SmallHub, home: Path) -> None:
    hub.gated.add(MODEL)
    gated = ask(home, hub.url, "download")
    assert (gated["reason"], gated["code"]) == ("HUB_GATED", "PERMISSION_DENIED")
    assert "HF_TOKEN" in gated["message"]
    # Told before anything was fetched.
    assert not [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]
    hub.gated.clear()
    assert ask(home, hub.url, "check", "harbour/nothing")["reason"] == "HUB_MODEL_MISSING"
    assert ask(home, hub.url, "check", revision="v9")["reason"] == "HUB_REVISION_MISSING"
    hub.token = "hf_secret"
    private = ask(home, hub.url, "check")
    assert private["reason"] == "HUB_REFUSED" and "HF_TOKEN" in private["message"]
    assert "reason" not in ask(home, hub.url, "check", HF_TOKEN="hf_secret")


def test_an_unreachable_hub_is_told_at_once(hub: SmallHub, home: Path) -> None:
    refused = ask(home, closed_port(), "download")
    assert (refused["reason"], refused["code"]) == ("HUB_UNREACHABLE", "UNAVAILABLE")
    assert refused["seconds"] < 15
    hub.silent = True
    silent = ask(home, hub.url, "download")
    assert silent["reason"] == "HUB_UNREACHABLE" and silent["seconds"] < 15


def test_a_broken_proxy_is_named_without_its_password(hub: SmallHub, home: Path) -> None:
    proxy = closed_port().replace("http://", "http://me:secret@")
    refused = ask(home, "http://hub.example", "download", HTTP_PROXY=proxy, http_proxy=proxy)
    assert (refused["reason"], refused["code"]) == ("HUB_PROXY_FAILED", "UNAVAILABLE")
    assert proxy.rpartition("@")[2] in refused["message"] and "secret" not in refused["message"]
    assert refused["seconds"] < 15


@pytest.mark.parametrize(
    ("change", "reason", "named"),
    [
        ({SHARDS[1]: None}, "MODEL_SHARDS_MISSING", SHARDS[1]),
        ({"tokenizer.json": None}, "MODEL_INCOMPLETE", "tokenizer"),
        (
            dict.fromkeys((*SHARDS, "model.safetensors.index.json")),
            "MODEL_NOT_SAFETENSORS",
            "pytorch_model.bin",
        ),
    ],
)
def test_a_repository_that_is_no_whole_model_is_refused_before_its_weights_are_fetched(
    hub: SmallHub, home: Path, change: dict[str, None], reason: str, named: str
) -> None:
    hub.models[MODEL] = {name: data for name, data in FILES.items() if name not in change}
    refused = ask(home, hub.url, "see")
    assert refused["reason"] == reason and named in refused["message"]
    assert not [line for line in hub.asked if line.startswith("GET") and line.endswith(".safetensors")]


def test_a_download_that_breaks_off_says_what_came(hub: SmallHub, home: Path) -> None:
    hub.torn.add(SHARDS[1])
    begin = time.monotonic()
    refused = ask(home, hub.url, "download")
    assert refused["reason"] == "HUB_UNREACHABLE" and SHARDS[1] in refused["message"]
    assert time.monotonic() - begin < 90
    hub.torn.clear()
    assert ask(home, hub.url, "download")["commit"] == COMMIT


@pytest.mark.slow
async def test_a_pulled_model_is_an_artifact_that_needs_no_hub_any_more(
    hub: SmallHub, home: Path, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job runs in its own process with HF_ENDPOINT and HF_HOME, as on a connected machine."""
    from huggingface_hub import constants

    hub.models[MODEL] = {path.name: path.read_bytes() for path in small_base.iterdir() if path.is_file()} | {
        "pytorch_model.bin": b"pickle",
        "evil.py": b"raise SystemExit",
    }
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # What the library has read from its environment when it was loaded in this process.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    platform = open_platform(CoreSettings(data_dir=tmp_path / "data", auth="off", poll_seconds=0.1))
    service = TrainerServicer(platform, TrainerSettings(hub_timeout_seconds=5))
    request = pb.ImportModelRequest(name="carried", source=pb.BaseModel(hub_id=MODEL))
    nothing: Any = None
    gone = pb.ImportModelRequest(name="gone", source=pb.BaseModel(hub_id="harbour/nothing"))
    with pytest.raises(LoralineError) as caught:
        await service.ImportModel(gone, nothing)
    assert caught.value.reason == "HUB_MODEL_MISSING", "told at once, not by a job"
    runner = JobRunner(platform.settings, platform.jobs.table, [IMPORT_MODEL])
    await runner.start()
    try:
        job = (await service.ImportModel(request, nothing)).job
        job = await until_state(platform.jobs, job.name, ENDED, seconds=200)
        assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
        result = pb.ModelResult()
        assert job.result.Unpack(result)
        folder = platform.library.fetch(result.model)
    finally:
        await runner.drain()
        platform.database.close()
    assert result.revision == COMMIT and result.parameters > 0
    names = {path.name for path in folder.iterdir()}
    assert not names & {"pytorch_model.bin", "evil.py"}
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (small_base / name).read_bytes()
