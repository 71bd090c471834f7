"""Virtual environments for the peers, one each, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Client:
    """A client to be measured: `in_flight` is the one of 64, 128 and 256 at which it was fastest here."""

    name: str
    in_flight: int
    packages: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        return CLIENTS / f"with_{self.name}.py"


OURS = Client("loraline", 256)
PEERS = (
    Client("curator", 128, ("bespokelabs-curator",)),
    # It imports requests without asking for it; the newest datasets no longer brings it.
    Client("distilabel", 256, ("distilabel[openai]", "requests")),
    Client("data_designer", 64, ("data-designer",)),
)


def cache_folder() -> Path:
    """Return where the environments are made unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "loraline" / "bench-peers"


def install(client: Client, folder: Path) -> str:
    """Make the client's environment and install the newest version that the index has; return why not, or ""."""
    uv, python = Path(sys.executable).parent / "uv", python_of(client, folder)
    environment = {**os.environ, "UV_SYSTEM_CERTS": os.environ.get("UV_SYSTEM_CERTS", "1")}
    commands = [
        [str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(python.parents[1])],
        [str(uv), "pip", "install", "--quiet", "--python", str(python), *client.packages],
    ]
    for command in commands:
        try:
            told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            return "no end after 900 s"
        if told.returncode:
            return " ".join(told.stderr.split())[:300]
    return ""


def python_of(client: Client, folder: Path) -> Path:
    """Return the client's interpreter; ours is this one."""
    return folder / client.name / "bin" / "python" if client.packages else Path(sys.executable)


def environment_of(folder: Path, work: Path) -> dict[str, str]:
    """Return the environment of all clients: no telemetry, no hub, every cache under `work`."""
    environment = {
        **os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"), "TELEMETRY_ENABLED": "false", "NEMO_TELEMETRY_ENABLED": "false",
        "DATA_DESIGNER_HOME": str(work / "designer"),
    }  # fmt: skip
    # curator and Data Designer count tokens with tables that tiktoken would fetch; litellm, which curator brings, has
    # them in its package.
    for tables in folder.glob("curator/lib/python3*/site-packages/litellm/litellm_core_utils/tokenizers"):
        environment["TIKTOKEN_CACHE_DIR"] = str(tables)
    return environment
