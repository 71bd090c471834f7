"""What must hold before a server starts: settings that make sense, certificates that load, keys that exist."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio

from loraline.core.config import CoreSettings
from loraline.core.errors import failed_precondition
from loraline.core.serving.addresses import is_loopback, split_address
from loraline.core.serving.auth import KeyRing, write_private
from loraline.core.serving.component import Component

CLIENT_KEY = "client.key"
"""File in data_dir with the first key in plain, for the command line on the same machine."""


def check_settings(settings: CoreSettings, components: Sequence[Component]) -> None:
    """Refuse settings that contradict each other or would open the server to everyone."""
    if settings.auth == "off":
        places = [("LORALINE_LISTEN", settings.listen)]
        places += [(f"the HTTP address of {c.name}", c.http_listen) for c in components if c.http_app is not None]
        for setting, address in places:
            if not is_loopback(split_address(address, setting)[0]):
                text = (
                    f"LORALINE_AUTH=off is refused because {setting} is {address}, which other machines can reach. "
                    "Listen on 127.0.0.1, or leave LORALINE_AUTH at `keys`."
                )
                raise failed_precondition("AUTH_OFF_NOT_LOOPBACK", text, address=address)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        text = "TLS needs both LORALINE_TLS_CERT and LORALINE_TLS_KEY; only one of them is set."
        raise failed_precondition("TLS_INCOMPLETE", text)
    if settings.tls_client_ca and not settings.tls_cert:
        text = (
            "LORALINE_TLS_CLIENT_CA asks for client certificates, which needs LORALINE_TLS_CERT and LORALINE_TLS_KEY."
        )
        raise failed_precondition("TLS_INCOMPLETE", text)


def server_credentials(settings: CoreSettings) -> grpc.ServerCredentials | None:
    """Return TLS credentials; None when TLS is off. TLS_FILE_UNREADABLE when a file is missing or does not fit."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        # gRPC takes any bytes and fails at the first handshake; OpenSSL says now what is wrong.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
        certificate, key = settings.tls_cert.read_bytes(), settings.tls_key.read_bytes()
        client_ca = settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(f) for f in (settings.tls_cert, settings.tls_key, settings.tls_client_ca) if f)
        text = (
            f"The TLS files cannot be used ({error.strerror or error}). They must be readable PEM files, "
            f"and the key must belong to the certificate: {files}."
        )
        raise failed_precondition("TLS_FILE_UNREADABLE", text) from error
    return grpc.ssl_server_credentials([(key, certificate)], client_ca, require_client_auth=client_ca is not None)


def open_keys(settings: CoreSettings) -> tuple[KeyRing | None, str]:
    """Return the key ring (None when authentication is off) and the first key, in plain, if it was made just now."""
    if settings.auth == "off" or settings.keys_file is None:
        return None, ""
    first_start = not settings.keys_file.exists()
    try:
        ring = KeyRing(settings.keys_file)
        if not first_start:
            return ring, ""
        key = ring.create("first", ["operate"])
        write_private(settings.data_dir / CLIENT_KEY, key + "\n")
    except OSError as error:
        text = (
            f"The key file {settings.keys_file} cannot be written: {error.strerror or error}. "
            "Set LORALINE_KEYS_FILE or LORALINE_DATA_DIR to a place that this user may write to."
        )
        raise failed_precondition("KEYS_FILE_UNREADABLE", text, path=str(settings.keys_file)) from error
    return ring, key


def refuse_private_state(settings: CoreSettings) -> None:
    """Refuse a database or a store of this machine alone when the deployment runs several servers of a stage.

    Each would have jobs and artifacts of its own, and a client would find them or not by chance.
    """
    if settings.replicas == 1:
        return
    private = ["LORALINE_DATABASE_URL"] if settings.database_url.startswith("sqlite") else []
    if not settings.store_url.startswith("s3:"):
        private.append("LORALINE_STORE_URL")
    if private:
        text = (
            f"LORALINE_REPLICAS is {settings.replicas}, but {' and '.join(private)} name what only one server sees. "
            "Set LORALINE_DATABASE_URL to a Postgres and LORALINE_STORE_URL to an S3 bucket, or run one server."
        )
        raise failed_precondition("REPLICAS_NEED_SHARED_STATE", text, settings=",".join(private))


def make_data_dir(folder: Path) -> None:
    """Create the data folder for its owner alone; DATA_DIR_UNUSABLE when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        text = (
            f"The data folder {folder} cannot be used: {error.strerror or error}. "
            "Set LORALINE_DATA_DIR to a folder that this user may write to."
        )
        raise failed_precondition("DATA_DIR_UNUSABLE", text, path=str(folder)) from error


def channel_options(settings: CoreSettings) -> list[tuple[str, int]]:
    """Return gRPC's options for the server."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Without this two servers on one port would share the calls between them, and nobody would notice.
        ("grpc.so_reuseport", 0),
        # gRPC's default closes connections whose clients ping more often than every five minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]
