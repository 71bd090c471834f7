"""What the asking loop tells and asks its job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraline.datagen.llms.intake import Intake


@dataclass
class Hooks:
    """The job, as the loop sees it. `stopping` is true once the job shall stop; `check_stop` then raises."""

    progress: Callable[[Intake], None] = lambda _: None
    note: Callable[[str, str], None] = lambda _reason, _message: None
    stopping: Callable[[], bool] = lambda: False
    check_stop: Callable[[], None] = lambda: None
