"""One round of a subject and what it gave; the rounds of all subjects take turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

from load import Ask, Told, closed_loop, percentile


class Counted(Protocol):
    """A process whose processor time can be told."""

    def cpu_seconds(self) -> float:
        """Return the processor time so far."""
        ...


@dataclass
class Round:
    """One round's figures."""

    answers: list[Told]
    seconds: float
    cpu: float

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(told.tokens for told in self.answers)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_message(self) -> float:
        """Tokens that a message carried on average."""
        return self.tokens / sum(told.messages for told in self.answers)

    @property
    def thrift(self) -> float:
        """Tokens for each processor second of the measured process."""
        return self.tokens / max(self.cpu, 1e-9)

    def first(self, share: float) -> float:
        """Return a percentile of the times to the first token, in milliseconds."""
        return percentile([told.first for told in self.answers], share) * 1000


Figure = Callable[[Round], float]
SPEED: Figure = attrgetter("speed")
THRIFT: Figure = attrgetter("thrift")
PER_MESSAGE: Figure = attrgetter("tokens_per_message")
Run = Callable[[], Awaitable[Round]]


@dataclass
class Subject:
    """What is measured under one name."""

    name: str
    run: Run
    rounds: list[Round] = field(default_factory=list)

    def median(self, figure: Figure) -> float:
        """Return the median of a figure over the rounds."""
        return statistics.median(figure(one) for one in self.rounds)


def over_wire(name: str, process: Counted, ask: Ask, **asked: Any) -> Subject:
    """Return a subject that asks a server."""

    async def run() -> Round:
        before = process.cpu_seconds()
        answers = await closed_loop(ask, **asked)
        return round_of(answers, process.cpu_seconds() - before, asked["tokens"])

    return Subject(name, run)


def in_process(name: str, consumer: Any, **asked: Any) -> Subject:
    """Return a subject that consumes its own engine."""

    async def run() -> Round:
        before = consumer.cpu_seconds()
        answers = await asyncio.to_thread(lambda: consumer.round(**asked))
        return round_of(answers, consumer.cpu_seconds() - before, asked["tokens"])

    return Subject(name, run)


def round_of(answers: list[Told], cpu: float, tokens: int) -> Round:
    """Return a round; RuntimeError when an answer is not whole."""
    short = [told.tokens for told in answers if told.tokens != tokens]
    if short:
        raise RuntimeError(f"{len(short)} answers of {len(answers)} have not {tokens} tokens but {short[0]}")
    return Round(answers, max(told.ended for told in answers) - min(told.begun for told in answers), cpu)


async def take_turns(subjects: Sequence[Subject], rounds: int) -> None:
    """Run every subject once unmeasured, then in turns, each round in the other order."""
    for subject in subjects:
        await subject.run()
    for number in range(rounds):
        for subject in subjects if number % 2 == 0 else list(reversed(subjects)):
            subject.rounds.append(await subject.run())
            await asyncio.sleep(0.1)


def ratio(ours: Subject, theirs: Subject, figure: Figure) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(figure(a) / figure(b) for a, b in zip(ours.rounds, theirs.rounds, strict=True))


def line(kind: str, what: str, value: float, aim: str = "", digits: int = 2) -> str:
    """Return a line of the results; a missed aim is marked."""
    text = f"{kind} {what} {value:.{digits}f}"
    if not aim:
        return text
    bound = float(aim.lstrip("<>="))
    met = value >= bound if aim.startswith(">") else value <= bound
    return f"{text} aim {aim}" + ("" if met else " MISSED")


def timed() -> Callable[[], float]:
    """Return a clock that tells the seconds since now."""
    begun = time.monotonic()
    return lambda: time.monotonic() - begun
