"""What a server tells the person who starts it: where it listens and where things are kept."""

from __future__ import annotations

from collections.abc import Sequence

from loraline.core.config import CoreSettings
from loraline.core.serving.addresses import ServerAddresses
from loraline.core.serving.startup import CLIENT_KEY


def start_message(
    settings: CoreSettings, addresses: ServerAddresses, first_keys: Sequence[str], *, terminal: bool
) -> str:
    """Return the lines for standard output; only a terminal gets the first key, for a pipe's other end may keep it."""
    lines = [f"Loraline listens on {addresses.grpc} (gRPC{', TLS' if settings.tls_cert else ''})"]
    lines += [
        f"  HTTP of {name}: {'https' if settings.tls_cert else 'http'}://{a}" for name, a in addresses.http.items()
    ]
    if addresses.metrics:
        lines.append(f"  metrics and health: http://{addresses.metrics}/metrics, /healthz")
    lines.append(f"  data: {settings.data_dir}")
    lines.append(f"  store: {settings.store_url}")
    if settings.auth == "off":
        lines.append("  authentication is off: everyone on this machine may do everything")
    for key in first_keys:
        shown = f" {key} (shown once; also" if terminal else " (not shown outside a terminal;"
        lines.append(f"  first API key:{shown} in {settings.data_dir / CLIENT_KEY})")
    return "\n".join(lines)
