"""Settings that every stage shares, from the environment (prefix `LORALINE_`) or keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _with_password(url: str, file: Path) -> str:
    """Return the URL `scheme://user@host/…` with the file's first line as the password."""
    parts = urlsplit(url)
    if parts.password or not parts.username:
        return url
    password = quote(file.read_text(encoding="utf-8").strip(), safe="")
    return urlunsplit(
        parts._replace(netloc=parts.netloc.replace(f"{parts.username}@", f"{parts.username}:{password}@", 1))
    )


class CoreSettings(BaseSettings):
    """Where things are kept and how the server listens. Every field is `LORALINE_<FIELD>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="LORALINE_", extra="ignore")

    data_dir: Path = Field(default_factory=lambda: Path.home() / ".loraline")
    """Folder for the database, the local store, caches and job work folders."""
    database_url: str = ""
    """`sqlite:///…` (default, in data_dir) or `postgresql://user:password@host/db`."""
    database_password_file: Path | None = None
    """File that holds the database password, put into database_url where that has none."""
    store_url: str = ""
    """`file:///folder` (default, in data_dir) or `s3://bucket/optional/prefix`."""
    s3_endpoint: str = "127.0.0.1:9000"
    """host:port of the S3 server."""
    s3_access_key: str = ""
    """Access key of the S3 server."""
    s3_secret_key: SecretStr = SecretStr("")
    """Secret key of the S3 server."""
    s3_secret_key_file: Path | None = None
    """File that holds the secret key, instead of s3_secret_key."""
    s3_region: str = "us-east-1"
    """Region; given, so that the client needs no look-up that some servers fail."""
    s3_secure: bool = False
    """Use TLS towards the S3 server."""

    listen: str = "127.0.0.1:7600"
    """host:port of the gRPC server; port 0 lets the system choose."""
    metrics_listen: str = "127.0.0.1:9600"
    """host:port of /metrics and /healthz; empty for none."""
    auth: Literal["keys", "off"] = "keys"
    """`keys` asks for an API key on every method; `off` is accepted on loopback addresses only."""
    keys_file: Path | None = None
    """api_keys.json (hashed keys); default in data_dir."""
    tls_cert: Path | None = None
    """Server certificate (PEM); with tls_key it turns TLS on."""
    tls_key: Path | None = None
    """Private key of the server certificate (PEM)."""
    tls_client_ca: Path | None = None
    """CA of client certificates (PEM); turns mutual TLS on."""
    reflection: bool = False
    """Offer gRPC server reflection."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Largest gRPC message; gRPC's own default of 4 MiB is too small for plans and reports."""

    replicas: int = Field(default=1, ge=1)
    """Servers of one stage that may run at a time; above 1 a SQLite database or a local store is refused."""
    lease_seconds: float = 30.0
    """How long a runner may be silent before another takes its job over."""
    poll_seconds: float = 0.5
    """How often runners look for queued jobs and wishes to stop."""
    max_concurrent_jobs: int = 1
    """Jobs that one stage runs at a time in this process."""
    max_attempts: int = 3
    """Starts of a job whose process was killed, before it FAILS."""
    stop_grace_seconds: float = 60.0
    """Time between SIGTERM and SIGKILL for a job's process: enough for a checkpoint."""
    allowed_paths: list[Path] = Field(default_factory=list)
    """Folders on the server that requests may name by path; others are refused."""
    allow_remote_code: list[str] = Field(default_factory=list)
    """Base models whose own code may run (`trust_remote_code`)."""
    log_format: Literal["auto", "json", "pretty"] = "auto"
    """`auto` is pretty on a terminal and JSON in a pipe."""
    log_level: str = "info"
    """debug, info, warning or error."""

    @model_validator(mode="after")
    def _fill_defaults(self) -> CoreSettings:
        self.data_dir = self.data_dir.expanduser().absolute()
        if not self.database_url:
            self.database_url = f"sqlite:///{self.data_dir / 'loraline.db'}"
        if self.database_password_file:
            self.database_url = _with_password(self.database_url, self.database_password_file)
            self.database_password_file = None  # done; a second reading must not put it in twice
        if not self.store_url:
            self.store_url = f"file://{self.data_dir / 'store'}"
        if self.keys_file is None:
            self.keys_file = self.data_dir / "api_keys.json"
        return self
