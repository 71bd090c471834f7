"""Takes lines, does what they command, shows the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loraline.client.cli.chat.partners import Partner
from loraline.client.cli.chat.talk import Talk
from loraline.client.cli.chat.typed_lines import Choices, candidates
from loraline.client.cli.failures import CommandFailed, exit_code, tell
from loraline.client.cli.output import Output, clean
from loraline.client.errors import LoralineApiError
from loraline.client.resources.inference import Answer, collect

COMMANDS = """/help                this list
/reset               forget the conversation
/system TEXT         set the system prompt (no text: remove it) and forget the conversation
/temperature NUMBER  set the temperature, 0 to 2 (0 is greedy)
/model NAME          talk to another model (no name: the base) and forget the conversation
/adapter NAME        go on with another adapter or the base (no name: list what is served)
/json [on|off]       answers are JSON objects and nothing else
/lang LANGUAGE       answers in ko, zh or en, or in the language of the question; off for no rule
/save FILE           write the conversation; a .jsonl gets one row more, ready for a dataset
/quit                leave (so does Ctrl-D)"""
LANGUAGES = ("en", "ko", "off", "question", "zh")


class ChatLoop:
    """One conversation with one or several models at once."""

    def __init__(self, partner: Partner, output: Output, talks: list[Talk]):
        self._partner = partner
        self._output = output
        self._talks = talks
        self.last_error: LoralineApiError | None = None

    def arguments(self) -> dict[str, Choices]:
        """Return what may follow each command, for completion."""
        models: list[str] = []

        def served() -> list[str]:
            if not models:
                models.extend(self._partner.models())
            return models

        plain = {f"/{word}": tuple for word in ("help", "quit", "reset", "save", "system", "temperature")}
        named: dict[str, Choices] = {"/model": served, "/adapter": served}
        return {**plain, **named, "/json": lambda: ("off", "on"), "/lang": lambda: LANGUAGES}

    def run(self, source: Iterator[str]) -> None:
        """Go on until the lines end or /quit."""
        if self._output.terminal and sys.stdin.isatty():
            labels = " and ".join(talk.label for talk in self._talks)
            self._output.say(f"talking to {labels}; /help for commands", "dim")
        for line in source:
            text = line.strip()
            try:
                if text.startswith("/"):
                    if self._command(text):
                        return
                elif text:
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

    def _pieces(self, talk: Talk, question: str, show: Callable[[str], None]) -> Answer:
        pieces = []
        for piece in self._partner.ask(talk, question):
            pieces.append(piece)
            show(clean(piece.delta))
        answer = collect(pieces)
        talk.remember(question, answer)
        return answer

    def _stream(self, talk: Talk, question: str) -> None:
        out = self._output.out
        if self._output.terminal:
            out.print(Text(f"{talk.label}> ", style="bold green"), end="")
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
                        time.sleep(0.05)
                    live.update(self._columns(texts))
            answers = [future.result() for future in futures]
        if not self._output.terminal:
            for talk, answer in zip(self._talks, answers, strict=True):
                self._output.line(f"{talk.label}: {answer.text or '(empty)'}")
        for answer in answers:
            self._notices(answer)

    def _columns(self, texts: list[str]) -> Columns:
        width = max(self._output.out.width // len(texts) - 1, 20)
        panels = [
            Panel(Text(text), title=Text(talk.label), width=width, border_style="dim")
            for talk, text in zip(self._talks, texts, strict=True)
        ]
        return Columns(panels, padding=(0, 1))

    def _json_turn(self, question: str) -> None:
        for talk in self._talks:
            answer = self._pieces(talk, question, lambda _: None)
            self._output.data({"prompt": question} | vars(answer) | {"model": answer.model or talk.label})

    def _notices(self, answer: Answer) -> None:
        if answer.finish_reason == "LENGTH" and not answer.notices:
            self._output.say("(cut at max_tokens; --max-tokens gives more)", "dim")
        for notice in answer.notices:
            self._output.say(f"({notice})", "dim")

    def _command(self, line: str) -> bool:
        """Do a command; True when the talk shall end."""
        word, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._output.say(COMMANDS),
            "reset": lambda _: self._forget("forgotten"),
            "system": self._system,
            "temperature": self._temperature,
            "model": self._model,
            "adapter": self._adapter,
            "json": self._json,
            "lang": self._language,
            "save": self._save,
        }
        if word.lower() in ("quit", "exit", "q"):
            return True
        command = commands.get(word.lower())
        if command is None:
            near = ", ".join(name.strip() for name in candidates(f"/{word[:2]}", self.arguments())) if word else ""
            hint = f"; did you mean {near}?" if near else ""
            self._output.warn(f"there is no command /{word}; /help lists them{hint}")
        else:
            command(rest)
        return False

    def _forget(self, said: str) -> None:
        for talk in self._talks:
            self._partner.reset(talk)
            talk.turns.clear()
        self._done(said)

    def _system(self, text: str) -> None:
        if any(talk.session for talk in self._talks):
            self._output.warn("the session has its system prompt; open another with --session new --system TEXT")
            return
        for talk in self._talks:
            talk.system = text
        self._forget("system prompt set" if text else "system prompt removed")

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
        self._done(f"temperature {value:g}")

    def _model(self, name: str) -> None:
        self._talks[0].model = "" if name == "base" else name
        self._forget(f"talking to {self._talks[0].label}")

    def _adapter(self, name: str) -> None:
        if not name:
            self._output.line("\n".join(self._partner.models()))
            return
        self._talks[0].model = "" if name == "base" else name
        self._done(f"going on with {self._talks[0].label}")

    def _json(self, text: str) -> None:
        if text not in ("", "on", "off"):
            self._output.warn("/json on or /json off")
            return
        wanted = not self._talks[0].json_only if not text else text == "on"
        for talk in self._talks:
            talk.json_only = wanted
        self._done("answers are JSON objects" if wanted else "answers are free text")

    def _language(self, text: str) -> None:
        if text not in LANGUAGES:
            self._output.warn(f"the language is one of {', '.join(LANGUAGES)}")
            return
        for talk in self._talks:
            talk.language = "" if text == "off" else text
        self._done("no language rule" if text == "off" else f"answers in {text}")

    def _save(self, name: str) -> None:
        if not name:
            self._output.warn("/save needs a file, such as talk.jsonl")
            return
        file = Path(name).expanduser()
        for number, talk in enumerate(self._talks):
            own = file if number == 0 or file.suffix == ".jsonl" else file.with_stem(f"{file.stem}-{number + 1}")
            self._done(talk.save(own))

    def _done(self, said: str) -> None:
        self._output.say(f"({said})", "dim")
