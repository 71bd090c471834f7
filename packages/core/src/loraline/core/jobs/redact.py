"""Takes secrets out of text that leaves the machine, such as the tail of a job's log in an error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
_SECRET_SHAPES = (
    re.compile(r"\b(sk-|hf_|ghp_|gho_|AIza|AKIA|xox[abp]-|ll_)[A-Za-z0-9_\-]{8,}"),
    re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{8,}"),
    re.compile(r"(?<=://)[^\s/:@]+:[^\s@]+(?=@)"),
    re.compile(r"(?i)\b(api[_-]?key|token|secret|password)(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;}]{4,}"),
)
_MASK = "[secret]"


def environment_secrets() -> list[str]:
    """Return the values of environment variables whose names say that they are secret."""
    return [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 6]


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return the text without these secrets, those of the environment, and whatever has the shape of one."""
    for secret in sorted({*secrets, *environment_secrets()}, key=len, reverse=True):
        if len(secret) >= 4:
            text = text.replace(secret, _MASK)
    for shape in _SECRET_SHAPES:
        text = shape.sub(_MASK, text)
    return text
