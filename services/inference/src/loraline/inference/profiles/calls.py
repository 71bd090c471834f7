"""What gRPC asks of profiles: their list, and the question that a Chat with one is."""

from __future__ import annotations

from dataclasses import replace

from loraline.api.inference.v1 import inference_pb2
from loraline.core.errors import LoralineError, invalid_argument
from loraline.core.structs import json_value
from loraline.inference.engines.port import Sampling
from loraline.inference.messages import sampling_of
from loraline.inference.profiles.asking import Asked, default_sampling, question_of
from loraline.inference.profiles.profile import Profile
from loraline.inference.profiles.registry import Profiles
from loraline.inference.question import Question

_DEFAULT_PAGE = 50


def profile_question(profiles: Profiles, request: inference_pb2.ChatRequest, most_tokens: int) -> Question:
    """Return the question of a Chat with a profile. NOT_FOUND or INVALID_ARGUMENT name what is wrong."""
    profile = profiles.get(request.profile)
    if request.structured.WhichOneof("shape"):
        raise _beside("structured", "the profile brings the shape of the answer; set one of them")
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    if messages and messages[-1]["role"] != "user":
        raise _beside("messages", "the last message must be the user's: it is the profile's free text")
    text = messages.pop()["content"] if messages else ""
    asked = Asked(
        fields=json_value(request.profile_input) if request.HasField("profile_input") else None,
        text=text,
        earlier=messages,
        model=request.model,
        session=request.session,
        language=request.language,
        forbid=tuple(request.forbid),
        retries=request.structured.retries or None,
    )
    return question_of(profile, asked, _sampling(profile, request.sampling, most_tokens))


def profiles_page(profiles: Profiles, begin: int, size: int) -> inference_pb2.ListProfilesResponse:
    """Return a page of the profiles; `size` 0 means 50."""
    size = size or _DEFAULT_PAGE
    known = list(profiles)
    page = [_message(profile) for profile in known[begin : begin + size]]
    more = str(begin + size) if begin + size < len(known) else ""
    return inference_pb2.ListProfilesResponse(profiles=page, next_page_token=more)


def _sampling(profile: Profile, message: inference_pb2.SamplingParameters, most_tokens: int) -> Sampling:
    """Return what the request sets, and the profile's own for the rest."""
    own, given = default_sampling(profile, most_tokens), sampling_of(message, most_tokens)
    optional = ("temperature", "top_p", "repetition_penalty")
    unset = {name: getattr(own, name) for name in optional if not message.HasField(name)}  # type: ignore[arg-type]
    return replace(given, max_tokens=message.max_tokens or own.max_tokens, **unset)


def _message(profile: Profile) -> inference_pb2.Profile:
    stream = profile.stream
    message = inference_pb2.Profile(
        name=profile.name,
        description=profile.description,
        language=profile.language.answer,
        forbid=profile.language.forbid,
        free_text=profile.input.free_text,
        streamed_field=stream.field if stream else "",
        event=stream.event if stream else "",
        fields=[
            inference_pb2.ProfileField(
                name=name,
                description=field.description,
                required=field.required,
                choices=field.choices,
                max_length=field.max_length,
            )
            for name, field in profile.input.fields.items()
        ],
    )
    message.schema.update(profile.answer)
    return message


def _beside(field: str, why: str) -> LoralineError:
    message = f"{field}: {why}."
    return invalid_argument("PROFILE_INPUT_INVALID", message, **{field: message})
