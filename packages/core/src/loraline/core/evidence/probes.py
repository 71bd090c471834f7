"""Probes: log-probabilities of fixed prompts and responses under the base and under the adapter.

The trainer measures them at the end of a run. A server that loaded the adapter, or a merge of it, measures the same
tokens again: figures near the base's mean that the adapter is not in force, whatever the server's list says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loraline.core.errors import invalid_argument
from loraline.core.evidence.fields import Fields, read_object, write_object

FILE_NAME = "probes.json"
VERSION = 1

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Probe:
    """One prompt, a response to it, and what both models thought of the response."""

    name: str
    """Unique within the set."""
    messages: Messages
    """The prompt's messages."""
    prompt_ids: list[int]
    """The prompt as rendered, with the generation prompt."""
    response_ids: list[int]
    """The response's ids; the models were never asked for anything after them."""
    base_logprobs: list[float]
    """Log-probability of each response token under the base, in nats."""
    adapter_logprobs: list[float]
    """The same with the adapter."""

    @property
    def shift(self) -> float:
        """Greatest difference of a token between adapter and base, in nats."""
        return compare_logprobs(self.base_logprobs, self.adapter_logprobs).max_abs


@dataclass(frozen=True)
class ProbeComparison:
    """How far measured log-probabilities are from the expected ones."""

    max_abs: float
    """Greatest absolute difference of a token, in nats."""
    mean_abs: float
    """Mean absolute difference of a token, in nats."""
    tokens: int
    """Tokens compared."""


@dataclass(frozen=True)
class ProbeSet:
    """All probes of an adapter."""

    dtype: str
    """Type that the forward passes were computed in."""
    probes: list[Probe] = field(default_factory=list)

    @property
    def max_shift(self) -> float:
        """Greatest difference of any token between adapter and base, in nats; 0 without probes."""
        return max((probe.shift for probe in self.probes), default=0.0)

    @property
    def mean_base_logprob(self) -> float:
        """Mean log-probability of a response token under the base, in nats."""
        return _mean(value for probe in self.probes for value in probe.base_logprobs)

    @property
    def mean_adapter_logprob(self) -> float:
        """Mean log-probability of a response token under the adapter, in nats."""
        return _mean(value for probe in self.probes for value in probe.adapter_logprobs)

    def save(self, folder: Path) -> Path:
        """Write probes.json into the folder and return its path."""
        path = folder / FILE_NAME
        write_object(path, {"version": VERSION, **asdict(self)})
        return path


def load_probes(path: Path) -> ProbeSet:
    """Read probes from a file, or from an adapter's folder.

    Raises NOT_FOUND (PROBES_MISSING) or DATA_LOSS (PROBES_MALFORMED).
    """
    file = path / FILE_NAME if path.is_dir() else path
    fields = read_object(file, version=VERSION, missing="PROBES_MISSING", malformed="PROBES_MALFORMED")
    probes = [_probe(item) for item in fields.objects("probes")]
    if len({probe.name for probe in probes}) != len(probes):
        raise fields.error("probes", "has a name twice")
    return ProbeSet(fields.text("dtype"), probes)


def _probe(fields: Fields) -> Probe:
    probe = Probe(
        name=fields.text("name"),
        messages=fields.messages("messages"),
        prompt_ids=fields.integers("prompt_ids"),
        response_ids=fields.integers("response_ids"),
        base_logprobs=fields.numbers("base_logprobs"),
        adapter_logprobs=fields.numbers("adapter_logprobs"),
    )
    if not probe.prompt_ids or not probe.response_ids:
        raise fields.error("prompt_ids" if probe.response_ids else "response_ids", "is empty")
    for name, values in (("base_logprobs", probe.base_logprobs), ("adapter_logprobs", probe.adapter_logprobs)):
        if len(values) != len(probe.response_ids):
            raise fields.error(name, "has not one figure for each of response_ids")
    return probe


def compare_logprobs(
    expected: Sequence[float] | Sequence[Sequence[float]], measured: Sequence[float] | Sequence[Sequence[float]]
) -> ProbeComparison:
    """Compare log-probabilities token by token: one list of figures, or one list per probe, on both sides.

    Raises INVALID_ARGUMENT (PROBE_LENGTHS_DIFFER) when the sides do not have the same number of tokens. A measured
    figure that is not a number gives max_abs `inf`: a broken model never looks close.
    """
    left, right = _flat(expected), _flat(measured)
    if [len(part) for part in left] != [len(part) for part in right]:
        message = "Expected and measured log-probabilities are not for the same tokens."
        raise invalid_argument("PROBE_LENGTHS_DIFFER", message)
    pairs = [(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    differences = [abs(a - b) for a, b in pairs]
    differences = [value if value == value else float("inf") for value in differences]  # noqa: PLR0124  NaN
    return ProbeComparison(max(differences, default=0.0), _mean(differences), len(differences))


def _flat(values: Sequence[float] | Sequence[Sequence[float]]) -> list[list[float]]:
    nested = [list(value) for value in values if isinstance(value, Sequence)]
    return nested if nested else [[float(value) for value in values if not isinstance(value, Sequence)]]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
