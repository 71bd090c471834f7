"""Where the servers are and who asks: from arguments, the environment, or the data folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from loraline.client.errors import LoralineApiError

STAGES = ("datagen", "trainer", "merger", "inference")
DEFAULT_ADDRESS = "127.0.0.1:7600"
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A dead peer is noticed within six minutes even on a silent watch stream. Not sooner: gRPC servers by default
    # answer pings more often than every five minutes with GOAWAY, which would cut a long call.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that restarts is found again soon; gRPC's own steps grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A proxy in the environment is for the web, not for a server named by address.
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class Tls:
    """TLS towards the servers: PEM files. Without `ca`, the system's certificates are trusted."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; INVALID_ARGUMENT names one that is not there."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))


@dataclass(frozen=True)
class Connection:
    """Settled connection settings: an address for each stage, the API key, TLS."""

    addresses: Mapping[str, str]
    key: str = field(default="", repr=False)
    tls: Tls | None = None

    def channel(self, address: str) -> grpc.aio.Channel:
        """Open a channel; it connects at the first call."""
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(address, self.tls.credentials(), options=CHANNEL_OPTIONS)


def data_dir() -> Path:
    """Return the folder where a local server keeps its things: `$LORALINE_DATA_DIR` or `~/.loraline`."""
    return Path(os.environ.get("LORALINE_DATA_DIR") or Path.home() / ".loraline").expanduser()


def settle(
    address: str | None = None,
    key: str | None = None,
    *,
    addresses: Mapping[str, str] | None = None,
    tls: Tls | bool | None = None,
) -> Connection:
    """Settle what was not given from the environment.

    Addresses: `addresses` by stage, then `address`, then `LORALINE_<STAGE>_ADDRESS`, then `LORALINE_ADDRESS`, then
    127.0.0.1:7600. Key: `key`, then `LORALINE_API_KEY`, then the file client.key in the data folder, then none.
    TLS: `tls`, then `LORALINE_TLS_CA`, `LORALINE_TLS_CLIENT_CERT` and `LORALINE_TLS_CLIENT_KEY`; `LORALINE_TLS=1` for
    the system's certificates.
    """
    unknown = set(addresses or {}) - set(STAGES)
    if unknown:
        raise _bad("INVALID_ADDRESS", f"There is no stage {min(unknown)!r}. The stages are: {', '.join(STAGES)}.")
    chosen = {stage: _address_of(stage, address, addresses or {}) for stage in STAGES}
    return Connection(chosen, key=_settle_key(key), tls=_settle_tls(tls))


def _address_of(stage: str, address: str | None, addresses: Mapping[str, str]) -> str:
    environment = os.environ.get(f"LORALINE_{stage.upper()}_ADDRESS") or os.environ.get("LORALINE_ADDRESS")
    text = addresses.get(stage) or address or environment or DEFAULT_ADDRESS
    text = text.removeprefix("http://").removeprefix("grpc://").rstrip("/")
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise _bad("INVALID_ADDRESS", f"{text!r} is no address. Write HOST:PORT, such as {DEFAULT_ADDRESS}.")
    return text


def _settle_key(key: str | None) -> str:
    if key is not None:
        return key.strip()
    if os.environ.get("LORALINE_API_KEY"):
        return os.environ["LORALINE_API_KEY"].strip()
    file = data_dir() / "client.key"
    try:
        return file.read_text().strip() if file.is_file() else ""
    except OSError as error:
        raise _bad("UNREADABLE_KEY", f"The key file {file} cannot be read: {error.strerror}.") from error


def _settle_tls(tls: Tls | bool | None) -> Tls | None:
    if isinstance(tls, Tls):
        return tls
    if tls is not None:
        return Tls() if tls else None
    files = {
        name: os.environ.get(f"LORALINE_TLS_{variable}")
        for name, variable in (("ca", "CA"), ("cert", "CLIENT_CERT"), ("key", "CLIENT_KEY"))
    }
    if any(files.values()):
        return Tls(**{name: Path(text) for name, text in files.items() if text})
    return Tls() if os.environ.get("LORALINE_TLS", "").lower() in {"1", "true", "yes", "on"} else None


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise _bad("UNREADABLE_CERTIFICATE", f"The PEM file {file} cannot be read: {error.strerror}.") from error


def _bad(reason: str, message: str) -> LoralineApiError:
    return LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)
