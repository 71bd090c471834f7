"""What ranks tell the job's process, and what it answers: both ends of the socket between them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraline.core.errors import LoralineError
from loraline.trainer.engines.callbacks import RunObserver

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun


_LEFT_BEHIND = ("gloo", "nccl", "connection", "peer", "timed out")
"""Words of errors that say no more than that another rank is gone."""


class RankCalls:
    """The job's end: a thread for each rank passes what it tells on to the job's observer."""

    def __init__(self, address: str, key: bytes, observer: RunObserver):
        self.observer = observer
        self.finished: FinishedRun | None = None
        self.failure: BaseException | None = None
        self.out_of_memory = False
        self.stopped = False
        self.stepping = threading.Event()
        """Set once a step was made: from then on the ranks themselves see to stopping."""
        self.broken = threading.Event()
        """Set when nothing more can come of it: the job was lost, or a rank failed."""
        self._crash = ""
        self._lost: list[int] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = Listener(address, family="AF_UNIX", authkey=key)
        self._accepting = threading.Thread(target=self._accept, name="ranks", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Take no more calls; all that came are worked off."""
        # Closing alone does not wake a thread that waits for the next rank.
        with suppress(OSError, EOFError):
            Client(self._listener.address, family="AF_UNIX").close()
        self._listener.close()
        self._accepting.join(5)
        for thread in self._threads:
            thread.join(5)

    def explain(self, died: LoralineError) -> None:
        """Say why torchrun failed, where no rank said it in so many words."""
        if self.failure is not None or self.out_of_memory:
            return
        # Those that a lost rank leaves behind crash too, in the middle of what they do together.
        consequence = bool(self._lost) and any(word in self._crash.lower() for word in _LEFT_BEHIND)
        if self._crash and not consequence:
            self.failure = RuntimeError(self._crash)
            return
        if self._lost:
            died.metadata["rank"] = str(self._lost[0])
            died.message = died.message.replace("A process", f"Rank {self._lost[0]}", 1)
        self.failure = died

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                return
            except Exception:  # noqa: S112  (somebody without the key)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: Connection) -> None:
        rank, parted = -1, False
        try:
            rank = connection.recv()
            while not parted:
                name, arguments = connection.recv()
                parted = name == "part"
                connection.send(self._answer(name, arguments))
        except (EOFError, OSError):
            if not parted and not self.broken.is_set():
                self._lost.append(rank)
        finally:
            connection.close()

    def _answer(self, name: str, arguments: dict[str, Any]) -> Any:
        with self._lock:
            try:
                return getattr(self, f"_on_{name}")(**arguments)
            except BaseException as error:  # a lost lease: nothing that the ranks do counts any more
                self.failure = self.failure or error
                self.broken.set()
                return None

    def _on_part(self) -> None:
        pass

    def _on_stop_cause(self) -> str:
        return self.observer.stop_cause

    def _on_progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        self.stepping.set()
        self.observer.progress(step, total, eta_seconds, metrics)

    def _on_note(self, message: str, severity: str, reason: str) -> None:
        self.observer.note(message, severity=severity, reason=reason)

    def _on_count(self, name: str, amount: float, labels: dict[str, str]) -> None:
        self.observer.count(name, amount, **labels)

    def _on_saved(self, checkpoint: Path) -> None:
        self.observer.saved(checkpoint)

    def _on_finished(self, finished: FinishedRun | None) -> None:
        self.finished = finished

    def _on_failed(self, error: LoralineError) -> None:
        self.failure = self.failure or error

    def _on_out_of_memory(self) -> None:
        self.out_of_memory = True

    def _on_crashed(self, text: str) -> None:
        self._crash = self._crash or text


class RankObserver:
    """A rank's end. Rank 0 passes everything on; the others only that they live, and why they end."""

    def __init__(self, address: str, key: bytes, rank: int, run: str):
        self.rank, self.run = rank, run
        self._connection = Client(address, family="AF_UNIX", authkey=key)
        self._connection.send(rank)

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Tell the job's process something and return what it answers."""
        self._connection.send((name, arguments))
        return self._connection.recv()

    def _first(self, name: str, /, **arguments: Any) -> Any:
        return self.call(name, **arguments) if self.rank == 0 else None

    def progress(self, step: int, total: int, eta_seconds: float, metrics: Mapping[str, float]) -> None:
        """Pass on a step."""
        self._first("progress", step=step, total=total, eta_seconds=eta_seconds, metrics=dict(metrics))

    def note(self, message: str, *, severity: str = "info", reason: str = "") -> None:
        """Pass on an event."""
        self._first("note", message=message, severity=severity, reason=reason)

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Pass on a count."""
        self._first("count", name=name, amount=amount, labels=labels)

    def saved(self, checkpoint: Path) -> None:
        """Pass on a sealed checkpoint."""
        self._first("saved", checkpoint=checkpoint)

    @property
    def stop_cause(self) -> str:
        """Why the run shall stop; asked by rank 0 for all."""
        return self._first("stop_cause") or ""
