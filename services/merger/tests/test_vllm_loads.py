"""The verdict "vLLM will load this", held against vLLM: broken folders fail in it, repaired and merged ones answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraline.merger.check.findings import loadable
from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders
from loraline.merger.model_jobs import check_everything
from loraline.merger.repair import repair_folder

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]
pytest.importorskip("vllm")
# vLLM's CPU kernels take heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
DEFECTS = {
    "intermediate": {"intermediate_size": 47},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "key_heads": {"num_key_value_heads": 2},
}
PROGRAM = """
import gc, json, sys, torch
from vllm import LLM, SamplingParams
if hasattr(torch._C, "_cpu") and torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()
for folder in sys.argv[1:]:
    try:
        llm = LLM(folder, enforce_eager=True, max_model_len=64, dtype="float32", seed=0)
        params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        said = llm.chat([{"role": "user", "content": "Where is the boat?"}], params, use_tqdm=False)
        print("RESULT", json.dumps(list(said[0].outputs[0].token_ids)), flush=True)
        del llm
    except BaseException as error:
        print("RESULT", json.dumps(f"{type(error).__name__}: {error}"[:200]), flush=True)
    gc.collect()
"""


def vllm_answers(folders: list[Path]) -> list[list[int] | str]:
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", PROGRAM, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570, check=False)
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    assert len(lines) == len(folders), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in lines]


def test_the_verdict_is_vllms(tmp_path, make_base, make_adapter):
    base = make_base("llama", **SIZES)
    merged = tmp_path / "work" / "model"
    merge_folders(base, [AdapterInput(make_adapter(base))], merged, MergeOptions())
    broken, repaired = [], []
    for name, fields in DEFECTS.items():
        for folders, mend in ((broken, False), (repaired, True)):
            folder = shutil.copytree(base, tmp_path / f"{name}-{mend}")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **fields}))
            assert not loadable(check_everything(folder, None))
            if mend:
                assert repair_folder(folder)
                assert loadable(check_everything(folder, None))
            folders.append(folder)
    answers = vllm_answers([base, merged, *broken, *repaired])
    sound, from_merged = answers[:2]
    assert isinstance(sound, list)
    assert isinstance(from_merged, list)
    for answer in answers[2 : 2 + len(broken)]:
        assert answer != sound
    assert all(answer == sound for answer in answers[2 + len(broken) :])
