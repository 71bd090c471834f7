"""`loraline chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loraline.api.inference.v1 import inference_pb2
from loraline.client.cli.app import App, invocation
from loraline.client.cli.failures import CommandFailed, exit_code, tell
from loraline.client.cli.output import Output, clean
from loraline.client.errors import LoralineApiError
from loraline.client.resources.inference import Answer, collect
from loraline.client.sync import Loraline

COMMANDS = """/help                this list
/reset               forget the conversation
/system TEXT         set the system prompt (no text: remove it) and forget the conversation
/temperature NUMBER  set the temperature, 0 to 2 (0 is greedy)
/model NAME          talk to another model (no name: the base)
/quit                leave (so does Ctrl-D)"""


def register(app: App) -> None:
    """Add the command."""
    app.command("chat")(chat)


@dataclass
class Conversation:
    """A talk with one model, and how it shall answer."""

    model: str
    system: str = ""
    temperature: float | None = None
    max_tokens: int = 0
    seed: int | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return all turns with the new one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": question}]

    def remember(self, question: str, answer: str) -> None:
        """Keep a turn; an empty answer is kept out, because models continue emptiness."""
        if answer:
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def sampling(self) -> inference_pb2.SamplingParameters:
        """Return how to sample."""
        return inference_pb2.SamplingParameters(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed
        )


def chat(
    prompt: Annotated[str, typer.Argument(help="One question; without it, a conversation.")] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="name, name@alias or name:vN; empty for the base.")] = "",
    compare: Annotated[str | None, typer.Option(help="Show this model's answers beside; `base` for the base.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 is greedy; unset means 0.7.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Longest answer; 0 means 256.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
) -> None:
    """Talk to a model, on a terminal or through a pipe (each line is a turn).

    In the conversation, /help lists commands: /reset /system /temperature /model /quit.

    Examples:

      loraline chat --model mareva@production
      loraline chat --model mareva@production --compare base
      loraline chat -m mareva@production --temperature 0 "How are you today?"
      echo "How are you today?" | loraline chat -m mareva@production
    """
    talks = [Conversation(model, system, temperature, max_tokens, seed)]
    if compare is not None:
        other = "" if compare == "base" else compare
        talks.append(Conversation(other, system, temperature, max_tokens, seed))
    output = invocation().output
    with invocation().client() as client:
        loop = ChatLoop(client, output, talks)
        if prompt:
            loop.turn(prompt)
            return
        loop.run(lines(output))
        if loop.last_error is not None and not sys.stdin.isatty():
            raise CommandFailed(exit_code(loop.last_error))


def lines(output: Output) -> Iterator[str]:
    """Yield what a person types, or the lines of a pipe; ends at the end of input or at Ctrl-C on an empty prompt."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    while True:
        try:
            yield input("you> ")
        except (EOFError, KeyboardInterrupt):
            output.say("")
            return


class ChatLoop:
    """Takes lines, does commands, shows answers."""

    def __init__(self, client: Loraline, output: Output, talks: list[Conversation]):
        self._client = client
        self._output = output
        self._talks = talks
        self.last_error: LoralineApiError | None = None

    def run(self, source: Iterator[str]) -> None:
        """Go on until the lines end or /quit."""
        if self._output.terminal and sys.stdin.isatty():
            labels = " and ".join(self._label(talk) for talk in self._talks)
            self._output.say(f"talking to {labels}; /help for commands", "dim")
        for line in source:
            text = line.strip()
            if text.startswith("/"):
                if self._command(text):
                    return
            elif text:
                self._guarded_turn(text)

    def _guarded_turn(self, text: str) -> None:
        try:
            self.turn(text)
        except LoralineApiError as error:
            self.last_error = error
            tell(self._output, error)
            if error.unreachable:
                raise CommandFailed(exit_code(error)) from None
        except KeyboardInterrupt:
            self._output.say(" (stopped)", "dim")

    def turn(self, question: str) -> None:
        """Ask one question of every model and show the answers."""
        if self._output.json:
            self._json_turn(question)
        elif len(self._talks) == 1:
            self._stream(self._talks[0], question)
        else:
            self._side_by_side(question)

    def _label(self, talk: Conversation) -> str:
        return talk.model or "base"

    def _pieces(self, talk: Conversation, question: str, show: Callable[[str], None]) -> Answer:
        pieces = []
        for piece in self._client.inference.chat(talk.model, talk.messages(question), sampling=talk.sampling()):
            pieces.append(piece)
            show(clean(piece.delta))
        answer = collect(pieces)
        talk.remember(question, answer.text)
        return answer

    def _stream(self, talk: Conversation, question: str) -> None:
        out = self._output.out
        if self._output.terminal:
            out.print(Text(f"{self._label(talk)}> ", style="bold green"), end="")
        answer = self._pieces(talk, question, lambda text: out.print(text, end="", markup=False, soft_wrap=True))
        out.print("" if answer.text else "(empty)")
        self._notices(answer)

    def _side_by_side(self, question: str) -> None:
        texts = [""] * len(self._talks)

        def grow(index: int) -> Callable[[str], None]:
            def show(text: str) -> None:
                texts[index] += text

            return show

        with ThreadPoolExecutor(len(self._talks)) as pool:
            futures = [pool.submit(self._pieces, talk, question, grow(index)) for index, talk in enumerate(self._talks)]
            if self._output.terminal:
                with Live(console=self._output.out, refresh_per_second=10) as live:
                    while not all(future.done() for future in futures):
                        live.update(self._columns(texts))
                        _pause()
                    live.update(self._columns(texts))
            answers = [future.result() for future in futures]
        if not self._output.terminal:
            for talk, answer in zip(self._talks, answers, strict=True):
                self._output.line(f"{self._label(talk)}: {answer.text or '(empty)'}")
        for answer in answers:
            self._notices(answer)

    def _columns(self, texts: list[str]) -> Columns:
        width = max(self._output.out.width // len(texts) - 1, 20)
        panels = [
            Panel(Text(text), title=Text(self._label(talk)), width=width, border_style="dim")
            for talk, text in zip(self._talks, texts, strict=True)
        ]
        return Columns(panels, padding=(0, 1))

    def _json_turn(self, question: str) -> None:
        for talk in self._talks:
            answer = self._pieces(talk, question, lambda _: None)
            self._output.data({"prompt": question} | vars(answer) | {"model": answer.model or self._label(talk)})

    def _notices(self, answer: Answer) -> None:
        if answer.finish_reason == "LENGTH":
            self._output.say("(cut at max_tokens; --max-tokens gives more)", "dim")
        for notice in answer.notices:
            self._output.say(f"({notice})", "dim")

    def _command(self, line: str) -> bool:
        """Do a command; True when the talk shall end."""
        word, _, rest = line[1:].partition(" ")
        match word.lower():
            case "quit" | "exit" | "q":
                return True
            case "help":
                self._output.say(COMMANDS)
            case "reset":
                self._forget("forgotten")
            case "system":
                for talk in self._talks:
                    talk.system = rest.strip()
                self._forget("system prompt set" if rest.strip() else "system prompt removed")
            case "temperature":
                self._temperature(rest)
            case "model":
                self._talks[0].model = "" if rest.strip() in ("", "base") else rest.strip()
                self._forget(f"talking to {self._label(self._talks[0])}")
            case _:
                self._output.warn(f"there is no command /{word}; /help lists them")
        return False

    def _forget(self, said: str) -> None:
        for talk in self._talks:
            talk.turns.clear()
        self._output.say(f"({said})", "dim")

    def _temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 2:
            self._output.warn("the temperature is a number from 0 to 2")
            return
        for talk in self._talks:
            talk.temperature = value
        self._output.say(f"(temperature {value:g})", "dim")


def _pause() -> None:
    import time

    time.sleep(0.05)
