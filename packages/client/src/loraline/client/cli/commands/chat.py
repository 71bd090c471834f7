"""`loraline chat`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer

from loraline.client.cli.app import App, Invocation, invocation
from loraline.client.cli.chat.loop import ChatLoop
from loraline.client.cli.chat.openai_partner import OpenAiPartner
from loraline.client.cli.chat.partners import Partner, ServicePartner
from loraline.client.cli.chat.talk import Talk, character_prompt
from loraline.client.cli.chat.typed_lines import lines
from loraline.client.cli.failures import CommandFailed, exit_code
from loraline.client.errors import LoralineApiError
from loraline.client.sync import Loraline


def register(app: App) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(  # noqa: PLR0913, PLR0917 - an option each
    prompt: Annotated[str, typer.Argument(help="One question; without it, a conversation.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="name, name@alias or name:vN; empty for the base.")] = "",
    compare: Annotated[str | None, typer.Option(help="Show this model's answers beside; `base` for the base.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    character: Annotated[str, typer.Option(help="A name, or a .txt, .md, .yaml or .json with the system prompt.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy; unset means 0.7.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Longest answer; 0 means 256.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Answers are JSON objects and nothing else.")] = False,
    lang: Annotated[str, typer.Option(help="Answers in ko, zh or en; `question` follows the question.")] = "",
    session: Annotated[str, typer.Option(help="Go on with a session on the server; `new` opens one.")] = "",
    openai: Annotated[
        str, typer.Option(metavar="URL", help="Ask any OpenAI-compatible server; key: --key or OPENAI_API_KEY.")
    ] = "",
) -> None:
    """Talk to a model, on a terminal or through a pipe (each line is a turn).

    In the conversation, /help lists commands: /reset /system /temperature /model /adapter /json /lang /save /quit.
    On a terminal, Tab completes commands and names, and the arrows call up earlier lines.

    Examples:

      loraline chat --model mareva@production
      loraline chat --model mareva@production --compare base
      loraline chat -m mareva@production --temperature 0 "How are you today?"
      loraline chat -m mareva@production --session new
      loraline chat --openai http://127.0.0.1:11434/v1 -m my-model
      echo "How are you today?" | loraline chat -m mareva@production
    """
    if character:
        system = "\n\n".join(text for text in (character_prompt(character), system) if text)
    first = Talk(model, system, temperature, max_tokens, seed, json_only, lang)
    talks = [first]
    if compare is not None:
        talks.append(Talk("" if compare == "base" else compare, system, temperature, max_tokens, seed, json_only, lang))
    if session and (openai or compare is not None):
        text = "--session keeps one talk of this platform's server; leave out --openai and --compare."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "SESSION_MISPLACED", text)
    with _partner(invocation(), openai, first, session) as partner:
        _talk(partner, talks, prompt)


def _talk(partner: Partner, talks: list[Talk], prompt: str) -> None:
    output = invocation().output
    loop = ChatLoop(partner, output, talks)
    if prompt:
        loop.turn(prompt)
        return
    loop.run(lines(output, loop.arguments()))
    if loop.last_error is not None and not sys.stdin.isatty():
        raise CommandFailed(exit_code(loop.last_error))


@contextmanager
def _partner(given: Invocation, openai: str, talk: Talk, session: str) -> Iterator[Partner]:
    if openai:
        yield OpenAiPartner(openai, given.key or os.environ.get("OPENAI_API_KEY", ""))
        return
    with given.client() as client:
        if session:
            _open_session(client, talk, session)
        yield ServicePartner(client)


def _open_session(client: Loraline, talk: Talk, session: str) -> None:
    output = invocation().output
    if session == "new":
        talk.session = client.inference.create_session(talk.model, system_prompt=talk.system).name
        output.say(f"(session {talk.session}; go on later with --session {talk.session})", "dim")
        return
    if talk.system:
        text = f"Session {session} has its own system prompt; leave out --system and --character, or open a new one."
        raise LoralineApiError(grpc.StatusCode.INVALID_ARGUMENT, "SESSION_MISPLACED", text)
    found = client.inference.session(session)
    talk.session, talk.system, talk.model = found.name, found.system_prompt, talk.model or found.model
    talk.turns = [{"role": message.role, "content": message.content} for message in found.messages]
    output.say(f"(session {found.name}: {len(talk.turns) // 2} turns so far)", "dim")
