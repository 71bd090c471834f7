"""The texts that a merge is measured on: the adapters' probes, their receipt rows, else texts of ours. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraline.core.evidence.probes import FILE_NAME as PROBES_FILE
from loraline.core.evidence.probes import load_probes
from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.evidence.receipt import load_receipt

# For adapters that bring no evidence: three scripts, prose, figures and code, so that many rows of the vocabulary and
# every layer take part. Quality does not matter here, only that both models see the same ids.
PLAIN_TEXTS = (
    "The harbour was quiet that morning. She counted 14 boats, then wrote the number into her notebook and smiled.",
    "오늘은 비가 오니까 따뜻한 차를 마시면서 천천히 이야기해요. 어제 읽던 책은 어디에 두었어요?",
    "山路很长,他停下来看了看远处的灯光,然后继续往前走。明天还要早起。",
    'def area(width: float, height: float) -> float:\n    """Return the area."""\n    return width * height\n',
)


@dataclass(frozen=True)
class MeasuredText:
    """Token ids, and the positions whose prediction is compared; position 0 is never measured."""

    name: str
    ids: tuple[int, ...]
    measured: tuple[int, ...]
    recorded: tuple[float, ...] = ()
    """What the trainer recorded for the measured tokens with the adapter, in nats; probes only."""


def collect_texts(
    adapters: Sequence[Path], encode: Callable[[str], list[int]], *, max_tokens: int, max_length: int
) -> list[MeasuredText]:
    """Gather texts from the adapters' evidence until `max_tokens` positions are measured.

    Probes come first, then receipt rows (their trained tokens). `encode` is asked only when there is no evidence.
    """
    texts = [text for folder in adapters for text in _probe_texts(folder, max_length)]
    texts += [text for folder in adapters for text in _receipt_texts(folder, max_length)]
    if not texts:
        texts = [_plain(number, encode(text)[:max_length]) for number, text in enumerate(PLAIN_TEXTS)]
    return _limit([text for text in texts if text.measured], max_tokens)


def _probe_texts(folder: Path, max_length: int) -> list[MeasuredText]:
    if not (folder / PROBES_FILE).exists():
        return []
    texts = []
    for probe in load_probes(folder).probes:
        ids = (*probe.prompt_ids, *probe.response_ids)
        if len(ids) <= max_length:
            measured = tuple(range(len(probe.prompt_ids), len(ids)))
            texts.append(MeasuredText(f"probe {probe.name}", ids, measured, tuple(probe.adapter_logprobs)))
    return texts


def _receipt_texts(folder: Path, max_length: int) -> list[MeasuredText]:
    if not (folder / RECEIPT_FILE).exists():
        return []
    texts = []
    for row in load_receipt(folder).rows:
        ids, mask = row.input_ids[:max_length], row.labels_mask[:max_length]
        measured = tuple(position for position, trained in enumerate(mask) if trained and position > 0)
        texts.append(MeasuredText(f"receipt row {row.source}", tuple(ids), measured))
    return texts


def _plain(number: int, ids: list[int]) -> MeasuredText:
    return MeasuredText(f"plain text {number + 1}", tuple(ids), tuple(range(1, len(ids))))


def _limit(texts: list[MeasuredText], max_tokens: int) -> list[MeasuredText]:
    """Keep whole probes first; a text that would go over the limit is measured at its first positions."""
    kept: list[MeasuredText] = []
    room = max_tokens
    for text in texts:
        if room <= 0:
            break
        measured = text.measured[:room]
        kept.append(MeasuredText(text.name, text.ids[: measured[-1] + 1], measured, text.recorded[: len(measured)]))
        room -= len(measured)
    return kept
