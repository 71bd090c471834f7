"""Measures our training loop beside TRL's defaults and a bare torch loop, on ragged rows.

`make bench NAME=trainer`. The same random model (Qwen2's shape, about 9 million weights), the same LoRA, rows and mask
for all three; each client runs in a fresh process, rounds are interleaved, and a ratio is the median of the rounds'
ratios of tokens a second. TRL's defaults are those of its SFTTrainer: batches of 8 as they come, padded, activations
recomputed, every logit computed. The bare loop takes our batches in our order: forward, backward, AdamW, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "trainer.txt"
CLIENTS = ("loraline", "trl", "bare")
AIMS = {"trl": 6.0, "bare": 0.85}
VOCABULARY, BATCH, RANK, RATE = 16384, 8, 8, 1e-4


def rows(count: int) -> list[tuple[list[int], list[int]]]:
    """Return ids and mask of rows whose lengths vary as those of chats do; about 40 % of the tokens carry loss."""
    draw = random.Random(7)
    made = []
    for _ in range(count):
        length = max(16, min(512, round(draw.lognormvariate(4.4, 0.7))))
        answer = max(4, round(length * draw.uniform(0.2, 0.6)))
        ids = [draw.randrange(8, VOCABULARY) for _ in range(length)]
        made.append((ids, [0] * (length - answer) + [1] * answer))
    return made


def model(dtype: str) -> Any:
    """Return the random model, the same in every process."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config)
    with torch.no_grad():  # wider than transformers' own start, so that the loss differs from that of a blank model
        made.model.embed_tokens.weight.mul_(3.0)
    return made.to(dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])  # type: ignore[call-overload]


def with_loraline(count: int, dtype: str, folder: Path) -> dict[str, float]:
    """Train an epoch by the trainer's own engine."""
    from loraline.api.trainer.v1 import trainer_pb2 as pb
    from loraline.core.evidence.receipt import TokenReceipt
    from loraline.trainer.engines import sft
    from loraline.trainer.engines.encoding import ChatEncoder, EncodedRow, eos_ids_of
    from loraline.trainer.engines.loading import Precision, load_tokenizer
    from loraline.trainer.engines.preparing import PreparedData
    from loraline.trainer.engines.samples import SampleAnswers
    from loraline.trainer.spec import training_spec
    from loraline.trainer.testing import make_base
    from loraline.trainer.testing_runs import Watcher

    tokenizer = load_tokenizer(make_base(folder / "tokenizer"))
    train = [EncodedRow(str(number), [], ids, mask) for number, (ids, mask) in enumerate(rows(count))]
    data = PreparedData(train, [], TokenReceipt("", "", 1))
    steps = count // BATCH
    parameters = pb.TrainingParameters(
        max_steps=steps, batch_size=BATCH, learning_rate=RATE, save_steps=steps, lora=pb.LoraParameters(r=RANK),
    )  # fmt: skip
    spec = training_spec(pb.TrainRequest(name="bench", parameters=parameters))
    watcher = Watcher()
    samples = SampleAnswers([], ChatEncoder(tokenizer, eos_ids_of(tokenizer, None)), folder / "s.json", watcher)
    start = sft.Start(None, samples, folder / "first_batch.json")
    run = sft.train(
        model(dtype), tokenizer, data, spec, Precision(dtype, "none", ""), folder / "c", watcher, folder / "a", start
    )
    first = next(entry["loss"] for entry in run.log if "loss" in entry)
    return {"tokens": run.tokens, "seconds": run.train_seconds, "first_loss": first}


def with_trl(count: int, dtype: str, folder: Path) -> dict[str, float]:
    """Train an epoch as TRL does when it is given a model, rows and a LoRA, and nothing is set but the batch."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from loraline.trainer.engines.loading import load_tokenizer
    from loraline.trainer.testing import make_base

    made = rows(count)
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in made], "completion_mask": [mask for _, mask in made]})
    arguments = SFTConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", num_train_epochs=1,
        per_device_train_batch_size=BATCH, learning_rate=RATE, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=model(dtype), args=arguments, train_dataset=dataset, peft_config=lora,
        processing_class=load_tokenizer(make_base(folder / "tokenizer")),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    return {"tokens": sum(len(ids) for ids, _ in made), "seconds": time.perf_counter() - begin, "first_loss": 0.0}


def with_bare(count: int, dtype: str, folder: Path) -> dict[str, float]:
    """Train an epoch by nothing but torch, on our batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import set_seed

    from loraline.trainer.engines.sampling import epoch_order

    made = rows(count)
    order = epoch_order([len(ids) for ids, _ in made], BATCH, seed=0, epoch=0)
    set_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model(dtype), lora)
    tuned.train()
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=RATE)
    losses, tokens, begin = [], 0, time.perf_counter()
    for at in range(0, len(order) - BATCH + 1, BATCH):
        batch = [made[row] for row in order[at : at + BATCH]]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in batch])
        mask = torch.tensor([mask + [0] * (longest - len(mask)) for _, mask in batch], dtype=torch.bool)
        logits = tuned(input_ids=ids, attention_mask=attention).logits[:, :-1]
        labels = ids.masked_fill(~mask, -100)[:, 1:]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens += sum(len(row) for row, _ in batch)
    return {"tokens": tokens, "seconds": time.perf_counter() - begin, "first_loss": losses[0]}


def client(name: str, count: int, dtype: str) -> None:
    """Run one client in this process and print its figures."""
    work = {"loraline": with_loraline, "trl": with_trl, "bare": with_bare}[name]
    with tempfile.TemporaryDirectory() as folder:
        work(2 * BATCH, dtype, Path(folder) / "warm")  # imports and first allocations are not measured
        before = resource.getrusage(resource.RUSAGE_SELF)
        found = work(count, dtype, Path(folder) / "run")
        after = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found["peak_mib"] = after.ru_maxrss / 1024
    print(json.dumps(found))


def measure(name: str, count: int, dtype: str) -> dict[str, float]:
    """Run one client in a fresh process."""
    return told_by([sys.executable, __file__, "--client", name, "--rows", str(count), "--dtype", dtype])


def told_by(command: list[str]) -> dict[str, float]:
    """Return what a process prints last, as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(told.splitlines()[-1])


def run(rounds: int, count: int, dtype: str) -> tuple[list[str], bool]:
    """Run the rounds; return the lines, and whether all aims were met."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
    for _ in range(rounds):
        for name in CLIENTS:
            found[name].append(measure(name, count, dtype))
    speed = {name: [told["tokens"] / told["seconds"] for told in found[name]] for name in CLIENTS}
    lines, met = [], True
    for peer, aim in AIMS.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(speed["loraline"], speed[peer], strict=True))
        met = met and ratio >= aim
        lines.append(f"ratio loraline_vs_{peer}_tokens_per_second {ratio:.2f} aim >={aim:.2f}")
    apart = abs(found["loraline"][0]["first_loss"] - found["bare"][0]["first_loss"])
    same = len({told["tokens"] for name in CLIENTS for told in found[name]}) == 1
    lines.append(f"count first_loss_apart_from_bare_in_micronats {apart * 1e6:.0f} aim <=1000")
    lines.append(f"count runs_with_other_token_counts {int(not same)} aim <=0")
    for name in CLIENTS:
        lines.append(f"info {name}_tokens_per_second {statistics.median(speed[name]):.0f}")
        per = [told["cpu"] / told["tokens"] * 1000 for told in found[name]]
        lines.append(f"info {name}_cpu_seconds_per_1000_tokens {statistics.median(per):.3f}")
        lines.append(f"info {name}_peak_mib {max(told['peak_mib'] for told in found[name]):.0f}")
    lines += [f"info rows {count}", f"info dtype {dtype}", f"info rounds {rounds}"]
    return lines, met and same and apart <= 1e-3


def ragged(count: int) -> list[dict[str, Any]]:
    """Return conversations whose lengths vary as those of chats do."""
    from loraline.trainer.testing import QUESTIONS, chat

    draw = random.Random(7)
    made = []
    for _ in range(count):
        words = max(2, min(40, round(draw.lognormvariate(2.4, 0.7))))
        made.append(
            chat(draw.choice(QUESTIONS), " ".join(draw.choice(("Aye", "harbour", "tide")) for _ in range(words)))
        )
    return made


def shares(rounds: int, count: int) -> tuple[list[str], bool]:
    """Return what start-up, checkpoints and evidence take of a whole run, beside TRL's way to its first step."""
    from loraline.trainer.testing import make_base, write_rows

    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", layers=6, width=256)
        rows = write_rows(folder / "rows", ragged(count))
        write_rows(rows, ragged(count + 16)[count:], "validation")
        for turn in range(rounds):
            for side, flags in (("peer", ["--peer"]), ("ours", ["--epochs", "6"])):
                command = [sys.executable, str(Path(__file__).with_name("shares.py")), str(folder)]
                found[side].append(told_by([*command, str(folder / f"{side}-{turn}"), *flags]))
    runs = found["ours"]

    def of_run(part: str, whole: str) -> float:
        return statistics.median(run.get(part, 0.0) / run[whole] for run in runs)

    start = statistics.median(a["first_step"] / b["first_step"] for a, b in zip(runs, found["peer"], strict=True))
    stall = of_run("checkpoint_seconds", "train")
    evidence = {part: of_run(part, "all") for part in ("receipt", "first_batch", "probes", "samples")}
    lines = [
        f"ratio start_to_first_step_seconds_vs_trl {start:.2f} aim <=1.25",
        f"ratio checkpoint_stall_share_of_training {stall:.4f} aim <=0.02",
        f"ratio evidence_share_of_run {sum(evidence.values()):.4f} aim <=0.02",
    ]
    lines += [f"info {part}_share_of_run {share:.4f}" for part, share in evidence.items()]
    for part in ("first_step", "train", "all", "checkpoint_seconds", "checkpoints"):
        lines.append(f"info shares_{part} {statistics.median(run[part] for run in runs):.2f}")
    return lines, start <= 1.25 and stall <= 0.02 and sum(evidence.values()) <= 0.02


def main() -> int:
    """Run the benchmark, print and keep its lines."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--client", choices=CLIENTS)
    arguments.add_argument("--rows", type=int, default=192)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    arguments.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    wanted = arguments.parse_args()
    if wanted.client:
        client(wanted.client, wanted.rows, wanted.dtype)
        return 0
    lines, met = run(wanted.rounds, wanted.rows, wanted.dtype)
    more, also_met = shares(wanted.rounds, 4 * wanted.rows)
    lines, met = lines + more, met and also_met
    if wanted.keep:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
