"""The port: what the service asks of an engine. Two implementations, one contract suite."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

BASE = ""
"""Adapter name that means: the base model, no adapter."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled; all limits were checked before."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    """Candidates considered; 0 means all."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1
    logprobs: int | None = None
    """Likeliest tokens to tell beside each that was taken; 0 for that one alone, None for no log-probabilities."""
    ignore_eos: bool = False
    """Go on to max_tokens whatever ends answers otherwise: for load tests, whose answers must be of equal length."""
    show_special: bool = False
    """Leave special tokens in the text: some models mark the calls of tools with them."""


@dataclass(frozen=True)
class Constraint:
    """A shape that the answer is forced into while it is decoded."""

    kind: Literal["json_schema", "regex", "choices", "grammar", "json_object"]
    value: Any = None
    """The schema (dict), the pattern, the list of answers or the EBNF; None for json_object."""

    @property
    def is_json(self) -> bool:
        """Whether a complete answer is a JSON document."""
        return self.kind in {"json_schema", "json_object"}


@dataclass(frozen=True)
class EngineRequest:
    """One prompt to continue."""

    request_id: str
    prompt_ids: list[int]
    sampling: Sampling
    adapter: str = BASE
    """Internal name of a loaded adapter."""
    constraint: Constraint | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """What the model thought of a token, before temperature and penalties."""

    token: str
    """Its text; half a character shows as U+FFFD."""
    logprob: float
    """In nats."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at its place with theirs, best first."""


@dataclass(frozen=True)
class Piece:
    """What an engine says next about one of a request's n answers."""

    index: int
    text: str
    """Text since the last piece of this answer; special tokens and stop texts are left out."""
    token_ids: Sequence[int] = ()
    """Ids since the last piece, with the one that ended the answer."""
    finish_reason: Literal["", "stop", "length"] = ""
    """Set on the answer's last piece."""
    queue_seconds: float | None = None
    """Time the request waited before it ran; on the last piece, when the engine knows it."""
    logprobs: Sequence[TokenLogprob] = ()
    """One for each of token_ids, where they were asked for."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is started."""

    dtype: str = "auto"
    """`auto`, `float32`, `bfloat16` or `float16`."""
    max_model_len: int = 0
    """Longest prompt and answer in tokens; 0 for what the model allows."""
    max_lora_rank: int = 64
    max_loaded_adapters: int = 8
    """Adapters held at once."""
    max_batch_adapters: int = 4
    """Adapters that one batch may mix; more make the engine copy weights between steps."""
    max_concurrent_requests: int = 64
    kv_cache_gib: float = 1.0
    """Memory for the KV cache on a CPU, in GiB; fractions count."""
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None
    """None means: on a CPU yes, on a GPU no."""
    trust_remote_code: bool = False
    coalesce_seconds: float = 0.0
    """Tokens of one answer that come within so long of the last ones may be given as one Piece; never the first."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further settings, passed to vLLM's AsyncEngineArgs as they are."""


@dataclass(frozen=True)
class EngineFacts:
    """What a started engine is."""

    engine: Literal["vllm", "transformers"]
    version: str
    device: str
    """`cpu` or the kind of accelerator."""
    dtype: str
    """Type that the forward pass is computed in."""
    max_model_len: int
    vocab_size: int
    """Rows of the embedding."""
    max_lora_rank: int
    max_loaded_adapters: int
    target_modules: tuple[str, ...] = ()
    """Names of the modules it can adapt."""
    concurrency: int = 0
    """Answers that it generates at once; 0 where it was not said."""


class EngineDead(Exception):
    """The engine is gone and will not answer again; the request may be tried on another."""


class EngineRefused(Exception):
    """The engine does not take this request (a regex it cannot compile, say); its text says why."""


class Engine(Protocol):
    """One loaded model that generates. Every method but `start` needs a started engine."""

    @property
    def facts(self) -> EngineFacts:
        """What was started."""
        ...

    async def start(self, model_folder: Path, options: EngineOptions) -> None:
        """Load the model; returns when it can generate. Heavy work stays off the event loop."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        """Continue a prompt. Closing the generator, or cancelling its task, frees the request's slot at once.

        Raises EngineRefused before the first piece, EngineDead at any time.
        """
        ...

    async def load_adapter(self, internal_name: str, folder: Path) -> None:
        """Make an adapter usable under a name that was never used for other weights. EngineRefused when it cannot."""
        ...

    async def unload_adapter(self, internal_name: str) -> None:
        """Free an adapter. Its name may come back only with the same weights."""
        ...

    async def logprobs(self, ids: Sequence[int], adapter: str = BASE) -> list[float]:
        """Return the log-probability of ids[1], ids[2], … given what precedes each, in nats: len(ids) - 1 figures."""
        ...

    async def healthy(self) -> bool:
        """Tell whether the engine's processes or threads are alive. Costs nothing; generates nothing."""
        ...

    def last_words(self) -> str:
        """Return what a dead engine said, else which signal ended it; empty for nothing. Read it before `stop`."""
        ...

    async def stop(self) -> None:
        """Release everything. Requests still running end with EngineDead. May be called twice."""
        ...
