"""vLLM's CPU operators leave rows without an adapter alone."""

from __future__ import annotations

import pytest


@pytest.mark.vllm
@pytest.mark.slow
def test_rows_without_an_adapter_get_nothing_of_the_last_one() -> None:
    pytest.importorskip("vllm")
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    from loraline.inference.engines.cpu_lora import enable

    assert enable()
    assert enable()  # each of vLLM's processes may ask more than once
    weights = torch.ones(2, 1, 4, 8)  # two places for adapters, rank 4, width 8
    rows, output = torch.ones(3, 8), torch.full((3, 4), 7.0)
    lora_ops.bgmv_shrink(rows, weights, output, torch.tensor([0, -1, 1]), 1.0)
    assert output.tolist() == [[8.0] * 4, [0.0] * 4, [8.0] * 4]
    output = torch.full((3, 4), 7.0)
    lora_ops.sgmv_shrink(
        rows, weights, output, torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([1, -1]), 2, 2, 3, 1.0
    )
    assert output.tolist() == [[8.0] * 4, [0.0] * 4, [0.0] * 4]
