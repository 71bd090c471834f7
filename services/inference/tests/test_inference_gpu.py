"""The proof on a GPU, in the number formats that GPUs serve."""

from __future__ import annotations

from typing import Any

import pytest

from loraline.inference.adapters.proof import prove_adapter, read_evidence
from loraline.inference.engines.chat_format import ChatFormat
from loraline.inference.engines.choice import choose
from loraline.inference.engines.port import EngineOptions

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [pytest.param("vllm", marks=pytest.mark.vllm), "transformers"])
async def test_proof_passes_in_half_precision(toy: Any, name: str, dtype: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip(name)
    options = EngineOptions(dtype=dtype, max_model_len=256, max_lora_rank=16, gpu_memory_utilization=0.3)
    engine, chat_format = choose(name).create(), ChatFormat.load(toy.model)
    await engine.start(toy.model, options)
    try:
        assert engine.facts.device == "cuda"
        assert engine.facts.dtype == dtype
        await engine.load_adapter("mareva1", toy.adapters["mareva"])
        evidence = read_evidence(toy.adapters["mareva"])
        assert evidence is not None
        proof = await prove_adapter(engine, chat_format, "mareva1", evidence, "mareva")
        print(name, dtype, proof)
        assert proof.mean_abs_diff_from_trainer < proof.bound
    finally:
        await engine.stop()
