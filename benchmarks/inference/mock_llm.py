"""An engine client that only keeps time: what is left of a front's cost when tokens cost nothing.

It stands where vLLM's AsyncLLM stands, for Loraline's engine and for vLLM's own OpenAI server alike, with vLLM's own
configuration, renderer and RequestOutputCollector, which merges what a reader did not fetch yet. Tokens fall due by the
clock, in steps that all streams share, as in an engine core of its own process: a front that is late finds more of
them. `seed` tells the tokens a second of a request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

DEFAULT_RATE = 1000
WORD = "token "


class OneByOne:
    """A queue that merges nothing: each token stays a message of its own."""

    def __init__(self) -> None:
        self._outputs: deque[RequestOutput] = deque()
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._ready.set()

    def get_nowait(self) -> RequestOutput | None:
        return self._outputs.popleft() if self._outputs else None

    async def get(self) -> RequestOutput:
        while not self._outputs:
            self._ready.clear()
            await self._ready.wait()
        return self._outputs.popleft()


class Stream:
    """One request's tokens, due by the clock."""

    def __init__(self, request_id: str, prompt_ids: list[int], params: Any, queue: Any, stamped: bool):
        self.rate = params.seed or DEFAULT_RATE
        self.queue = queue
        self._id, self._prompt_ids = request_id, prompt_ids
        self._tokens = int(params.max_tokens)
        self._whole = params.output_kind == RequestOutputKind.FINAL_ONLY
        self._stamped = stamped
        self._origin = math.floor(time.monotonic() * self.rate)
        self._made = 0

    def give(self, now: float) -> bool:
        """Put every token that is due by now; return whether the answer has ended."""
        due = min(math.floor(now * self.rate) - self._origin, self._tokens)
        while self._made < due:
            self._made += 1
            if not self._whole:
                self._put(1)
            elif self._made == self._tokens:
                self._put(self._tokens)
        return self._made >= self._tokens

    def _put(self, count: int) -> None:
        ended = self._made == self._tokens
        text = f"{time.monotonic():.6f} " if self._stamped else WORD * count
        output = CompletionOutput(0, text, [7] * count, None, None, finish_reason="length" if ended else None)
        self.queue.put(RequestOutput(self._id, None, self._prompt_ids, None, [output], ended))


class MockLLM:
    """What the fronts use of AsyncLLM. `merge` off keeps tokens apart; `stamped` makes the time each token's text."""

    errored = False
    dead_error = RuntimeError("the mock does not die")
    is_running, is_stopped = True, False

    def __init__(self, config: Any, *, merge: bool = True, stamped: bool = False):
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        self.vllm_config, self.model_config = config, config.model_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.output_processor = self
        self._merge, self._stamped = merge, stamped
        self._streams: dict[str, Stream] = {}
        self._work: asyncio.Task[None] | None = None

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **_: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Give out a request's tokens as AsyncLLM does: what is there at once, else when it comes."""
        kind = sampling_params.output_kind
        queue: Any = RequestOutputCollector(kind, request_id) if self._merge else OneByOne()
        self._streams[request_id] = Stream(
            request_id, prompt["prompt_token_ids"], sampling_params, queue, self._stamped
        )
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        try:
            finished = False
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                yield output
        finally:
            self._streams.pop(request_id, None)

    async def _run(self) -> None:
        while self._streams:
            now = time.monotonic()
            for request_id, stream in list(self._streams.items()):
                if stream.give(now):
                    del self._streams[request_id]
            fastest = max((stream.rate for stream in self._streams.values()), default=DEFAULT_RATE)
            await asyncio.sleep(max(0.0, (math.floor(now * fastest) + 1) / fastest - time.monotonic()))

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Take every request."""

    def propagate_error(self, error: Exception) -> None:
        """Nothing waits in the mock's output processor."""

    async def do_log_stats(self) -> None:
        """There are none."""

    async def check_health(self) -> None:
        """It is well."""

    async def abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing runs outside this process."""


def mock_of(model: str, *, merge: bool = True, stamped: bool = False) -> MockLLM:
    """Return a mock with the configuration that vLLM makes of a model's folder."""
    from vllm import AsyncEngineArgs

    config = AsyncEngineArgs(model=model, max_model_len=2048, max_num_seqs=1024, enforce_eager=True)
    return MockLLM(config.create_engine_config(), merge=merge, stamped=stamped)
