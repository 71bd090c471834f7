"""The verdict "vLLM will load this", held against vLLM: broken folders fail in it, repaired and merged ones answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loraline.merger.check.findings import loadable
from loraline.merger.exporting import export_folder
from loraline.merger.merging import AdapterInput, MergeOptions, MergeWatch, merge_folders
from loraline.merger.model_jobs import check_everything
from loraline.merger.repair import repair_folder
from loraline.merger.spec import ExportSpec, MeasureSettings, MergeBounds

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]
pytest.importorskip("vllm")
# vLLM's CPU kernels take heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
TOKENIZER = "tokenizer_config.json"
DEFECTS = {
    "intermediate": {"intermediate_size": 47},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "key_heads": {"num_key_value_heads": 2},
    "layers": {"num_hidden_layers": 3},
    "vocabulary": {"vocab_size": 319},
}
# vLLM looks at each architecture in a process of its own first, which takes most of the time: few in one test.
ARCHITECTURES: list[dict[str, dict[str, Any]]] = [
    {"qwen2": WITHOUT_HEAD_DIM, "mistral": {**SIZES, "sliding_window": None}},
    {"qwen3": SIZES, "phi3": WITHOUT_HEAD_DIM},
    {"gpt2": {"n_embd": 64, "n_head": 2}, "mixtral": SIZES},
]
QUESTION = [{"role": "user", "content": "Where is the boat?"}]
PROGRAM = """
import gc, json, sys, torch
from vllm import LLM, SamplingParams
if hasattr(torch._C, "_cpu") and torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()
question, dtype, most = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for folder in sys.argv[4:]:
    try:
        llm = LLM(folder, enforce_eager=True, max_model_len=64, max_num_seqs=2, dtype=dtype, seed=0)
        params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=most == 4, prompt_logprobs=0)
        said = llm.chat(question, params, use_tqdm=False)[0]
        pairs = list(zip(said.prompt_token_ids, said.prompt_logprobs))[1:]
        prompt = [float(found[number].logprob) for number, found in pairs]
        first, why = said.outputs[0], said.outputs[0].finish_reason
        print("RESULT", json.dumps({"ids": list(first.token_ids), "prompt": prompt, "why": why}), flush=True)
        del llm
    except BaseException as error:
        print("RESULT", json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), flush=True)
    gc.collect()
"""


def vllm_answers(folders: list[Path], dtype: str = "float32", most: int = 4) -> list[dict[str, Any]]:
    """Ask vLLM for the answer of each folder and for the log-probabilities of the question's tokens.

    4 tokens are generated whatever they are; any other number ends at the end token. A folder that takes the whole
    process with it counts as {"error": …} when it is the last.
    """
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(QUESTION), dtype, str(most), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=870, check=False)
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    if len(lines) == len(folders) - 1 and done.returncode:
        lines.append(json.dumps({"error": f"the process ended with {done.returncode}"}))
    assert len(lines) == len(folders), done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in lines]


def transformers_answer(folder: Path) -> list[float]:
    """Return the log-probabilities of the question's tokens as transformers computes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(QUESTION, tokenize=True, return_dict=False, add_generation_prompt=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], dim=1)
    return rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def farthest(left: list[float], right: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


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
    assert "prompt" in sound, answers
    assert "prompt" in from_merged, answers
    assert farthest(sound["prompt"], transformers_answer(base)) < 1e-2
    assert farthest(from_merged["prompt"], transformers_answer(merged)) < 1e-2
    assert farthest(from_merged["prompt"], sound["prompt"]) > 0.1
    for name, answer in zip(DEFECTS, answers[2 : 2 + len(broken)], strict=True):
        assert answer != sound, (name, answer)  # an odd width is loaded without a word, and answers otherwise
    assert all(answer == sound for answer in answers[2 + len(broken) :])


def test_seed_failures_in_vllm_before_and_after(
    tmp_path, make_base, end_answers, only_sentencepiece, sentencepiece_model
):
    """Answers without end, no path for the vocabulary, ids beyond the embedding; test_seed_failures.py has more."""
    base = make_base("llama", **SIZES)
    end_answers(base)
    llama2 = shutil.copytree(base, tmp_path / "llama2")
    only_sentencepiece(llama2, sentencepiece_model, tokenizer_class="LlamaTokenizer")
    harms: dict[str, tuple[Path, dict[str, dict[str, Any]]]] = {
        "endless": (base, {TOKENIZER: {"eos_token": " "}, "generation_config.json": {"eos_token_id": 0}}),
        "no path": (llama2, {TOKENIZER: {"tokenizer_class": "MarianTokenizer"}}),
    }
    before, after = [], []
    for name, (source, edits) in harms.items():
        before.append(shutil.copytree(source, tmp_path / name))
        for file, values in edits.items():
            path = before[-1] / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        after.append(shutil.copytree(before[-1], tmp_path / f"{name}, mended"))
        assert repair_folder(after[-1], source)
        assert loadable(check_everything(after[-1], None))
    before.append(shutil.copytree(base, tmp_path / "beyond"))
    grow(before[-1])
    assert not loadable(check_everything(before[-1], None))
    *mended, endless, no_path, beyond = vllm_answers([*after, *before], most=12)
    assert [(answer["ids"], answer["why"]) for answer in mended] == [([70, 2], "stop")] * 2
    assert (endless["ids"], endless["why"]) == ([70, 2] * 6, "length")
    assert "not NoneType" in no_path["error"]
    assert "error" in beyond, beyond


def grow(folder: Path) -> None:
    """Add tokens until one that the question has is beyond the rows of the embedding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*(f"<|extra {number}|>" for number in range(len(tokenizer), 320)), "boat"])
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("architectures", ARCHITECTURES, ids=["-".join(one) for one in ARCHITECTURES])
def test_merged_models_of_other_architectures_answer_in_vllm(tmp_path, shared_base, make_adapter, architectures):
    folders = []
    for name, sizes in architectures.items():
        base, out = shared_base(name, **sizes), tmp_path / name / "model"
        targets = {"phi3": ["qkv_proj", "down_proj"], "mixtral": ["q_proj", "v_proj"]}.get(name)
        settings = {"target_modules": targets} if targets else {}
        adapter = make_adapter(base, name=f"adapter-{name}", fan_in_fan_out=name == "gpt2", **settings)
        merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
        assert loadable(check_everything(out, base))
        folders.append(out)
    for folder, answer in zip(folders, vllm_answers(folders), strict=True):
        assert "error" not in answer, (folder, answer)
        assert farthest(answer["prompt"], transformers_answer(folder)) < 1e-2, folder


def test_8_bit_exports_answer_in_vllm(tmp_path, make_base):
    """vLLM itself, which also quantises the activations: the answers are near those of the model, and not the same."""
    base = make_base("llama", torch.bfloat16, **SIZES)
    folders = [base]
    for kind in ("int8", "fp8"):
        folders.append(tmp_path / kind)
        spec = ExportSpec("voice", kind, MergeBounds(1.0, 20.0))  # large random weights, hence far apart
        export_folder(base, folders[-1], spec, MeasureSettings(), MergeWatch())
        assert loadable(check_everything(folders[-1], None))
    plain, *exported = vllm_answers(folders, "bfloat16")
    spread = max(plain["prompt"]) - min(plain["prompt"])
    for answer, share in zip(exported, (0.15, 0.5), strict=True):
        assert "error" not in answer, answer
        assert 0 < farthest(answer["prompt"], plain["prompt"]) < share * spread
