#!/usr/bin/env python3
"""Writes the secrets of docker-compose.yml into deploy/compose/secrets: random, readable by owner and containers.

Needs nothing but Python. Existing files are kept, so it is safe to repeat. The API key for clients is then in the file
`api_key`; the services only see its hash in `api_keys.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "secrets"


def _write(name: str, text: str, mode: int = 0o644) -> None:
    """Write a secret. Containers run as uid 10001 and see the file's own mode, hence 0644 behind a folder of 0700."""
    path = FOLDER / name
    path.touch(mode)
    path.chmod(mode)
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """Write what is missing and say where it is."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    FOLDER.chmod(0o700)
    for name in ("postgres_password", "minio_secret_key", "grafana_password"):
        if not (FOLDER / name).exists():
            _write(name, secrets.token_urlsafe(24))
    # Keys of other services; an empty file means that there is none.
    for name in ("llm_api_key", "hf_token"):
        if not (FOLDER / name).exists():
            _write(name, os.environ.get(name.upper(), ""))
    if not (FOLDER / "api_keys.json").exists():
        identity, secret = secrets.token_hex(4), secrets.token_hex(24)
        entry = {
            "id": identity,
            "name": "compose",
            "roles": ["operate"],
            "sha256": hashlib.sha256(secret.encode()).hexdigest(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        _write("api_keys.json", json.dumps({"keys": [entry]}, indent=2) + "\n")
        _write("api_key", f"lora_{identity}_{secret}\n", mode=0o600)
    print(f"secrets are in {FOLDER}; clients: export LORALINE_API_KEY=$(cat {FOLDER / 'api_key'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
