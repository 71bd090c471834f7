"""Checks of the machine, each with its failure raised for real on this one."""

from __future__ import annotations

import fcntl
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraline.core.preflight.machine import disk, package_manager, port
from loraline.core.preflight.model_folder import check_model_folder
from loraline.core.preflight.network import _hint, check_hub, in_wsl, windows_host
from loraline.core.serving.addresses import free_port


def test_a_taken_port_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        found = port("port", address, "LORALINE_LISTEN")
        assert (found.level, found.reason) == ("failed", "PORT_TAKEN")
        assert "LORALINE_LISTEN" in found.said
        assert f"process {os.getpid()} (" in found.said
        assert "端口" in found.explained("zh")
    assert port("port", f"127.0.0.1:{free_port()}", "LORALINE_LISTEN").level == "ok"
    assert port("port", "nowhere", "LORALINE_LISTEN").reason == "INVALID_ADDRESS"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    done = subprocess.run(
        [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
    ) if mount else None  # fmt: skip
    if done is None or done.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_seen_and_a_small_one_too(small_disk: Path) -> None:
    found = disk(small_disk)
    assert (found.level, found.reason) == ("failed", "DISK_FULL")
    assert "0.0 GiB free" in found.said
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 65536)
    found = disk(small_disk)
    assert (found.level, found.reason) == ("failed", "DISK_FULL")
    assert "No space left on device" in found.said
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler"]


def test_a_folder_that_cannot_be_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = disk(tmp_path / "file" / "data")
    assert (found.level, found.reason) == ("failed", "DATA_DIR_UNUSABLE")
    assert disk(tmp_path / "data").check == "disk"


def test_who_holds_the_lock_of_the_package_manager(tmp_path: Path) -> None:
    lock = tmp_path / "lock-frontend"
    lock.touch()
    assert package_manager([lock, tmp_path / "none"]).level == "ok"
    # As apt does: a POSIX lock on the whole file, in a process of its own.
    code = "import fcntl,sys,time; f=open(sys.argv[1],'r+'); fcntl.lockf(f,2); print('held',flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as apt:
        try:
            assert apt.stdout is not None
            assert apt.stdout.readline() == "held\n"
            with lock.open("r+") as file, pytest.raises(OSError, match="unavailable"):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = package_manager([lock])
        finally:
            apt.kill()
    assert (found.level, found.reason) == ("warning", "PACKAGE_MANAGER_LOCKED")
    assert f"process {apt.pid} ({sys.executable} -c import fcntl" in found.said


@pytest.fixture
def answering() -> Iterator[str]:
    """A server that answers 407 to everything, as a proxy without credentials does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404 if "hub" in self.headers.get("Host", "") else 407)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_hub_is_asked_and_the_proxy_named(answering: str) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    found = check_hub({"HF_ENDPOINT": dead})
    assert (found.level, found.reason) == ("warning", "HUB_UNREACHABLE")
    assert dead in found.said
    assert "No proxy is set" in found.said
    through = check_hub({"HF_ENDPOINT": "http://hub.invalid", "http_proxy": dead})
    assert f"The proxy is {dead.removeprefix('http://')}" in through.said
    assert check_hub({"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": answering}).level == "ok"  # any answer will do
    refused = check_hub({"HF_ENDPOINT": answering})
    assert "name and password (407)" in refused.said
    secret = check_hub({"HF_ENDPOINT": "http://hub.invalid", "http_proxy": dead.replace("//", "//me:secret@")})
    assert "secret" not in secret.said
    assert check_hub({"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": dead}).level == "ok"


def test_wsl_is_told_the_address_of_windows(tmp_path: Path) -> None:
    version, routes = tmp_path / "version", tmp_path / "route"
    version.write_text("Linux version 5.15.153.1-microsoft-standard-WSL2 (gcc)\n")
    routes.write_text("Iface\tDestination\tGateway\neth0\t00000000\t0100A8C0\t0003\neth0\t0000A8C0\t00000000\t0001\n")
    assert in_wsl(version)
    assert windows_host(routes) == "192.168.0.1"
    hint = _hint({"https": "http://127.0.0.1:7890"}, wsl=True, host="192.168.0.1")
    assert "means this Linux, not Windows" in hint
    assert "192.168.0.1" in hint
    assert "192.168.0.1" in _hint({}, wsl=True, host="192.168.0.1")


def whole_model(folder: Path) -> Path:
    """Write a model folder that is whole, with a shard of one tensor."""
    import json
    import struct

    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "one.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "config.json cannot be read"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", "{}", "no architectures"),
        ("tokenizer.json", None, "no tokenizer"),
        ("one.safetensors", None, "named by its index is missing"),
        ("one.safetensors", "cut", "is cut or damaged"),
        ("model.safetensors.index.json", '{"weight_map": {"b": "one.safetensors"}}', "lacks 1 tensors"),
        ("model.safetensors.index.json", "{", "cannot be read"),
    ],
)
def test_what_is_missing_from_a_model_folder(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    folder = whole_model(tmp_path / "model")
    assert [found.level for found in check_model_folder(folder)] == ["ok"]
    path = folder / name
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.write_text(content)
    [found] = check_model_folder(folder)
    assert (found.level, found.reason) == ("failed", "MODEL_INCOMPLETE")
    assert words in found.said


def test_pickles_and_interrupted_downloads_are_named(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "model")
    (folder / "one.safetensors").rename(folder / "one.safetensors.incomplete")
    assert "interrupted download" in check_model_folder(folder)[0].said
    (folder / "one.safetensors.incomplete").rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors.index.json").unlink()
    assert "pytorch_model.bin, a pickle" in check_model_folder(folder)[0].said
    assert "no such folder" in check_model_folder(tmp_path / "none")[0].said
