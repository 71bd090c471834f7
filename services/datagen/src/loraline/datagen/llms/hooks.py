"""What the asking loop tells and asks its job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from loraline.datagen.llms.intake import Intake


class Measure(Protocol):
    """Adds to a counter or sets a gauge of the stage's metrics."""

    def __call__(self, name: str, value: float, /, **labels: object) -> None:
        """Tell a figure."""


def _nothing(_name: str, _value: float, /, **_labels: object) -> None:
    """Tell nobody."""


@dataclass
class Hooks:
    """The job, as the loop sees it. `stopping` is true once the job shall stop; `check_stop` then raises.

    `go_on` is the command that lets a paused job go on.
    """

    progress: Callable[[Intake], None] = lambda _: None
    note: Callable[[str, str], None] = lambda _reason, _message: None
    stopping: Callable[[], bool] = lambda: False
    check_stop: Callable[[], None] = lambda: None
    count: Measure = _nothing
    gauge: Measure = _nothing
    go_on: str = "loraline jobs resume NAME"
