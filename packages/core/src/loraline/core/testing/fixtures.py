"""Pytest fixtures with real servers; use them with `pytest_plugins = ["loraline.core.testing.fixtures"]`.

Where a server's package is missing, tests that need it are skipped with the reason, or fail when the environment says
LORALINE_REQUIRE_SERVERS=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest

from loraline.core.testing.servers import PostgresServer, S3Server, ServerUnavailable, postgres_server, s3_server

T = TypeVar("T")


def _run(server: AbstractContextManager[T]) -> Iterator[T]:
    try:
        running = server.__enter__()
    except ServerUnavailable as missing:
        if os.environ.get("LORALINE_REQUIRE_SERVERS") == "1":
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    try:
        yield running
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for the session; take a bucket of your own with `s3.settings()`."""
    yield from _run(s3_server())


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One Postgres server for the session; take a database of your own with `postgres.new_database()`."""
    yield from _run(postgres_server())
