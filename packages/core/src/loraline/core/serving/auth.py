"""API keys: who calls, and what that caller may do.

A key reads `lora_<id>_<secret>`. The file keeps the id, the name, the roles and the SHA-256 of the secret; the secret
itself has 192 random bits, so a plain hash is enough and costs microseconds. The file is read again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import structlog

from loraline.core.errors import LoralineError, already_exists, failed_precondition, invalid_argument, not_found
from loraline.core.folder_lock import locked_file

ROLES = ("chat", "operate")
"""`chat` asks models; `operate` may do everything."""

_INFERENCE = "/loraline.api.inference.v1.InferenceService/"
CHAT_METHODS = frozenset(
    _INFERENCE + method
    for method in (
        "Generate",
        "Chat",
        "ListModels",
        "GetCapabilities",
        "ListProfiles",
        "CreateSession",
        "GetSession",
        "ListSessions",
        "ResetSession",
        "DeleteSession",
    )
)
"""All that the role `chat` may call. Every other method needs `operate`."""

OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Services that answer without a key, so that probes of orchestrators work."""

_RELOAD_SECONDS = 1.0
_NO_SECRET = hashlib.sha256(b"no such key").hexdigest()
log = structlog.get_logger("loraline.auth")


@dataclass(frozen=True)
class Principal:
    """Who calls: the key's id, its name, its roles and how much it may ask."""

    key_id: str
    name: str
    roles: tuple[str, ...]
    requests_per_minute: int = 0
    """Questions to models that the key may ask in a minute; 0 for no limit."""
    tokens_per_minute: int = 0
    """Tokens of prompts and answers that the key may use in a minute; 0 for no limit."""

    def may_call(self, method: str) -> bool:
        """Tell whether the caller may call the gRPC method (`/package.Service/Method`)."""
        return "operate" in self.roles or ("chat" in self.roles and method in CHAT_METHODS)


ANONYMOUS = Principal("", "anonymous", ("operate",))
"""The caller when authentication is off."""

_principal: ContextVar[Principal | None] = ContextVar("loraline_principal", default=None)


def current_principal() -> Principal | None:
    """Return who makes the call that is being served; None outside of a call."""
    return _principal.get()


def set_principal(principal: Principal | None) -> None:
    """Remember who makes the call, for the rest of the current task."""
    _principal.set(principal)


def missing_key() -> LoralineError:
    """UNAUTHENTICATED for a call that carries no key."""
    text = (
        "This server asks for an API key. Send it as metadata `authorization: Bearer <key>`; "
        "make one with `loraline keys create NAME` where the server runs."
    )
    return LoralineError(grpc.StatusCode.UNAUTHENTICATED, "MISSING_KEY", text)


def unknown_key() -> LoralineError:
    """UNAUTHENTICATED for a key that is not, or no longer, in the key file."""
    text = "The API key is not known here or was revoked. Make a new one with `loraline keys create NAME`."
    return LoralineError(grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_KEY", text)


def role_missing(principal: Principal, what: str) -> LoralineError:
    """PERMISSION_DENIED for a key whose roles do not cover what it asked for."""
    text = (
        f"The key {principal.name!r} has the role {' and '.join(principal.roles) or 'none'}; {what} needs `operate`. "
        "Make such a key with `loraline keys create NAME --role operate`."
    )
    metadata = {"key": principal.name, "needs": "operate"}
    return LoralineError(grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING", text, metadata=metadata)


@dataclass(frozen=True)
class KeyRecord:
    """A key as the file keeps it."""

    id: str
    name: str
    roles: tuple[str, ...]
    sha256: str
    created: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def principal(self) -> Principal:
        """Return who calls with this key."""
        return Principal(self.id, self.name, self.roles, self.requests_per_minute, self.tokens_per_minute)


def _parse(text: str) -> dict[str, KeyRecord]:
    records = [_record(row) for row in json.loads(text)["keys"]]
    return {record.id: record for record in records}


def _record(row: dict[str, Any]) -> KeyRecord:
    return KeyRecord(
        str(row["id"]),
        str(row["name"]),
        tuple(row["roles"]),
        str(row["sha256"]),
        str(row.get("created", "")),
        int(row.get("requests_per_minute", 0)),
        int(row.get("tokens_per_minute", 0)),
    )


class KeyRing:
    """The keys of one server, kept in one JSON file that other processes may change at any time."""

    def __init__(self, path: Path):
        self.path = path
        self._records: dict[str, KeyRecord] = {}
        self._principals: dict[str, Principal] = {}
        # Keys that proved right since the file was read, so that hashing is paid once for each. Looking one up tells a
        # guesser nothing: Python compares strings only when their randomly keyed hashes are equal.
        self._proven: dict[str, Principal] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._next_check = 0.0
        self._load()

    def verify(self, key: str) -> Principal | None:
        """Return whose key this is, or None. How long it takes says nothing about a secret."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + _RELOAD_SECONDS
            self._reload_if_changed()
        proven = self._proven
        if key in proven:
            return proven[key]
        parts = key.split("_", 2)
        prefix, key_id, secret = parts if len(parts) == 3 else ("", "", "")
        if key_id not in self._records:
            # A key that was made a moment ago must not be told that it does not exist; a look costs microseconds.
            self._reload_if_changed()
        record = self._records.get(key_id)
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        known = hmac.compare_digest(digest, record.sha256 if record else _NO_SECRET)
        if not known or record is None or prefix != "lora":
            return None
        return proven.setdefault(key, self._principals[key_id])

    def create(
        self, name: str, roles: Sequence[str], *, requests_per_minute: int = 0, tokens_per_minute: int = 0
    ) -> str:
        """Add a key and return it in plain: the only time it is ever seen. ALREADY_EXISTS when the name is taken.

        The limits count questions to models and their tokens; 0 means none.
        """
        unknown = [role for role in roles if role not in ROLES]
        if unknown or not roles:
            raise invalid_argument("UNKNOWN_ROLE", f"Role {unknown or 'none'} is not one of {', '.join(ROLES)}.")
        if not name.strip():
            raise invalid_argument("INVALID_KEY_NAME", "A key needs a name that tells whose it is.")
        if requests_per_minute < 0 or tokens_per_minute < 0:
            raise invalid_argument("INVALID_KEY_LIMIT", "A key's limits are whole numbers from 0; 0 means no limit.")
        with self._locked():
            if any(record.name == name for record in self._records.values()):
                text = f"There is a key named {name!r}. Revoke it first, or take another name."
                raise already_exists("KEY_NAME_TAKEN", text, name=name)
            key_id, secret = secrets.token_hex(4), secrets.token_hex(24)
            digest = hashlib.sha256(secret.encode()).hexdigest()
            created = datetime.now(UTC).isoformat(timespec="seconds")
            limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
            record = KeyRecord(key_id, name, tuple(roles), digest, created, **limits)
            self._save([*self._records.values(), record])
        return f"lora_{key_id}_{secret}"

    def list(self) -> list[KeyRecord]:
        """Return all keys, oldest first, as the file has them now."""
        self._load()
        return list(self._records.values())

    def revoke(self, name_or_id: str) -> KeyRecord:
        """Remove a key; servers refuse it a second later. NOT_FOUND names the keys that there are."""
        with self._locked():
            for record in self._records.values():
                if name_or_id in (record.id, record.name):
                    self._save([other for other in self._records.values() if other is not record])
                    return record
            names = ", ".join(record.name for record in self._records.values()) or "none"
            raise not_found("KEY_NOT_FOUND", f"There is no key {name_or_id!r}. Keys: {names}.")

    def _load(self) -> None:
        try:
            stat = self.path.stat()
            records = _parse(self.path.read_text("utf-8"))
        except FileNotFoundError:
            stat, records = None, {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = (
                f"The key file {self.path} cannot be read: {error}. Mend its permissions or content, or move it away "
                "to start with a new key; LORALINE_KEYS_FILE names another file."
            )
            raise failed_precondition("KEYS_FILE_UNREADABLE", text, path=str(self.path)) from error
        self._stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None
        self._records = records
        self._proven = {}
        self._principals = {record.id: record.principal() for record in records.values()}

    def _reload_if_changed(self) -> None:
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except FileNotFoundError:
            stamp = None
        except OSError as error:
            log.warning("key file cannot be looked at; going on with the keys read before", error=str(error))
            return
        if stamp == self._stamp:
            return
        try:
            self._load()
            log.info("key file read again", keys=len(self._records))
        except LoralineError as error:
            self._stamp = stamp
            log.error("key file is broken; going on with the keys read before", reason=error.reason, error=str(error))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock and its newest content: two commands at once must not lose a key."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked_file(self.path.with_suffix(".lock")):
            self._load()
            yield

    def _save(self, records: Sequence[KeyRecord]) -> None:
        text = json.dumps({"version": 1, "keys": [asdict(record) for record in records]}, indent=2, ensure_ascii=False)
        write_private(self.path, text + "\n")
        self._load()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mkstemp gives mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
