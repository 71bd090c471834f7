"""The proof at load: what answers under an adapter's name is that adapter, as it was trained.

The probes run on the live engine. Under the adapter their tokens must have the log-probabilities that the trainer
measured, within the noise of the number format, and must differ from the base's on this same engine. The token
receipt's rows must render to the trainer's ids with the server's tokenizer and chat template.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraline.api.inference.v1 import inference_pb2
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.evidence.probes import Probe, ProbeSet, compare_logprobs, load_probes
from loraline.core.evidence.receipt import TokenReceipt, compare_rendering, load_receipt
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.port import BASE, Engine, EngineRefused

_BOUNDS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15}
"""Bound on the mean difference of a token from the trainer's figure, in nats.

Both sides computed in float32 agree to about 5e-7 between transformers and vLLM on a CPU (measured on a 2-layer toy);
models of many layers add up rounding and other kernels' orders of summation, so 1e-3 leaves room and is still far below
what any adapter worth serving changes. float16 has 11 significant bits: a logit of 20 is rounded by up to 0.008, and
some ten roundings of that size meet in a log-probability. bfloat16 has 8 bits: eight times coarser, but the errors'
signs differ from token to token, which the mean over all probe tokens takes advantage of.
"""
_QUANTIZED_BOUND = 0.3
"""Where either side held the weights in 8 or 4 bits: rounding the weights shifts every logit."""
_FLOORS = {"float32": 1e-4}
"""Least greatest difference from the base, in nats. Base and adapter run on one engine: without an adapter in force the
figures are the same but for the noise of batching."""
_FLOOR = 1e-2


@dataclass(frozen=True)
class Proof:
    """A passed proof's figures; differences in nats."""

    tokens: int
    max_abs_diff_from_trainer: float
    mean_abs_diff_from_trainer: float
    max_abs_diff_from_base: float
    bound: float
    receipt_rows_matched: int

    def to_message(self) -> inference_pb2.LoadProof:
        """Return the same as a message."""
        return inference_pb2.LoadProof(
            tokens=self.tokens,
            max_abs_diff_from_trainer=self.max_abs_diff_from_trainer,
            mean_abs_diff_from_trainer=self.mean_abs_diff_from_trainer,
            max_abs_diff_from_base=self.max_abs_diff_from_base,
            bound=self.bound,
            receipt_rows_matched=self.receipt_rows_matched,
        )


@dataclass(frozen=True)
class Evidence:
    """What an artifact brings to be proven with."""

    probes: ProbeSet
    receipt: TokenReceipt

    @property
    def wants_system(self) -> bool:
        """Whether every row that the receipt shows has a system message."""
        rows = self.receipt.rows
        return bool(rows) and all(any(one.get("role") == "system" for one in row.messages) for row in rows)


def read_evidence(folder: Path) -> Evidence | None:
    """Return an artifact's evidence; None when it has neither file. NOT_FOUND or DATA_LOSS for half or broken files."""
    if not (folder / "probes.json").is_file() and not (folder / "token_receipt.json").is_file():
        return None
    return Evidence(load_probes(folder), load_receipt(folder))


def tolerance(probe_dtype: str, engine_dtype: str) -> tuple[float, float]:
    """Return the bound on the mean difference from the trainer and the floor of the difference from the base."""
    bound = max(_BOUNDS.get(probe_dtype, _QUANTIZED_BOUND), _BOUNDS.get(engine_dtype, _QUANTIZED_BOUND))
    return bound, _FLOORS.get(engine_dtype, _FLOOR)


def match_receipt(receipt: TokenReceipt, chat_format: ChatFormat, what: str) -> int:
    """Return how many rows render to the trainer's ids: all, or FAILED_PRECONDITION RECEIPT_MISMATCH. Blocking."""
    differing = compare_rendering(receipt, lambda messages: chat_format.render(messages, generation_prompt=False))
    if differing:
        message = (
            f"{what} was trained on other token ids than this server makes from the same messages: {differing[0]} "
            f"({len(differing)} of {len(receipt.rows)} rows). Serve the base with the tokenizer and chat template of "
            "the training, or train again."
        )
        raise failed_precondition("RECEIPT_MISMATCH", message, rows=str(len(differing)), first=str(differing[0]))
    return len(receipt.rows)


async def prove_adapter(engine: Engine, chat: ChatFormat, internal: str, evidence: Evidence, what: str) -> Proof:
    """Prove a loaded adapter. Raises RECEIPT_MISMATCH or PROOF_FAILED with the figures."""
    probes = evidence.probes.probes
    matched = await asyncio.to_thread(match_receipt, evidence.receipt, chat, what)
    adapted = await measure(engine, probes, internal)
    base = await measure(engine, probes, BASE)
    return _judge(engine, evidence.probes, adapted, base, matched, what)


async def prove_merged(engine: Engine, chat: ChatFormat, evidence: Evidence, what: str) -> Proof:
    """Prove a merged model: the base engine must say what the adapter said; its base's figures are the trainer's."""
    probes = evidence.probes.probes
    matched = await asyncio.to_thread(match_receipt, evidence.receipt, chat, what)
    measured = await measure(engine, probes, BASE)
    return _judge(engine, evidence.probes, measured, [probe.base_logprobs for probe in probes], matched, what)


async def prove_without_evidence(engine: Engine, chat: ChatFormat, internal: str, what: str) -> Proof:
    """Prove at least that an adapter without evidence is not the base; mean and bound stay 0."""
    ids = chat.encode("The quick brown fox jumps over the lazy dog, 0123456789.")
    adapted, base = await engine.logprobs(ids, internal), await engine.logprobs(ids, BASE)
    found = compare_logprobs(base, adapted)
    floor = _FLOORS.get(engine.facts.dtype, _FLOOR)
    if not floor < found.max_abs < float("inf"):
        raise _failed(what, f"it does not differ from the base ({found.max_abs:.2e} nats, floor {floor:.0e})", {})
    return Proof(found.tokens, 0.0, 0.0, found.max_abs, 0.0, 0)


async def measure(engine: Engine, probes: Sequence[Probe], adapter: str) -> list[list[float]]:
    """Return the log-probabilities of every probe's response tokens on the live engine."""

    async def one(probe: Probe) -> list[float]:
        figures = await engine.logprobs([*probe.prompt_ids, *probe.response_ids], adapter)
        return figures[-len(probe.response_ids) :]

    try:
        return list(await asyncio.gather(*(one(probe) for probe in probes)))
    except EngineRefused as error:
        message = f"The engine refuses the probes: {error}. A probe may be longer than its context window."
        raise failed_precondition("PROOF_FAILED", message) from error


def _judge(
    engine: Engine, probes: ProbeSet, adapted: list[list[float]], base: list[list[float]], matched: int, what: str
) -> Proof:
    bound, floor = tolerance(probes.dtype, engine.facts.dtype)
    trainer = compare_logprobs([probe.adapter_logprobs for probe in probes.probes], adapted)
    from_base = compare_logprobs(base, adapted)
    trainer_base = compare_logprobs([probe.base_logprobs for probe in probes.probes], base)
    figures = {
        "tokens": str(trainer.tokens),
        "mean_abs_diff_from_trainer": f"{trainer.mean_abs:.6g}",
        "max_abs_diff_from_trainer": f"{trainer.max_abs:.6g}",
        "max_abs_diff_from_base": f"{from_base.max_abs:.6g}",
        "mean_abs_diff_of_bases": f"{trainer_base.mean_abs:.6g}",
        "bound": f"{bound:g}",
        "floor": f"{floor:g}",
    }
    if trainer.tokens == 0:
        raise _failed(what, "its probes.json holds no probe", figures)
    if probes.max_shift <= floor:
        learned = f"the training changed nothing: the trainer itself measured {probes.max_shift:.2e} nats"
        raise _failed(what, learned, figures)
    if from_base.max_abs <= floor:
        raise _failed(what, f"the base answers under its name: {from_base.max_abs:.2e} nats apart", figures)
    if not trainer.mean_abs <= bound:
        because = (
            f"its tokens are {trainer.mean_abs:.4g} nats from the trainer's figures on average (bound {bound:g}, "
            f"greatest {trainer.max_abs:.4g}); the bases are {trainer_base.mean_abs:.4g} apart"
        )
        raise _failed(what, because, figures)
    return Proof(trainer.tokens, trainer.max_abs, trainer.mean_abs, from_base.max_abs, bound, matched)


def _failed(what: str, because: str, figures: dict[str, str]) -> LoralineError:
    message = f"{what} failed its proof: {because}. It is not served. Check the base model, or train again."
    return failed_precondition("PROOF_FAILED", message, **figures)
