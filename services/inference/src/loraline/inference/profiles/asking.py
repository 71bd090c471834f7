"""A profile and its input become a question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraline.core.errors import LoralineError, invalid_argument
from loraline.inference.engines.port import Constraint, Sampling
from loraline.inference.profiles.profile import InputField, Profile
from loraline.inference.question import Question


@dataclass(frozen=True)
class Asked:
    """What a request says beside the profile's name; what is unset is the profile's."""

    fields: Mapping[str, Any] | None = None
    text: str = ""
    """Free text, or empty."""
    earlier: Sequence[dict[str, str]] = ()
    """Turns before this one."""
    model: str = ""
    session: str = ""
    language: str = ""
    forbid: tuple[str, ...] = ()
    retries: int | None = None
    fields_path: str = "profile_input"
    """How the request calls its fields, for refusals."""
    text_path: str = "messages"


def default_sampling(profile: Profile, most_tokens: int) -> Sampling:
    """Return how a profile's answers are sampled, within the server's limit."""
    own = profile.sampling
    return Sampling(
        max_tokens=min(own.max_tokens, most_tokens),
        temperature=own.temperature,
        top_p=own.top_p,
        repetition_penalty=own.repetition_penalty,
    )


def question_of(profile: Profile, asked: Asked, sampling: Sampling) -> Question:
    """Return the question. INVALID_ARGUMENT PROFILE_INPUT_INVALID names the field and what is wrong with it.

    Fields and free text may be given together or one without the other; required fields only where there is no text.
    """
    _check_text(profile, asked)
    lines = _lines(profile, asked.fields or {}, asked)
    words = "\n\n".join(part for part in ("\n".join(lines), asked.text.strip()) if part)
    if not words:
        raise _wrong(asked.fields_path, f"nothing was asked of {profile.name}; give {_wanted(profile)}")
    system = [{"role": "system", "content": profile.system_prompt}] if profile.system_prompt else []
    return Question(
        model=asked.model,
        messages=[*system, *asked.earlier, {"role": "user", "content": words}],
        sampling=sampling,
        constraint=Constraint("json_schema", profile.answer),
        language=asked.language or profile.language.answer,
        forbid=tuple(sorted({*profile.language.forbid, *asked.forbid})),
        retries=profile.retries if asked.retries is None else asked.retries,
        session=asked.session,
    )


def _check_text(profile: Profile, asked: Asked) -> None:
    most, length = profile.input.max_text, len(asked.text)
    if asked.text.strip() and not profile.input.free_text:
        raise _wrong(asked.text_path, f"{profile.name} takes no free text; give {_wanted(profile)}")
    if length > most:
        raise _wrong(asked.text_path, f"the text has {length} characters; {profile.name} takes at most {most}")


def _lines(profile: Profile, fields: Mapping[str, Any], asked: Asked) -> list[str]:
    known = profile.input.fields
    unknown = [name for name in fields if name not in known]
    if unknown:
        path = f"{asked.fields_path}.{unknown[0][:80]}"
        raise _wrong(path, f"{profile.name} has no such field; it takes {_wanted(profile)}")
    lines = []
    for name, field in known.items():
        path = f"{asked.fields_path}.{name}"
        value = _text_of(path, fields.get(name))
        if value:
            _check_value(path, field, value)
            lines.append(f"{field.label or name}: {value}")
        elif field.required and not asked.text.strip():
            raise _wrong(path, "it is missing; give it, or free text" if profile.input.free_text else "it is missing")
    return lines


def _check_value(path: str, field: InputField, value: str) -> None:
    if len(value) > field.max_length:
        raise _wrong(path, f"it has {len(value)} characters; at most {field.max_length} are taken")
    if field.choices and value not in field.choices:
        raise _wrong(path, f"{value[:40]!r} is none of {', '.join(field.choices)}")


def _text_of(path: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value).strip()
    if isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(str(part).strip() for part in value)
    raise _wrong(path, "it must be a text, a number or a list of those")


def _wanted(profile: Profile) -> str:
    fields = ", ".join(profile.input.fields)
    text = "free text" if profile.input.free_text else ""
    return " or ".join(part for part in (f"the fields {fields}" if fields else "", text) if part)


def _wrong(path: str, why: str) -> LoralineError:
    message = f"{path}: {why}."
    return invalid_argument("PROFILE_INPUT_INVALID", message, **{path.replace(".", "__"): message})
