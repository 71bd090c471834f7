"""A response profile and how a YAML file becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.engines.port import Constraint
from loraline.inference.language.rules import check_names
from loraline.inference.structured.schema import with_bounded_texts
from loraline.inference.structured.shape import shape_of

_MOST_BYTES = 1024 * 1024
LONGEST_TEXT = 1000
"""Characters of an answer's text that its schema does not bound: a model that loops on blanks ends there."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
EVENTS_OF_OUR_OWN = frozenset({"close", "error", "figures", "message"})


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InputField(_Part):
    """One field of a profile's input."""

    label: str = Field(default="", max_length=200)
    """How the prompt calls it; its name when empty."""
    description: str = Field(default="", max_length=2000)
    required: bool = False
    choices: list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]] = Field(default=[], max_length=1000)
    """The values it may have; empty for any."""
    max_length: int = Field(default=1000, ge=1, le=4_000_000)
    """Longest text, in characters."""


class Inputs(_Part):
    """What may be put in: named fields, free text, or both."""

    fields: dict[Name, InputField] = Field(default={}, max_length=100)
    free_text: bool = True
    max_text: int = Field(default=20_000, ge=1, le=4_000_000)
    """Longest free text, in characters."""


class Language(_Part):
    """The language rule."""

    answer: str = Field(default="", max_length=16)
    """`ko`, `zh`, `en`, `question`; empty for any."""
    forbid: list[str] = Field(default=[], max_length=16)


class Streamed(_Part):
    """Which items of the answer are events of their own."""

    field: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """A top-level array of the answer."""
    event: Name


class ProfileSampling(_Part):
    """How the answer is sampled where a request says nothing."""

    max_tokens: int = Field(default=512, ge=1, le=1_000_000)
    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)


class Profile(_Part):
    """A named way to answer."""

    name: Name
    description: Annotated[str, StringConstraints(min_length=1, max_length=2000)]
    system_prompt: Annotated[str, StringConstraints(max_length=20_000)] = ""
    input: Inputs = Inputs()
    answer: dict[str, Any]
    """JSON schema of the answer. Its texts have at most LONGEST_TEXT characters where it says nothing else."""
    language: Language = Language()
    stream: Streamed | None = None
    sampling: ProfileSampling = ProfileSampling()
    retries: int = Field(default=0, ge=0, le=5)


@dataclass(frozen=True)
class ProfileFile:
    """A profile and where it came from."""

    profile: Profile
    path: Path


def read_profile(path: Path) -> Profile:
    """Read and check one YAML file. INVALID_ARGUMENT PROFILE_INVALID names the file, the field and what is wrong."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            _refuse(path, "", f"it is larger than {_MOST_BYTES} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        _refuse(path, "", f"it cannot be read: {error}")
    except (yaml.YAMLError, RecursionError) as error:
        _refuse(path, "", f"it is no YAML: {' '.join(str(error).split())}")
    if not isinstance(content, Mapping):
        _refuse(path, "", "it must hold one mapping with name, description and answer")
    try:
        profile = Profile.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(path, ".".join(str(part) for part in first["loc"]), first["msg"])
    _check(profile, path)
    return profile.model_copy(update={"answer": with_bounded_texts(profile.answer, LONGEST_TEXT)})


def _check(profile: Profile, path: Path) -> None:
    if not (profile.input.fields or profile.input.free_text):
        _refuse(path, "input", "it takes neither fields nor free text, so nothing can be asked")
    if profile.answer.get("type") != "object":
        _refuse(path, "answer.type", "the answer must be one JSON object: type: object")
    try:
        check_names(profile.language.answer, profile.language.forbid, "language.answer")
        shape_of(Constraint("json_schema", profile.answer), None, "answer")
    except LoralineError as error:
        field = next(iter(error.fields), "answer")
        _refuse(path, {"forbid": "language.forbid"}.get(field, field), error.message)
    if profile.stream is None:
        return
    streamed = (profile.answer.get("properties") or {}).get(profile.stream.field)
    if not isinstance(streamed, Mapping) or streamed.get("type") != "array":
        _refuse(path, "stream.field", f"{profile.stream.field!r} is no array among the answer's properties")
    if profile.stream.field not in profile.answer.get("required", ()):
        _refuse(path, "stream.field", f"{profile.stream.field!r} must be among the answer's required fields")
    if profile.stream.event in EVENTS_OF_OUR_OWN:
        _refuse(path, "stream.event", f"{profile.stream.event!r} is an event of the server's own; take another name")


def _refuse(path: Path, field: str, why: str) -> NoReturn:
    where = f"{path.name}: {field}" if field else path.name
    message = f"The response profile {where}: {why.rstrip('.')}. Mend the file and start again."
    raise invalid_argument("PROFILE_INVALID", message, **{(field or "profile").replace(".", "__"): why})
