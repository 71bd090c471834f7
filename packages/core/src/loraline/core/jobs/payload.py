"""What a runner tells a job's child process: one line of JSON on its standard input.

The input pipe then stays open; its end tells the child that the runner is gone. Secrets travel in this line and never
in arguments or the environment, which other users of the machine may read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the child reads this module before it may import anything heavy
    from loraline.core.config import CoreSettings


@dataclass(frozen=True)
class ChildPayload:
    """The job, the lease it runs under, and how to run it."""

    job: str
    kind: str
    epoch: int
    attempt: int
    entry: str
    """`package.module:function`."""
    request_type: str
    """`package.module:Message`."""
    runner_pid: int
    settings: dict[str, Any]
    """CoreSettings with its secrets in plain text."""
    telemetry_fd: int = -1
    """Descriptor that the child writes its counters to; -1 for none."""
    trace: dict[str, str] = field(default_factory=dict)
    """The supervisor's span as headers; empty while traces are off."""

    def to_line(self) -> bytes:
        """Return the payload as one line."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> ChildPayload:
        """Read a line that to_line wrote."""
        return cls(**json.loads(line))


def settings_to_json(settings: CoreSettings) -> dict[str, Any]:
    """Return settings as JSON values, secrets in plain text."""
    from pydantic import SecretStr

    dumped = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            dumped[name] = value.get_secret_value()
    return dumped


def settings_secrets(settings: CoreSettings) -> list[str]:
    """Return the secret values in settings, for redaction."""
    from pydantic import SecretStr

    values = (getattr(settings, name) for name in type(settings).model_fields)
    found = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    return [secret for secret in found if secret]
