"""Plain transformers and PEFT behind the port, for machines where vLLM cannot be installed (macOS, Windows).

Everything that touches the model runs in one thread, one request after the other: PEFT's active adapter is a property
of the whole model. Slow beside vLLM, but the same answers, the same proof and the same adapters.
"""

from __future__ import annotations

import asyncio
import platform
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import structlog

from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.decoding import Decoder
from loraline.inference.engines.memory import float32_on_cpu
from loraline.inference.engines.port import (
    BASE,
    EngineDead,
    EngineFacts,
    EngineOptions,
    EngineRefused,
    EngineRequest,
    Piece,
)

T = TypeVar("T")
_log = structlog.get_logger(__name__)
_DEFAULT_MODEL_LEN = 2048


class TransformersEngine:
    """One model, its adapters, one thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._stopping = threading.Event()
        self._model: Any = None
        self._format: ChatFormat | None = None
        self._facts: EngineFacts | None = None
        self._adapters: set[str] = set()
        self._grammars: Any = None

    @property
    def facts(self) -> EngineFacts:
        """What was started."""
        if self._facts is None:
            raise EngineDead("the engine was not started")
        return self._facts

    async def start(self, model_folder: Path, options: EngineOptions) -> None:
        """Load the model."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraline-transformers")
        await self._call(self._load, model_folder, options)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Piece, None]:
        """Continue a prompt; requests wait for one another."""
        if request.adapter != BASE and request.adapter not in self._adapters:
            raise EngineRefused(f"adapter {request.adapter} is not loaded")
        loop, pieces, cancelled = asyncio.get_running_loop(), asyncio.Queue[Piece | None](), threading.Event()
        submitted = time.monotonic()

        def emit(piece: Piece | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run() -> None:
            try:
                waited = time.monotonic() - submitted
                with self._active(request.adapter):
                    decoder = Decoder(self._model, self._required_format(), self.facts, self._grammars)
                    for piece in decoder.run(request, waited, lambda: cancelled.is_set() or self._stopping.is_set()):
                        emit(piece)
            finally:
                emit(None)

        work = self._submit(run)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(work)
            if self._stopping.is_set():
                raise EngineDead("the engine was stopped")
        finally:
            cancelled.set()
            work.cancel()

    async def load_adapter(self, internal_name: str, folder: Path) -> None:
        """Load an adapter beside the others."""
        if internal_name in self._adapters:
            return
        try:
            await self._call(self._add, internal_name, folder)
        except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
            raise EngineRefused(str(error)) from error
        self._adapters.add(internal_name)

    async def unload_adapter(self, internal_name: str) -> None:
        """Free an adapter."""
        if internal_name in self._adapters:
            self._adapters.discard(internal_name)
            await self._call(self._remove, internal_name)

    async def logprobs(self, ids: Sequence[int], adapter: str = BASE) -> list[float]:
        """Return what the model thinks of each id after the first."""
        if adapter != BASE and adapter not in self._adapters:
            raise EngineRefused(f"adapter {adapter} is not loaded")
        return await self._call(self._score, list(ids), adapter)

    async def healthy(self) -> bool:
        """Tell whether the model is loaded and its thread takes work."""
        return self._model is not None and not self._stopping.is_set()

    def last_words(self) -> str:
        """Return nothing: it has no process of its own that could die alone."""
        return ""

    async def stop(self) -> None:
        """End the running request, drop the model."""
        self._stopping.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)
        self._model = None
        self._adapters.clear()

    def _submit(self, function: Callable[[], T]) -> Any:
        if self._thread is None or self._stopping.is_set():
            raise EngineDead("the engine was stopped")
        return self._thread.submit(function)

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._submit(lambda: function(*args)))

    def _required_format(self) -> ChatFormat:
        if self._format is None:
            raise EngineDead("the engine was not started")
        return self._format

    def _load(self, folder: Path, options: EngineOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        device = _device(torch)
        dtype = options.dtype
        if dtype == "auto" and device == "cpu" and float32_on_cpu(folder):
            dtype = "float32"
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=options.trust_remote_code
        )
        model.to(device).eval()
        self._format = ChatFormat.load(folder, trust_remote_code=options.trust_remote_code)
        self._grammars = _grammar_compiler(self._format.tokenizer, model.config.vocab_size)
        known = int(getattr(model.config, "max_position_embeddings", 0) or _DEFAULT_MODEL_LEN)
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        self._model = model
        self._facts = EngineFacts(
            engine="transformers",
            version=version("transformers"),
            device=device,
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=min(options.max_model_len or known, known),
            vocab_size=int(model.get_input_embeddings().weight.shape[0]),
            max_lora_rank=options.max_lora_rank,
            max_loaded_adapters=options.max_loaded_adapters,
            target_modules=tuple(sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})),
            concurrency=1,
        )

    def _add(self, internal_name: str, folder: Path) -> None:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model.load_adapter(str(folder), adapter_name=internal_name, is_trainable=False)
        else:
            self._model = PeftModel.from_pretrained(self._model, str(folder), adapter_name=internal_name)
        self._model.eval()

    def _remove(self, internal_name: str) -> None:
        if set(self._model.peft_config) == {internal_name}:
            # PEFT would go on to look for the last adapter after it is deleted, in every answer of the base too.
            self._model = self._model.unload()
        else:
            self._model.delete_adapter(internal_name)

    @contextmanager
    def _active(self, adapter: str) -> Iterator[None]:
        """Put one adapter in force, or none."""
        if adapter != BASE:
            self._model.set_adapter(adapter)
            yield
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
        else:
            yield

    def _score(self, ids: list[int], adapter: str) -> list[float]:
        import torch

        with self._active(adapter), torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids], device=self._model.device)).logits[0, :-1].float()
            chosen = torch.tensor(ids[1:], device=logits.device).unsqueeze(1)
            return torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1).tolist()


def _device(torch: Any) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if platform.system() == "Darwin" and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _grammar_compiler(tokenizer: Any, vocab_size: int) -> Any:
    """Return xgrammar's compiler for this tokenizer, or None where xgrammar is not installed."""
    try:
        import xgrammar
    except ImportError:
        _log.warning("structured_answers_off", remedy="pip install xgrammar")
        return None
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size))
