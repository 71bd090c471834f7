"""Merges a LoRA adapter into a random bf16 model: Loraline beside `cp` + fsync of the same files and beside peft.

Every round runs each program once, in a process of its own, so that they share whatever else the machine does; ratios
are of the medians. Times leave out imports. cp stands for the least that writing these files can take; peft loads the
model, merges and saves, as its documentation shows. Memory is the greatest anonymous resident memory while Loraline
writes, less what the imports took and less the adapter. What the measured merge costs on top is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1024 * 1024
HIDDEN, INTERMEDIATE, VOCABULARY, KV, RANK = 2048, 5632, 32000, 512, 16
LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}  # fmt: skip


def make_model(folder: Path, layers: int, shards: int) -> int:
    """Write a random Llama with `layers` layers in `shards` files; return the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    ).save_pretrained(folder)  # fmt: skip
    make_tokenizer(folder)
    shapes = shapes_of(layers)
    noise = (torch.randn(VOCABULARY * HIDDEN) * 0.02).to(torch.bfloat16)
    total = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled > total / shards * len(groups) and len(groups) < shards:
            groups.append({})
        groups[-1][name] = shape
        filled += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        tensors = {}
        for key, shape in group.items():
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            tensors[key] = (
                noise[:count].reshape(shape).clone() if len(shape) > 1 else torch.ones(shape, dtype=noise.dtype)
            )
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
        shapes |= {
            f"model.layers.{layer}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return shapes


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", bos_token="<s>").save_pretrained(folder)


def make_adapter(folder: Path, layers: int) -> int:
    """Write a LoRA adapter on all linear layers; return its bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(layers):
        for name, (out, inner) in LAYER_SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inner) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    config["target_modules"] = [name.partition(".")[2] for name in LAYER_SHAPES]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def sampled(work: Callable[[], None]) -> tuple[float, float, float]:
    """Run `work` and return its seconds, and anonymous memory in MiB before and at its greatest."""
    from loraline.merger.memory import anonymous_bytes

    before = greatest = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal greatest
        while not done.wait(0.005):
            greatest = max(greatest, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    work()
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    return seconds, before / MIB, greatest / MIB


def run_ours(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Merge without the measurement: what peft and cp do."""
    from loraline.merger.adapter import open_adapter
    from loraline.merger.engines.deltas import LoraRows
    from loraline.merger.engines.streaming import write_merged
    from loraline.merger.plan import make_plan
    from loraline.merger.sync import copy_base_files
    from loraline.merger.weights.header import Form
    from loraline.merger.weights.layout import open_weights

    def work() -> None:
        weights = open_weights(base)
        plan = make_plan(weights, [(open_adapter(adapter), 1.0)], "")
        assert plan.streaming
        write_merged(weights, LoraRows([adapter], plan), Form(), out, fingerprint="bench")
        copy_base_files(base, out)

    seconds, before, greatest = sampled(work)
    return {"seconds": seconds, "before": before, "greatest": greatest}


def run_peft(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="600MB")
        flush(out)

    seconds, before, greatest = sampled(work)
    return {"seconds": seconds, "before": before, "greatest": greatest}


def run_cp(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    flush(out)
    return {"seconds": time.monotonic() - start, "before": 0, "greatest": 0}


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def run_measured(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """The whole merge as a job does it, measured against base+adapter."""
    from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders

    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    return {"seconds": outcome.merge_seconds, "measure": outcome.measure_seconds,
            "tokens": outcome.measurements[-1][0].tokens, "kl": outcome.measurements[-1][0].mean_kl}  # fmt: skip


PROGRAMS = {"loraline": run_ours, "cp": run_cp, "peft": run_peft, "measured": run_measured}


def child(program: str, base: Path, adapter: Path, scratch: Path) -> dict[str, float]:
    """Run one program in a fresh process and drop what it wrote."""
    out = scratch / "out" / "model"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    os.sync()
    command = [sys.executable, __file__, "--program", program, str(base), str(adapter), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(out.parent)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", choices=sorted(PROGRAMS))
    parser.add_argument("--layers", type=int, default=28, help="28 give 2.7 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-measure", action="store_true", help="leave out the cost of the measured merge")
    parser.add_argument("paths", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps(PROGRAMS[arguments.program](*arguments.paths)))
        return
    scratch = Path(tempfile.mkdtemp(prefix="bench-merger-"))
    try:
        compare(scratch, arguments.layers, arguments.rounds, measure=not arguments.no_measure)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compare(scratch: Path, layers: int, rounds: int, *, measure: bool) -> None:
    base, adapter = scratch / "base", scratch / "adapter"
    size, factors = make_model(base, layers, 5), make_adapter(adapter, layers)
    print(
        f"model {size / 1e9:.2f} GB bf16 in 5 shards, adapter {factors / MIB:.0f} MiB, rank {RANK}, all linear layers"
    )
    times: dict[str, list[float]] = {"loraline": [], "cp": [], "peft": []}
    peaks: list[float] = []
    for _ in range(rounds):
        for name, seconds in times.items():
            result = child(name, base, adapter, scratch)
            seconds.append(result["seconds"])
            if name == "loraline":
                peaks.append(result["greatest"] - result["before"])
    for name, seconds in times.items():
        print(f"{name:9} {' '.join(f'{one:6.2f}' for one in seconds)} s, median {statistics.median(seconds):.2f}")
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"ratio loraline/cp {middle['loraline'] / middle['cp']:.2f} aim <=1.25")
    print(f"ratio loraline/peft {middle['loraline'] / middle['peft']:.2f} aim <=0.20")
    over = max(peaks) - factors / MIB
    print(f"memory over imports and adapter {over:.0f} MiB (over imports {max(peaks):.0f}) aim <=150")
    if measure:
        result = child("measured", base, adapter, scratch)
        print(f"measured merge: {result['seconds']:.1f} s to write, {result['measure']:.1f} s to measure "
              f"{result['tokens']:.0f} tokens in float32, mean KL {result['kl']:.2g}")  # fmt: skip
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    for label, depth, shards in (("twice the size", 2 * layers, 5), ("one shard", layers, 1)):
        size, factors = make_model(base, depth, shards), make_adapter(adapter, depth)
        result = child("loraline", base, adapter, scratch)
        peak = result["greatest"] - result["before"] - factors / MIB
        print(f"memory with {label} ({size / 1e9:.2f} GB, adapter {factors / MIB:.0f} MiB) {peak:.0f} MiB aim <=150")
        shutil.rmtree(base)
        shutil.rmtree(adapter)


if __name__ == "__main__":
    main()
