"""Servers as child processes, and the processor time that they and their own children took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import Told

HERE = Path(__file__).resolve().parent
VLLM = (sys.executable, str(HERE / "vllm_cli.py"))
"""vLLM's own command."""


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    grpc: str
    http: str
    key: str
    start_seconds: float

    def cpu_seconds(self) -> float:
        """Return the processor time of the whole process tree so far."""
        return sum(_cpu(pid) for pid in _tree(self.process.pid))

    def stop(self) -> None:
        """End it, and its children with it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def server(kind: str, model: Path, *flags: str) -> Iterator[Server]:
    """Run one of servers.py's; ready when it has generated."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "servers.py"), kind, str(model), folder, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        told = next((line for line in process.stdout if line.startswith("{")), "")
        if not told:
            raise RuntimeError(f"{command} ended with {process.wait()}")
        running = Server(process, start_seconds=time.monotonic() - begun, **json.loads(told))
        try:
            yield running
        finally:
            running.stop()


@contextmanager
def vllm_serve(model: Path, name: str, port: int, adapters: list[Path]) -> Iterator[Server]:
    """Run `vllm serve` as its users do; ready when /health says so."""
    begun = time.monotonic()
    command = [*VLLM, "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"]
    command += ["--dtype", "float32", "--max-num-seqs", "256", "--disable-uvicorn-access-log"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "8", "--max-cpu-loras", "9"]
    if adapters:
        command += ["--lora-modules", *(f"{folder.name}={folder}" for folder in adapters)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, text=True, env=environment())
        running = Server(process, "", f"127.0.0.1:{port}", "", 0.0)
        try:
            while not _well(running.http):
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"vllm serve ended with {process.returncode}: {said.read()[-2000:]}")
                time.sleep(0.1)
            running.start_seconds = time.monotonic() - begun
            yield running
        finally:
            running.stop()


def environment() -> dict[str, str]:
    """Return the environment of every server and of what consumes in-process."""
    told = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**os.environ, **told, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def _well(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        others = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return [pid]
    found = {int(child) for child in [*children, *others]}
    return [pid, *(below for child in found for below in _tree(child))]


def _cpu(pid: int) -> float:
    """Return a process's seconds on a processor, of all its threads; finer than the clock ticks of /proc/PID/stat."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text(encoding="ascii").split()[0])
    except OSError:
        return total / 1e9
    return total / 1e9


class InProcess:
    """A process that consumes its own engine, asked for rounds in the form of load.closed_loop."""

    def __init__(self, kind: str, model: Path):
        command = [sys.executable, str(HERE / "inprocess.py"), kind, str(model)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())
        self._told()

    def cpu_seconds(self) -> float:
        """Return the processor time of the process and its engine so far."""
        return sum(_cpu(pid) for pid in _tree(self._process.pid))

    def round(self, **asked: int) -> list[Told]:
        """Run a round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [
            Told(begun, arrivals, len(arrivals), tokens, [], ended)
            for begun, arrivals, tokens, ended in json.loads(self._told())
        ]

    def stop(self) -> None:
        """End it: its input ends, and it shuts its engine down."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _told(self) -> str:
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if line[:1] in "[{"), "")
        if not line:
            raise RuntimeError(f"the in-process consumer ended with {self._process.wait()}")
        return line
