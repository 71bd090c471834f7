"""A random Qwen2 model of some 0.3 million parameters and LoRA adapters on it, with the evidence of a trainer."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from loraline.api.artifact.v1.artifact_pb2 import ARTIFACT_KIND_MODEL
from loraline.core.config import CoreSettings
from loraline.core.evidence.probes import Probe, ProbeSet
from loraline.core.evidence.receipt import ReceiptCounts, ReceiptRow, TokenReceipt, digest_text
from loraline.core.serving.component import Platform
from loraline.core.serving.opening import open_platform
from loraline.inference.config import InferenceSettings
from loraline.inference.host import ModelHost
from loraline.inference.metrics import InferenceMetrics

sys.path.insert(0, str(Path(__file__).parent))  # served_toy.py and counting_engine.py stand beside the tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The harbour lies still at night, and Mareva mends the nets by the light of a lamp.",
    "What is your name? Where do the boats go? Tell me about the storm and the old lighthouse.",
    '{"recommend": "yes", "challenges": [{"title": "swim", "description": "every day"}], "n": 12345.67}',
    "오늘 날씨가 좋습니다. 바다에 갑시다.",
]
TALKS = [
    ("What is your name?", "Mareva, of the harbour."),
    ("Where do the boats go?", "Out past the lighthouse, before the storm."),
    ("오늘 날씨가 좋습니까?", "좋습니다."),
]


@dataclass(frozen=True)
class Toy:
    """The model's folder and the adapters' folders by name."""

    model: Path
    adapters: dict[str, Path]


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return fast


def _model(folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)


def _adapter(model_folder: Path, folder: Path, tokenizer: Any, seed: int, strength: float, rank: int = 8) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    base = Qwen2ForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    modules = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength)
    model.eval().save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    _probes(model, tokenizer).save(folder)
    _receipt(tokenizer).save(folder)
    digest = hashlib.sha256((model_folder / "config.json").read_bytes()).hexdigest()
    (folder / "base_model.json").write_text(json.dumps({"source": "path", "path": "toy", "config_sha256": digest}))


def _probes(model: Any, tokenizer: Any) -> ProbeSet:
    import torch

    def figures(prompt: list[int], response: list[int]) -> list[float]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0]
        chosen = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        return [float(row[token]) for row, token in zip(chosen, response, strict=True)]

    probes = []
    for number, (question, answer) in enumerate(TALKS):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt, response = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
        with model.disable_adapter():
            base = figures(prompt, response)
        probes.append(Probe(f"probe-{number}", messages, prompt, response, base, figures(prompt, response)))
    return ProbeSet("float32", probes)


def _receipt(tokenizer: Any) -> TokenReceipt:
    rows = []
    for number, (question, answer) in enumerate(TALKS):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(ReceiptRow(f"train.jsonl:{number + 1}", messages, ids, [1] * len(ids)))
    return TokenReceipt(digest_text(TEMPLATE), "generation_marks", tokenizer.eos_token_id, ReceiptCounts(rows=3), rows)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The model with three adapters on it: `mareva`, `selkie` and `faint`, which changes next to nothing."""
    root = tmp_path_factory.mktemp("toy")
    model = root / "base"
    tokenizer = _tokenizer(model)
    _model(model, tokenizer)
    adapters = {"mareva": (1, 0.05), "selkie": (2, 0.05), "faint": (3, 1e-9)}
    for name, (seed, strength) in adapters.items():
        _adapter(model, root / name, tokenizer, seed, strength)
    return Toy(model, {name: root / name for name in adapters})


@pytest.fixture(scope="session")
def copy_adapter() -> Callable[[Path, Path], Path]:
    """Copy an adapter's folder so that a test may spoil it."""
    import shutil

    def copy(source: Path, target: Path) -> Path:
        return Path(shutil.copytree(source, target))

    return copy


@pytest.fixture
def platform(tmp_path: Path, toy: Toy) -> Iterator[Platform]:
    """A platform whose library holds the toy as `model/toy:v1`, and counting engines that start afresh."""
    from counting_engine import CountingEngine

    CountingEngine.started, CountingEngine.fail_folder = [], ""
    platform = open_platform(CoreSettings(data_dir=tmp_path / "data"))
    platform.library.publish(ARTIFACT_KIND_MODEL, "toy", toy.model)
    yield platform
    platform.database.close()


@pytest_asyncio.fixture
async def make_host(platform: Platform) -> AsyncIterator[Callable[..., ModelHost]]:
    """Make hosts on the counting engine, or on another choice, with settings; they are stopped after the test."""
    from counting_engine import CountingChoice

    hosts: list[ModelHost] = []

    def make(chosen: Any = None, **settings: Any) -> ModelHost:
        values = {"max_loaded_adapters": 2, "alias_cache_seconds": 0, "restart_backoff_seconds": 0.05, **settings}
        host = ModelHost(
            InferenceSettings(**values),
            platform.settings,
            platform.library,
            InferenceMetrics(CollectorRegistry()),
            chosen or (lambda _: CountingChoice("transformers", "test")),
        )
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        await host.stop()
