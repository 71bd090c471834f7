"""Addresses that the server listens on: reading them, binding them, and saying plainly why that failed."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass, field

import grpc

from loraline.core.errors import LoralineError, failed_precondition


@dataclass(frozen=True)
class ServerAddresses:
    """Where a running server listens, as host:port with the real port; empty for what is switched off."""

    grpc: str
    metrics: str = ""
    http: dict[str, str] = field(default_factory=dict)
    """Stage name -> host:port of its HTTP app."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free a moment ago, for programs that can't report the one they chose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def split_address(address: str, setting: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[v6]:port`; INVALID_ADDRESS names the setting otherwise."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise LoralineError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_ADDRESS",
            f"{setting} is {address!r}, which is not host:port. Write it like 127.0.0.1:7600 or [::1]:7600.",
        )
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around IPv6 hosts."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the host name or address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_failed(address: str, setting: str, cause: OSError) -> LoralineError:
    """Return the error for an address that cannot be listened on, with the setting that moves it."""
    if cause.errno == errno.EADDRINUSE:
        text = (
            f"{address} is taken: another program, perhaps another Loraline server, listens there. "
            f"Stop that program or set {setting} to a free port (port 0 lets the system choose)."
        )
        return failed_precondition("PORT_TAKEN", text, address=address, setting=setting)
    text = f"Cannot listen on {address}: {cause.strerror or cause}. Set {setting} to an address of this machine."
    return failed_precondition("CANNOT_LISTEN", text, address=address, setting=setting)


def bind(address: str, setting: str) -> socket.socket:
    """Return a listening-ready TCP socket bound to the address; PORT_TAKEN or CANNOT_LISTEN otherwise."""
    host, port = split_address(address, setting)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise listen_failed(address, setting, error) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
    except OSError as error:
        listener.close()
        raise listen_failed(address, setting, error) from error
    return listener


def bound_address(listener: socket.socket, address: str, setting: str) -> str:
    """Return the address as the setting wrote it, with the port that the socket really has."""
    host, _ = split_address(address, setting)
    return join_address(host, listener.getsockname()[1])
