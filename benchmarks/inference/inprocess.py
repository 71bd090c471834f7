"""Consumes an engine in its own process: what a front is measured against. Takes rounds on standard input as JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def engine_of(kind: str, model: str) -> Any:
    """Return the mock, or AsyncLLM with the arguments that our service gives it."""
    if kind == "mock":
        from mock_llm import mock_of

        return mock_of(model)
    from loraline.inference.config import InferenceSettings
    from loraline.inference.engines.vllm_process import build

    settings = InferenceSettings(max_model_len=2048, max_lora_rank=16, max_loaded_adapters=8, max_batch_adapters=8)
    return build(Path(model), settings.engine_options())


async def serve(kind: str, model: str) -> None:
    """Run one round a line; print its figures as a line."""
    from load import PROMPT, Told, closed_loop
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from loraline.inference.engines.chat_format import ChatFormat

    llm = await asyncio.to_thread(engine_of, kind, model) if kind != "mock" else engine_of(kind, model)
    chat_format = ChatFormat.load(Path(model), trust_remote_code=False)
    numbers = itertools.count()

    async def ask(tokens: int, rate: int, _: str) -> Told:
        told = Told()
        ids = await chat_format.prompt_ids([{"role": "user", "content": PROMPT}])
        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=rate or None)
        params.output_kind = RequestOutputKind.DELTA
        async for output in llm.generate({"prompt_token_ids": ids}, params, f"bench-{next(numbers)}"):
            told.arrivals.append(time.monotonic())
            told.tokens += len(output.outputs[0].token_ids)
        told.ended, told.messages = time.monotonic(), len(told.arrivals)
        return told

    await ask(4, 0 if kind != "mock" else 100, "")
    print(json.dumps({"ready": os.getpid()}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answers = await closed_loop(ask, **json.loads(line))
        print(json.dumps([[told.begun, told.arrivals, told.tokens, told.ended] for told in answers]), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
