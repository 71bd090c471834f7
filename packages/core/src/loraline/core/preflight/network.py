"""Whether the model hub can be reached, and what stands in the way: a proxy, or WSL's own loopback."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from loraline.core.preflight.finding import Finding, ok

DEFAULT_HUB = "https://huggingface.co"
_SECONDS = 5.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def check_hub(environment: Mapping[str, str] | None = None, seconds: float = _SECONDS) -> Finding:
    """Ask the hub for its front page; any answer will do. Blocking, at most some seconds."""
    given = os.environ if environment is None else environment
    if given.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return ok("hub", "HF_HUB_OFFLINE is set: no hub is asked, models come from the store, a folder or the cache")
    hub = given.get("HF_ENDPOINT", "") or DEFAULT_HUB
    proxies = {name.lower().removesuffix("_proxy"): given[name] for name in reversed(_PROXIES) if given.get(name)}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        opener.open(urllib.request.Request(hub, method="HEAD"), timeout=seconds).close()  # noqa: S310 - an operator's own URL
    except urllib.error.HTTPError as error:
        if error.code == 407:
            return Finding("hub", "warning", f"the proxy asks for a name and password (407) before {hub}", _REASON)
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        return Finding("hub", "warning", f"{hub} cannot be reached: {cause}.{_hint(proxies)}", _REASON)
    return ok("hub", f"{hub} answers")


_REASON = "HUB_UNREACHABLE"


def in_wsl(version: Path = Path("/proc/version")) -> bool:
    """Tell whether this is Linux under Windows."""
    try:
        return "microsoft" in version.read_text(encoding="utf-8").lower()
    except OSError:
        return False


def windows_host(routes: Path = Path("/proc/net/route")) -> str:
    """Return the address of the Windows host as WSL sees it, which is its default gateway; empty when unknown."""
    try:
        lines = routes.read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return ""
    for parts in map(str.split, lines):
        if len(parts) > 2 and parts[1] == "00000000":
            return ".".join(str(byte) for byte in reversed(bytes.fromhex(parts[2])))
    return ""


def _hint(proxies: Mapping[str, str], *, wsl: bool | None = None, host: str | None = None) -> str:
    """Say what of the proxy's settings explains a failure."""
    under_windows = in_wsl() if wsl is None else wsl
    if not proxies:
        proxy = f" On WSL the Windows host is {windows_host() if host is None else host}." if under_windows else ""
        return f" No proxy is set (HTTPS_PROXY).{proxy}"
    used = next((proxies[name] for name in ("https", "http", "all") if name in proxies), "")
    address = urllib.parse.urlsplit(used if "//" in used else f"//{used}")
    shown = f"{address.hostname}:{address.port}" if address.port else str(address.hostname)
    if under_windows and address.hostname in ("127.0.0.1", "localhost", "::1"):
        return (
            f" The proxy {shown} means this Linux, not Windows: use the Windows host's address "
            f"({windows_host() if host is None else host})."
        )
    return f" The proxy is {shown}."
